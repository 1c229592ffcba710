"""The section `train`: the fields of transformers.TrainingArguments, checked without building it, and our own."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from enum import Enum
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, final, get_args, get_origin, get_type_hints

import torch
from pydantic import AfterValidator, BeforeValidator, ValidationError
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler

from omnimem.config import ConfigError, RunConfig, load, strict
from omnimem.config.check import UNFIT
from omnimem.config.reference import field_comments, first_sentence
from omnimem.errors import counted
from omnimem.extras import installed
from omnimem.run import Record, RunFolder
from omnimem.textfile import StoredFileError, got, read_stored
from omnimem.training.zero3 import engine_settings

METRICS = ("loss", "accuracy", "full_loss", "full_accuracy")  # of the validation: at the budget, with full memory
# the variable of the project that each callback of transformers reads
PROJECTS = {"wandb": "WANDB_PROJECT", "swanlab": "SWANLAB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
TRACKERS = ("tensorboard", "wandb", "swanlab", "mlflow")  # beside metrics.jsonl; TensorBoard is always written
Check = tuple[Callable[[float], bool], str]  # a test of a number, and its description

OURS = {  # fields that are set elsewhere
    "output_dir": "set by `name`: the run folder is runs/<name>",
    "resume_from_checkpoint": "given on the command line: --resume auto, or --resume runs/X/checkpoint-N",
    "local_rank": "given by the launcher; remove it",
    "do_train": "finetune.py always trains; remove it",
    "do_eval": "set data.validation for validation during training, evaluate.after_training for one at its end",
    "do_predict": "set evaluate.after_training instead",
    "batch_eval_metrics": "validation computes loss and accuracy, and keeps no logits; remove it",
    "eval_accumulation_steps": "validation computes loss and accuracy, and keeps no logits; remove it",
    "eval_do_concat_batches": "validation computes loss and accuracy, and keeps no logits; remove it",
    "eval_use_gather_object": "validation computes loss and accuracy, and keeps no logits; remove it",
    "include_for_metrics": "validation computes loss and accuracy, and keeps no logits; remove it",
    "prediction_loss_only": "validation computes loss and accuracy, and keeps no logits; remove it",
    "remove_unused_columns": "samples are streams, not columns; remove it",
    "gradient_checkpointing": "set tuning.recompute instead: none, chunk or layer",
    "gradient_checkpointing_kwargs": "set tuning.recompute instead: none, chunk or layer",
    "activation_checkpointing": "set tuning.recompute instead: none, chunk or layer",
    "activation_checkpointing_kwargs": "set tuning.recompute instead: none, chunk or layer",
    "auto_find_batch_size": "would change what a step is; set per_device_train_batch_size",
    "parallelism_config": "cannot be written in YAML; use deepspeed",
    "bf16_full_eval": "evaluation has the precision of model.dtype; remove it",
    "fp16_full_eval": "evaluation has the precision of model.dtype; remove it",
    "save_only_model": "no run could resume from such a checkpoint; omnimem export writes its adapter alone",
    "save_on_each_node": "a checkpoint is one folder on a file system that all nodes share; remove it",
    "accelerator_config": "samples are distributed over ranks by this project; remove it",
    "ignore_data_skip": "a resumed run would repeat some samples and skip others; remove it",
    "label_smoothing_factor": "the loss is defined by `tuning.loss` alone; remove it",
    "neftune_noise_alpha": "its noise ignores the seed of the step, so a resumed run would differ; remove it",
    "use_cpu": "a host without a GPU trains on the CPU; elsewhere set CUDA_VISIBLE_DEVICES to an empty string",
    **dict.fromkeys(
        ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
        "workers decode streams, a bounded number of bytes ahead of the step (docs/tuning.md); remove it",
    ),
    "push_to_hub": "nothing is uploaded; use omnimem export and upload its output",
}
FORMER = {  # names of transformers 4 that were removed
    "warmup_ratio": "removed in transformers 5; set warmup_steps, where a number below 1 is a fraction of all steps",
    "overwrite_output_dir": "removed in transformers 5; use --overwrite",
    "logging_dir": "removed in transformers 5; event files are in runs/<name>/tb",
    "evaluation_strategy": "removed in transformers 5; set eval_strategy",
    "group_by_length": "removed in transformers 5; set train_sampling_strategy",
    "no_cuda": "removed in transformers 5; set CUDA_VISIBLE_DEVICES to an empty string",
    "save_safetensors": "removed in transformers 5; weights are always safetensors",
}
FITTING = {each.name for each in fields(TrainingArguments)}
REFUSED = {**OURS, **FORMER, **{name: reason for name, reason in UNFIT.items() if name in FITTING}}
UNFIT_LAUNCH = {  # environment variables by which `accelerate launch` asks for what does not fit
    "ACCELERATE_USE_FSDP": UNFIT["fsdp"],
    "ACCELERATE_USE_MEGATRON_LM": UNFIT["fsdp"],
    "ACCELERATE_USE_PARALLELISM_CONFIG": UNFIT["fsdp"],
    "ACCELERATE_DYNAMO_BACKEND": UNFIT["torch_compile"],
}
VALIDATED = (  # settings that need data.validation
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "per_device_eval_batch_size",
    "metric_for_best_model",
    "greater_is_better",
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
)
EVERY_STEPS = 100  # default of save_steps, which eval_steps follows
RECIPE = ("learning_rate", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay")
STATEFUL = ("reduce_lr_on_plateau", "greedy")  # schedules that are no function of the step
# What a resumed run may change, and then does: from the next step on. The rest is in the checkpoint (moments of the
# optimizer) or in the steps that were taken (seed, order); the batch is checked by `refuse_other_batch`.
MAY_CHANGE = frozenset(
    " ".join(
        (
            *RECIPE,
            "max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps max_grad_norm",
            "deepspeed save_strategy save_steps save_total_limit logging_strategy logging_steps",
            "logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm",
            "torch_empty_cache_steps skip_memory_metrics debug dataloader_num_workers dataloader_pin_memory",
            "ddp_backend ddp_bucket_cap_mb ddp_timeout max_bad_steps step_timeout_seconds",
            "eval_strategy eval_steps eval_delay per_device_eval_batch_size load_best_model_at_end",
            "early_stopping_patience early_stopping_threshold report_to",
        )
    ).split()
)

ENGINE_FIXED = ("optimizer", "scheduler")  # sections of the DeepSpeed settings that a resumed run may not change

DEFAULTS: dict[str, Any] = {  # of ours, where transformers has others
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": EVERY_STEPS,
    "dataloader_num_workers": 1,
    "ddp_find_unused_parameters": False,  # every adapter has a gradient in every step
}
ABOVE_0: Check = (lambda number: number > 0, "a number above 0")
FROM_0: Check = (lambda number: number >= 0, "0 or more")
FROM_1: Check = (lambda number: number >= 1, "1 or more")
BELOW_1: Check = (lambda number: 0 <= number < 1, "0 or more, and below 1")
SEED: Check = (lambda number: 0 <= number < 2**32, "a whole number from 0 to 4294967295")
EVERY: Check = (
    lambda number: 0 < number < 1 or (number >= 1 and number == int(number)),
    "a whole number of steps, or a fraction of all steps below 1",
)
RANGES: dict[str, Check] = {
    "per_device_train_batch_size": FROM_1,
    "gradient_accumulation_steps": FROM_1,
    "max_steps": (lambda number: number >= 1 or number == -1, "1 or more, or -1 to count by num_train_epochs"),
    "num_train_epochs": ABOVE_0,
    "learning_rate": ABOVE_0,
    "warmup_steps": FROM_0,
    "weight_decay": FROM_0,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": ABOVE_0,
    "max_grad_norm": (FROM_0[0], "0 (no clipping) or more"),
    "save_steps": EVERY,
    "logging_steps": EVERY,
    "eval_steps": EVERY,
    "eval_delay": FROM_0,
    "per_device_eval_batch_size": FROM_1,
    "early_stopping_patience": FROM_1,
    "early_stopping_threshold": FROM_0,
    "save_total_limit": FROM_1,
    "torch_empty_cache_steps": FROM_1,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": FROM_0,
    "ddp_timeout": FROM_1,
    "ddp_bucket_cap_mb": FROM_1,
    "max_bad_steps": FROM_1,
    "step_timeout_seconds": (FROM_0[0], "0 (no limit) or more"),
}


@final
@dataclass(frozen=True, kw_only=True)
class OwnSettings:
    """Settings of `train` that are not transformers'."""

    max_bad_steps: int = 3  # consecutive steps with a non-finite loss or gradient that end the run
    step_timeout_seconds: float = 1800.0  # limit of a micro-step, and of writing a checkpoint; 0: no limit
    early_stopping_patience: int | None = None  # validations without a new best that end the run; None: no limit
    early_stopping_threshold: float = 0.0  # smallest improvement that counts for it

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "OwnSettings":
        """Our settings in a section `train`."""
        return cls(**{name: value for name, value in section.items() if name in own_names() and value is not None})


