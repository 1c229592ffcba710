"""Stream a file or a pipe and answer questions about it from a memory of fixed size.

python train/ask.py --model DIR --video FILE|- "QUESTION" ...
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("ask")
