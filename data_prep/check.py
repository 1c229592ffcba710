"""Check every file of a manifest or a benchmark and print a data report.

python data_prep/check.py MANIFEST ... | --benchmark NAME --root DIR
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("check")
