"""Render the audio-visual recall task: streams as mp4 files and one manifest per split.

python data_prep/synthesize.py --out data/recall
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("synthesize")
