"""Export a tuned model as an adapter or merged into its base.

python train/export.py --run runs/X --format adapter|merged --out DIR
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("export")
