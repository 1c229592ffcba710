"""Compare arms of one or more runs question by question and write the report.

python train/compare.py DIR [DIR ...] --out DIR
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("compare")
