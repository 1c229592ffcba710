"""Train a tiny base that is shipped on audio-visual recall.

python train/pretrain_tiny.py [--base tiny|tiny_salmonn] --seed 0 --out DIR
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("pretrain-tiny")