def own_names() -> tuple[str, ...]:
    """Names of our settings."""
    return tuple(each.name for each in fields(OwnSettings))


def train_section() -> type:
    """A strict dataclass with one field per allowed setting of `train`, and one per refused setting."""
    hints = {**get_type_hints(TrainingArguments), **get_type_hints(OwnSettings)}
    allowed = [each.name for each in fields(TrainingArguments) if each.init and each.name not in REFUSED]
    kinds = {name: _exact(hints[name]) for name in (*allowed, *own_names())}
    kinds["train_sampling_strategy"] = Literal["random", "sequential"] | None  # lengths are unknown in advance
    kinds["save_strategy"] = Literal["no", "steps", "epoch"]  # the best checkpoint is kept beside those
    kinds["metric_for_best_model"] = Literal[METRICS]
    kinds["report_to"] = Literal[TRACKERS] | tuple[Literal[TRACKERS], ...]
    kinds |= {name: Annotated[kinds[name], AfterValidator(_within(check))] for name, check in RANGES.items()}
    columns: list[Any] = [(name, kind, field(default=None)) for name, kind in kinds.items()]
    for name, reason in REFUSED.items():
        kind = Annotated[Any, BeforeValidator(_refuse(reason))]
        columns.append((name, kind, field(default=None, metadata={"refused": reason})))
    about = {"__doc__": "Settings of transformers' Trainer, and our own"}
    return strict(make_dataclass("TrainSection", columns, kw_only=True, namespace=about))


