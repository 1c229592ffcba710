"""Measure a model's layers on training streams and write the resulting budget with figures.

python train/calibrate.py --config X.yaml [key=value ...] [--out FILE]
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("calibrate")
