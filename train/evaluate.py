"""Evaluate the arms of a run: the base model, the tuned model, and probes.

python train/evaluate.py --config X.yaml [key=value ...] [--arm NAME]... [--shard I/N]
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("evaluate")