def _exact(hint: Any) -> Any:
    """The hint with the values of an enumeration in place of `Enum | str`, which would accept any string."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if not enums:
        return hint
    words = Literal[tuple(member.value for kind in enums for member in kind)]  # type: ignore[valid-type]
    others = [kind for kind in kinds if kind not in (*enums, str)]
    return Union[(words, *others)]


def _within(check: Check) -> Callable[[Any], Any]:
    accepts, allowed = check

    def within(value: Any) -> Any:
        if value is not None and not accepts(value):
            raise ValueError(f"{value:g} is out of range; give {allowed}")
        return value

    return within


def _refuse(reason: str) -> Callable[[Any], Any]:
    def refuse(value: Any) -> Any:
        raise ValueError(reason)

    return refuse


def training_arguments(section: Mapping[str, Any], folder: RunFolder, *, validated: bool = False) -> TrainingArguments:
    """The TrainingArguments of a run, with `validated` of one with data.validation; without a GPU it is on the CPU.

    Raises ConfigError when transformers refuses them, or when settings contradict `validated`.
    """
    # 1. our defaults
    refuse_unfit_launch()
    refuse_no_validation(section, validated=validated)
    defaults = {**DEFAULTS, "run_name": folder.path.name, "project": "omnimem"}  # the last two: of the trackers
    given = {name: value for name, value in section.items() if value is not None and name not in own_names()}
    if validated:
        every = given.get("save_steps", EVERY_STEPS)
        defaults |= {"eval_strategy": "steps", "eval_steps": every, "per_device_eval_batch_size": 1}
        defaults["metric_for_best_model"] = "loss"
        given.pop("load_best_model_at_end", None)  # `StreamTrainer.load_best` does it at every ZeRO stage
    # 2. build and check
    try:
        trackers = trackers_of(given.pop("report_to", ()))
        arguments = TrainingArguments(
            **{**defaults, **given},
            output_dir=str(folder.path),
            remove_unused_columns=False,
            report_to=trackers or "none",
            use_cpu=not torch.cuda.is_available(),
        )
        _try_recipe(arguments)
        _try_engine(arguments)
    except (ValueError, TypeError, ImportError) as error:  # conflicting settings, or unavailable on this machine
        raise ConfigError([f"train: {' '.join(str(error).split())}; change it in the config"]) from error
    _name_project(trackers, str(arguments.project), chosen="project" in given)
    return arguments


def _name_project(trackers: Sequence[str], project: str, *, chosen: bool) -> None:
    """Set the project of the trackers, whose callbacks in transformers read it from the environment alone.

    A variable of the user holds unless `train.project` is set (`chosen`).
    """
    for name in trackers:
        if chosen or not os.environ.get(PROJECTS[name]):
            os.environ[PROJECTS[name]] = project


def refuse_unfit_launch() -> None:
    """Raises ConfigError if the launcher asks for what does not go with streams: FSDP, Megatron, torch.compile."""
    for name, reason in UNFIT_LAUNCH.items():
        if os.environ.get(name, "no").lower() not in ("", "no", "0", "false"):
            raise ConfigError([f"environment {name} = {os.environ[name]}: {reason}"])


def trackers_of(given: str | Sequence[str]) -> list[str]:
    """The trackers that transformers reports to; TensorBoard is ours. Raises ValueError when a package is missing."""
    names = [given] if isinstance(given, str) else list(given)
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"report_to: {unknown[0]} is unknown; known: {', '.join(TRACKERS)}")
    others = [name for name in dict.fromkeys(names) if name != "tensorboard"]
    for name in others:
        if not installed(name):
            raise ValueError(f"report_to: {name} is not installed; pip install {name}, or remove it")
        if name == "swanlab" and _numbers(found := version(name)) >= (0, 10):
            what = f"report_to: swanlab {found} fails in the callback of transformers"
            raise ValueError(f"{what}; pip install 'swanlab<0.8', or remove it")
    return others


def _numbers(found: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", found)[:2])


def refuse_no_validation(section: Mapping[str, Any], *, validated: bool) -> None:
    """Raises ConfigError for settings of a validation that does not take place, and for one that would be useless."""
    given = {name: value for name, value in section.items() if value is not None}
    if not validated:
        problems = [
            f"train.{name}: needs data.validation, a manifest or a share of the recordings such as 0.1"
            for name in VALIDATED
            if name in given
        ]
    elif given.get("eval_strategy") == "no":
        problems = ["train.eval_strategy: no never reads data.validation; remove one of the two"]
    elif given.get("save_strategy") == "no" and given.get("load_best_model_at_end"):
        problems = [
            "train.load_best_model_at_end: needs checkpoints, and train.save_strategy is no; change one of them"
        ]
    elif "early_stopping_threshold" in given and "early_stopping_patience" not in given:
        problems = ["train.early_stopping_threshold: needs train.early_stopping_patience, the number of validations"]
    else:
        return
    if problems:
        raise ConfigError(problems)


def on_resume() -> dict[str, str]:
    """What a resumed run does with a change of each setting of `train`: `takes effect`, or `refused`.

    Settings that no run may have are left out; `docs/configuration.md` shows this table.
    """
    allowed = [each.name for each in fields(TrainingArguments) if each.init and each.name not in REFUSED]
    return {name: "takes effect" if name in MAY_CHANGE else "refused" for name in sorted((*allowed, *own_names()))}


def train_docs() -> dict[str, tuple[str, str]]:
    """Default and meaning of each allowed setting of `train`, from transformers' docstring and our own comments."""
    text = TrainingArguments.__doc__ or ""
    said = dict(re.findall(r"^ {8}(\w+) ?\(.*\):\n((?:(?: {9,}.*)?\n)+)", text, re.MULTILINE))
    usual = {each.name: each.default for each in (*fields(TrainingArguments), *fields(OwnSettings))}
    docs = {name: first_sentence(text) for name, text in said.items()} | field_comments(OwnSettings)
    docs["dataloader_num_workers"] = "processes of each rank that decode streams ahead of the step; 0: decode in it"
    found = {}
    for name, effect in on_resume().items():
        value = {**usual, **DEFAULTS}[name]
        plain = value.value if isinstance(value, Enum) else value
        shown = str(plain).lower() if isinstance(plain, bool) else str(plain)
        shown = shown if isinstance(plain, bool | int | float | str) else "null"
        found[name] = (shown, f"{docs.get(name, '')}; on resume: {effect}".lstrip("; "))
    return found


