"""Assemble an audio-visual base from pretrained parts.

python train/assemble.py --out DIR [--work DIR]
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("assemble")
