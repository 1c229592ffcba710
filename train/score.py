"""Judge predictions of lmms-eval or VLMEvalKit by our rules.

python train/score.py FILE --benchmark NAME --root DIR --out DIR
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("score")
