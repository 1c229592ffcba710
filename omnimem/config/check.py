"""Validation of settings against a schema of dataclasses: the object, or one line per problem."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails

from omnimem.config.source import Key, Problem, dotted

WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a word",
    "path_type": "a path",
    "none_required": "null",
    "dict_type": "a section of key: value lines",
    "mapping_type": "a section of key: value lines",
    "dataclass_type": "a section of key: value lines",
    "list_type": "a list",
    "tuple_type": "a list",
    "finite_number": "a finite number",
}
_PACKED = "every stream is read alone, chunk by chunk, so rows are not packed; set train.per_device_train_batch_size"
_COMPILED = "every chunk of a stream has a different shape; remove it"
_LIGER = "it replaces the modules that streams attach to; remove it"
_SHARDED = "use deepspeed: deepspeed/zero3.json partitions the weights too"
_LENGTH = "streams have any length; set stream.chunk_tokens and memory.slots_per_layer"
_IMAGES = "still images are not streamed; make them a video, or remove them"
_SAVED = "set tuning.lora.modules_to_save=[visual_projector, audio_projector] to train projectors; encoders are frozen"
_FOUR = "set model.quantization: 4bit"
UNFIT = {  # settings of other trainers that do not go with a memory of streams, in whatever section they are given
    **dict.fromkeys(("packing", "eval_packing", "neat_packing", "packing_strategy", "padding_free"), _PACKED),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode", "torchdynamo"), _COMPILED),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config", "use_liger", "enable_liger_kernel"), _LIGER),
    **dict.fromkeys(("fsdp", "fsdp_config", "fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params"), _SHARDED),
    **dict.fromkeys(("max_length", "max_seq_length", "cutoff_len", "model_max_length"), _LENGTH),
    **dict.fromkeys(("images", "image_folder", "image_dir"), _IMAGES),
    **dict.fromkeys(("modules_to_save", "additional_target", "freeze_aligner", "train_projectors"), _SAVED),
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "quant_bits", "quant_method"), _FOUR),
}
ELSEWHERE = {  # keys by the names that other trainers, or older versions of transformers, give them
    **dict.fromkeys(("lr", "base_lr", "max_lr", "peak_lr"), "train.learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs", "train_epochs"), "train.num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "total_steps", "max_train_steps", "iters"), "train.max_steps"),
    **dict.fromkeys(("batch_size", "bs", "micro_batch_size", "train_batch_size"), "train.per_device_train_batch_size"),
    **dict.fromkeys(("per_gpu_train_batch_size", "per_device_batch_size"), "train.per_device_train_batch_size"),
    **dict.fromkeys(("grad_accum", "grad_accum_steps", "accumulation_steps"), "train.gradient_accumulation_steps"),
    **dict.fromkeys(("accumulate_grad_batches", "grad_accumulation_steps"), "train.gradient_accumulation_steps"),
    **dict.fromkeys(("grad_clip", "clip_grad", "gradient_clip_val", "gradient_clipping"), "train.max_grad_norm"),
    **dict.fromkeys(("warmup", "num_warmup_steps", "lr_warmup_steps"), "train.warmup_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule"), "train.lr_scheduler_type"),
    **dict.fromkeys(("optimizer", "optim_type"), "train.optim"),
    **dict.fromkeys(("wd", "decay"), "train.weight_decay"),
    **dict.fromkeys(("lora_r", "lora_rank", "rank"), "tuning.lora.r"),
    **dict.fromkeys(("lora_alpha",), "tuning.lora.alpha"),
    **dict.fromkeys(("lora_dropout",), "tuning.lora.dropout"),
    **dict.fromkeys(("target_modules", "lora_target", "lora_target_modules", "lora_modules"), "tuning.lora.targets"),
    **dict.fromkeys(("model_name_or_path", "model_name", "model_id", "model_path", "base_model"), "model.path"),
    **dict.fromkeys(("torch_dtype", "precision", "mixed_precision"), "model.dtype"),
    **dict.fromkeys(("dataset", "datasets", "data_path", "dataset_path", "train_file", "train_data"), "data.train"),
    **dict.fromkeys(("validation_file", "val_file", "val_dataset", "eval_dataset", "val_size"), "data.validation"),
}
LISTED = 30  # words in an error message
LITERALS = ("literal_error", "enum")
FORMS = ("tuple_type", "list_type", "dataclass_type", "dict_type", "string_type")


Schema = TypeVar("Schema")
Sections = Mapping[Key, Sequence[str]]  # the valid keys of each section

strict = with_config(ConfigDict(extra="forbid", strict=True))  # unknown keys are refused; "8192" is not a number


def validated(
    schema: type[Schema], data: Any, *, at: Key = (), others: Sections | None = None
) -> tuple[Schema | None, list[Problem]]:
    """`data` as `schema`, a dataclass marked `strict`, or None and all problems.

    `at` is the key of the data; `others` are sections that a misplaced key may belong to.
    """
    try:
        return TypeAdapter(schema).validate_json(json.dumps(data, default=str)), []
    except ValidationError as error:
        grouped: dict[Key, list[ErrorDetails]] = {}
        for details in error.errors(include_url=False):
            grouped.setdefault((*at, *_key(details, data)), []).append(details)
    grouped = {key: found for key, found in grouped.items() if not _chose_another(key, found, grouped)}
    known = {**sections(schema, data, at), **(others or {})}
    return None, [(key, _what(key, found, known)) for key, found in grouped.items()]


def _chose_another(key: Key, found: Sequence[ErrorDetails], all_keys: Collection[Key]) -> bool:
    """Whether the errors only reject the form of a value (list or section) that has errors of its own inside."""
    inside = any(len(other) > len(key) and other[: len(key)] == key for other in all_keys)
    return inside and all(details["type"] in (*FORMS, *LITERALS) for details in found)


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean 'x'?`, or all known words if no one is similar."""
    near = _near(name, known)
    listed = f"known: {', '.join(known)}" if len(known) <= LISTED else "omnimem explain lists what there is"
    return f"did you mean {near!r}?" if near else listed


