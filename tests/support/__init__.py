"""Builders and reference implementations that tests share."""
