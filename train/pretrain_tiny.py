"""Train the tiny Qwen2.5-Omni checkpoint on audio-visual recall.

python train/pretrain_tiny.py --seed 0 --out DIR
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("pretrain-tiny")
