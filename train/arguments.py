"""The section `train`: fields and types of transformers.TrainingArguments, checked without building it."""

from collections.abc import Callable
from dataclasses import field, fields, make_dataclass
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator
from transformers import TrainingArguments

from omnimem.config import strict

OURS = {  # fields that another part decides
    "output_dir": "set by `name`: a run lives in runs/<name>",
    "resume_from_checkpoint": "given on the command line: --resume auto, or --resume runs/X/checkpoint-N",
    "local_rank": "given by the launcher; remove it",
    "do_train": "finetune.py always trains; remove it",
    "do_eval": "set evaluate.after_training instead",
    "do_predict": "set evaluate.after_training instead",
    "eval_strategy": "evaluation follows training; set evaluate.after_training instead",
    "eval_steps": "evaluation follows training; set evaluate.after_training instead",
    "per_device_eval_batch_size": "set evaluate.batch_size instead",
    "load_best_model_at_end": "needs an evaluation during training; compare checkpoints with train/evaluate.py instead",
    "remove_unused_columns": "samples are streams, not columns; remove it",
    "gradient_checkpointing": "set tuning.recompute instead: none, chunk or layer",
    "gradient_checkpointing_kwargs": "set tuning.recompute instead: none, chunk or layer",
    "activation_checkpointing": "set tuning.recompute instead: none, chunk or layer",
    "activation_checkpointing_kwargs": "set tuning.recompute instead: none, chunk or layer",
    "auto_find_batch_size": "would change what a step is; set per_device_train_batch_size",
    "parallelism_config": "cannot be written in YAML; use deepspeed",
    "push_to_hub": "nothing is uploaded; use train/export.py and upload what it writes",
}
FORMER = {  # names of transformers 4 that are gone
    "warmup_ratio": "gone in transformers 5; set warmup_steps, where a number below 1 is a share of all steps",
    "overwrite_output_dir": "gone in transformers 5; use --overwrite",
    "logging_dir": "gone in transformers 5; event files lie in runs/<name>/tb",
    "evaluation_strategy": "gone in transformers 5; set evaluate.after_training instead",
    "group_by_length": "gone in transformers 5; set train_sampling_strategy",
    "no_cuda": "gone in transformers 5; set use_cpu",
    "save_safetensors": "gone in transformers 5; weights are always safetensors",
}
REFUSED = {**OURS, **FORMER}


def train_section() -> type:
    """A strict dataclass with a field for each setting that `train` may hold, and one for each that is refused."""
    hints = get_type_hints(TrainingArguments)
    allowed = [each.name for each in fields(TrainingArguments) if each.init and each.name not in REFUSED]
    columns: list[Any] = [(name, _exact(hints[name]), field(default=None)) for name in allowed]
    for name, reason in REFUSED.items():
        kind = Annotated[Any, BeforeValidator(_refuse(reason))]
        columns.append((name, kind, field(default=None, metadata={"refused": reason})))
    return strict(make_dataclass("TrainSection", columns, kw_only=True))


def _exact(hint: Any) -> Any:
    """The hint with the words of an enumeration in place of `Enum | str`, which would let any word pass."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if not enums:
        return hint
    words = Literal[tuple(member.value for kind in enums for member in kind)]  # type: ignore[valid-type]
    others = [kind for kind in kinds if kind not in (*enums, str)]
    return Union[(words, *others)]


def _refuse(reason: str) -> Callable[[Any], Any]:
    def refuse(value: Any) -> Any:
        raise ValueError(reason)

    return refuse