def train_changes(run: RunConfig, earlier: Path) -> dict[str, tuple[Any, Any]]:
    """The settings of `train` that a resumed run changes, with their values in the file `earlier` and now.

    Raises ConfigError for those that no resumed run may change, and for a RECIPE that the checkpoint keeps to itself.
    """
    usual = {each.name: each.default for each in (*fields(TrainingArguments), *fields(OwnSettings))}
    before, now = (
        {**usual, **{name: value for name, value in section.items() if value is not None}}
        for section in (load(earlier).train, run.train)
    )
    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    kept = (_kept_recipe(before) or _kept_recipe(now)) if set(names) & set(RECIPE) else None
    free = MAY_CHANGE - set(RECIPE) if kept else MAY_CHANGE
    problems = [
        f"{earlier} train.{name}: {before.get(name)!r} there, {now.get(name)!r} now, which "
        f"{kept if kept and name in RECIPE else 'the checkpoint'} does not follow; resume with the old value, or start "
        "a new run with name=... or --overwrite"
        for name in names
        if name not in free
    ]
    if problems:
        raise ConfigError(problems)
    return {name: (before.get(name), now.get(name)) for name in names}


def _kept_recipe(section: Mapping[str, Any]) -> str | None:
    """What in a section `train` keeps learning rate and schedule in its own state; None if a resumed run sets them."""
    schedule, optimizer = (str(section.get(name)) for name in ("lr_scheduler_type", "optim"))
    if "scheduler" in (engine_settings(section) or {}):
        return "the scheduler section of train.deepspeed"
    if schedule in STATEFUL:
        return f"train.lr_scheduler_type={schedule}"
    return f"train.optim={optimizer}" if re.search("schedule_free|layerwise", optimizer) else None


