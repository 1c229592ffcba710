"""Fine-tune a model under its memory budget, then evaluate it beside the base model.

deepspeed train/finetune.py --config X.yaml [key=value ...] [--dry-run] [--resume auto|PATH]
"""

from omnimem.__main__ import run

if __name__ == "__main__":
    run("finetune")