def _near(name: str, known: Sequence[str]) -> str | None:
    """The known word that is spelled like `name`, or contains it."""
    similar = get_close_matches(name, known, n=1, cutoff=0.6)
    containing = [word for word in known if len(name) > 2 and name in word]
    return next(iter([*similar, *containing]), None)


def sections(schema: Any, data: Any, at: Key = ()) -> dict[Key, tuple[str, ...]]:
    """The valid keys of each section; of sections chosen by `name`, those of the one that `data` chose."""
    # 1. a list: the sections of its items
    kinds = [kind for kind in alternatives(schema) if is_dataclass(kind)]
    if isinstance(data, list):
        items = [sections(schema, item, (*at, index)) for index, item in enumerate(data)]
        return {key: known for item in items for key, known in item.items()}
    if not kinds:
        return {}
    # 2. a section and the sections in it
    chosen = data if isinstance(data, dict) else {}
    kind = next((kind for kind in kinds if chosen.get("name") in choices_of(kind)), kinds[0])
    hints = get_type_hints(kind, include_extras=True)
    found = {at: names(kind)}
    for name in found[at]:
        found |= sections(hints[name], chosen.get(name), (*at, name))
    return found


def names(kind: Any) -> tuple[str, ...]:
    """The keys of a section, without those that exist only to be refused with a message."""
    return tuple(field.name for field in fields(kind) if field.init and "refused" not in field.metadata)


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of `name` that choose this section."""
    hint = get_type_hints(kind).get("name")
    return get_args(hint) if get_origin(hint) is Literal else ()


def alternatives(hint: Any) -> list[Any]:
    """The types of a hint: members of a union, items of a list."""
    origin = get_origin(hint)
    if origin is Annotated:
        return alternatives(get_args(hint)[0])
    if origin in (Union, UnionType, tuple, list):
        return [kind for argument in get_args(hint) for kind in alternatives(argument)]
    return [hint]


def _key(details: ErrorDetails, data: Any) -> Key:
    """The user's key for an error: pydantic's location without the names of union branches."""
    # 1. the parts that the data has
    key: list[str | int] = []
    for part in details["loc"]:
        inner: Any = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(inner, dict) and part in inner:
            data = inner[part]
            key.append(part)
    # 2. the last part
    match details["type"]:
        case "missing":
            key.append(details["loc"][-1])
        case "union_tag_invalid" | "union_tag_not_found":
            key.append("name")
        case "value_error":  # of a section: the first of its keys in the message
            words = re.findall(r"\w+", details["msg"])
            key += [word for word in words if isinstance(data, dict) and word in data][:1]
    return tuple(key)


def _what(key: Key, found: Sequence[ErrorDetails], known: Sections) -> str:
    """What is wrong with one key, and the cure."""
    details, context = found[0], found[0].get("ctx", {})
    match details["type"]:
        case "missing" | "union_tag_not_found":
            return f"missing; add it, or give {dotted(key)}=... on the command line"
        case "unexpected_keyword_argument":
            return UNFIT.get(str(key[-1])) or f"unknown key; {_known(key, known)}"
        case "union_tag_invalid":
            tags = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
            return f"{context['tag']!r} is unknown; {nearest(context['tag'], tags)}"
        case "value_error":
            return str(context["error"])
    literals = [each["ctx"]["expected"] for each in found if "ctx" in each and each["type"] in LITERALS]
    expected = list(dict.fromkeys(_expected(each) for each in found))
    given, text = details["input"], repr(details["input"])
    got = "nothing" if given is None else text if len(text) <= 60 else f"{text[:57]}..."
    line = f"expected {' or '.join(expected)}, got {got}"
    if isinstance(given, str) and "name" in known.get(key, ()):
        return f"{line}; write {{name: {given}}}"
    choices = [word.strip("'") for text in literals for word in text.replace(" or ", ", ").split(", ")]
    return f"{line}; {nearest(given, choices)}" if choices and isinstance(given, str) else line


def _known(key: Key, known: Sections) -> str:
    """What other tools' name of a key is here, the nearest valid name in the same section, or all names there."""
    name, inside = str(key[-1]), known.get(key[:-1], ())
    if where := ELSEWHERE.get(name):
        return f"did you mean {where!r}?"
    return nearest(name, inside)


def _expected(details: ErrorDetails) -> str:
    if details["type"] in LITERALS:
        return details.get("ctx", {})["expected"]
    return WORDS.get(details["type"]) or details["msg"].removeprefix("Input should be ")