def refuse_engine_changes(run: RunConfig, record: Path) -> None:
    """Raises ConfigError if a resumed run has another optimizer or scheduler in its DeepSpeed settings than `record`.

    The states of the checkpoint would be read into another optimizer. Every other section may change.
    """
    try:
        noted = read_stored(record, Record, "").get("engine")
    except StoredFileError:  # missing or damaged: the run goes on without it
        return
    now, before = engine_settings(run.train) or {}, noted or {}
    problems = [
        f"{record} engine.{key}: {got(before.get(key))} there, {got(now.get(key))} in train.deepspeed now, which the "
        "checkpoint does not follow; resume with the old one, or start a new run with name=... or --overwrite"
        for key in ENGINE_FIXED
        if noted is not None and before.get(key) != now.get(key)
    ]
    if problems:
        raise ConfigError(problems)


def refuse_mixed_precision(run: RunConfig) -> None:
    """Raises ConfigError if the steps would have another precision than model.dtype.

    DeepSpeed casts the weights, but not the memory of a stream. Autocast knows float32 and its own precision.
    """
    engine = engine_settings(run.train)
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        keys = [name, dtype] if name == "bf16" else [name]  # DeepSpeed reads both
        sections = {key: each for key in keys if isinstance(each := (engine or {}).get(key), dict)}
        wanted = [f"deepspeed {key}.enabled" for key, each in sections.items() if each.get("enabled") is True]
        wanted = [f"train.{name}"] if run.train.get(name) else wanted
        if wanted and run.model.dtype not in ((dtype,) if engine else (dtype, "float32")):
            what = f"{wanted[0]} is true and model.dtype is {run.model.dtype}, which one step cannot mix"
            raise ConfigError([f"train: {what}; set model.dtype={dtype}, or {wanted[0]} to false"])


