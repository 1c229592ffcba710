"""Convert ms-swift, LLaMA-Factory or video-SALMONN files into a manifest.

python data_prep/convert.py FILE ... --out data/train.jsonl
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("convert")