def refuse_adapter(run: RunConfig) -> None:
    """Raises ConfigError if the engine cannot train the adapter of `tuning.lora`."""
    engine, lora = engine_settings(run.train) or {}, run.tuning.lora
    if lora.dora and engine.get("zero_optimization", {}).get("stage") == 3:
        what = "tuning.lora.dora: needs the norm of every whole weight, which ZeRO-3 partitions"
        raise ConfigError([f"{what}; set train.deepspeed=deepspeed/zero2.json, or dora to false"])
    if run.model.quantization and engine.get("zero_optimization", {}).get("stage") == 3:
        what = f"model.quantization = {run.model.quantization}: ZeRO-3 partitions weights that are not packed"
        raise ConfigError([f"{what}; set train.deepspeed=deepspeed/zero2.json, or quantization to null"])
    if lora.plus_ratio != 1 and "optimizer" in engine:
        what = "tuning.lora.plus_ratio: the optimizer section of train.deepspeed has one learning rate"
        raise ConfigError([f"{what}; remove that section, or plus_ratio"])


def refuse_zero_rate(settings: TrainingArguments, steps: int) -> None:
    """Raises ConfigError if the schedule gives a learning rate of 0 in every one of `steps` steps, or fails."""
    # 1. the first rate; only a warm-up starts at 0, and ends above it
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    options: Any = settings.lr_scheduler_kwargs
    warmup, kind = settings.get_warmup_steps(steps), settings.lr_scheduler_type
    schedule: Any = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=options)
    rates = [optimizer.param_groups[0]["lr"]]
    if rates[0] > 0 or warmup < steps:
        return
    # 2. the rates of a run that is all warm-up
    try:
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        what = "the learning rate would be 0 in every step"
    except ZeroDivisionError:  # the polynomial schedule, when its warm-up ends in the last step
        what, rates = f"no step is left for the {SchedulerType(kind).value} schedule", [0.0]
    if not any(rates[:steps]):
        cure = "lower train.warmup_steps (0: no warm-up), or raise train.max_steps"
        raise ConfigError([f"train: {what}: warmup_steps = {warmup} of {counted(steps, 'step')}; {cure}"])


def _try_recipe(arguments: TrainingArguments) -> None:
    """Build a small optimizer and schedule: transformers and torch check their options only then."""
    Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    options: Any = arguments.lr_scheduler_kwargs
    get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=options)


def _try_engine(arguments: TrainingArguments) -> None:
    """Check settings that DeepSpeed would check only when the engine is built."""
    if arguments.fp16 and not torch.cuda.is_available():
        raise ValueError("fp16 needs a GPU; bf16 does not")
    if not arguments.deepspeed:
        return
    settings = arguments.hf_deepspeed_config
    if settings.get_value("compile.deepcompile"):
        raise ValueError(f"{arguments.deepspeed}: compile.deepcompile: {UNFIT['torch_compile']}")
    if settings.mismatches:
        each = ", ".join(mismatch.removeprefix("- ") for mismatch in settings.mismatches)
        raise ValueError(f'{arguments.deepspeed}: {each} ("auto" there takes the value of train)')
    given = settings.config.get("zero_optimization", {})
    known = {name: value for name, value in given.items() if value != "auto"}
    zero = import_module("deepspeed.runtime.zero.config")  # only now: `prepare_process` sets the device first
    try:
        zero.DeepSpeedZeroConfig(**known)
    except ValidationError as error:
        each = (f"zero_optimization.{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ValueError(f"{arguments.deepspeed}: {', '.join(each)}") from error
