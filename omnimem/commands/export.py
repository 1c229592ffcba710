"""Export a tuned model, as an adapter or merged into its base, with the settings and files that streaming needs.

omnimem export --run runs/X --format adapter|merged --out DIR [--checkpoint N|best] [--names released]

The export is loaded again and must give the same logits on a short synthetic stream as the run's own weights; only then
is it renamed to DIR.
"""

import gc
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from omnimem.aside import written_aside
from omnimem.backbones import load_backbone
from omnimem.backbones.files import weights_digest
from omnimem.checksums import Origin, origin_of, seal
from omnimem.cli.export_check import ExportCheck, difference
from omnimem.cli.model_card import CARD, card
from omnimem.cli.parser import Parser
from omnimem.cli.tuned_model import BaseModel, Kind, TunedModel, load_tuned
from omnimem.config.exported import Exported
from omnimem.run import RunError, RunFolder, write_text
from omnimem.tuning import AdapterError, load_adapter
from omnimem.tuning.lora import name_as_released
from omnimem.tuning.saved_modules import copies

BOUND = 1e-5  # largest allowed difference in float32, relative to max(1, largest |logit|)
LOST = 0.5  # largest allowed error of a merge in low precision, relative to the effect of the adapter on the logits
SHARD = "5GB"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
COMPANIONS = (  # files of tokenizers, feature extractors and processors, and licences
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template.*",
    "additional_chat_templates/*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def main(arguments: Sequence[str]) -> None:
    """Write the export, load it again, compare the logits, and rename the folder to --out."""
    given = _parser().parse(arguments)
    require_vacant(given.out)
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, imported by saving, else prints a warning
    tuned = TunedModel.of(given.run, checkpoint=given.checkpoint, base=given.model, dtype=given.dtype)
    kind = given.format
    if given.names == "released" and kind == "merged":
        raise RunError("--names released is for --format adapter; merged weights always have the names of the release")
    with written_aside(given.out, folder=True) as folder:
        exported = write(tuned, kind, folder, released=given.names == "released")
        write_text(folder / CARD, card(exported, given.out.resolve().name, RunFolder(path=given.run)))
        origin = origin_of(tuned.adapter)
        base = weights_digest(tuned.run.model.path)
        seal(folder, Origin(run=origin.run, step=tuned.step, base=base), kind=kind)
    print("verified: " + ", ".join(f"{name} {value:.3g}" for name, value in exported.verified.items()))
    print(f"{kind}: {given.out}")


def write(tuned: TunedModel, kind: Kind, folder: Path, *, released: bool = False) -> Exported:
    """Write and verify an export in `folder`, an adapter with the names of this version or of the model's release.

    Raises AdapterError if the exported model differs.
    """
    exported, expected = _saved(tuned, kind, folder, released)
    gc.collect()  # the model is in reference cycles, and must be freed before it is loaded again
    exported = replace(exported, verified=_verified(folder, expected))
    exported.write(folder)
    return exported


def _saved(tuned: TunedModel, kind: Kind, folder: Path, released: bool) -> tuple[Exported, dict[str, Tensor]]:
    """Save weights, companion files and omnimem.json; returns the logits of the run's own weights."""
    # 1. logits of the run's own weights
    backbone = load_backbone(tuned.run.model)
    if kind == "merged" and not backbone.mergeable:
        raise AdapterError(
            f"{tuned.run.model.path}: the parts of an assembled base stay in their packages, so it cannot be merged; "
            "give --format adapter"
        )
    if kind == "merged" and tuned.run.model.quantization is not None:
        what = f"model.quantization = {tuned.run.model.quantization}: merging would round the adapter to packed weights"
        raise AdapterError(f"{what}; give --format adapter")
    base = BaseModel.of(tuned.run.model.path)
    exported = tuned.exported(kind, base)
    check = ExportCheck(backbone, exported)
    logits = {"untuned": check.logits(None)}
    adapted = load_tuned(backbone.model, tuned.adapter)
    logits["full"] = check.logits(None)
    # 2. save
    if kind == "merged":
        dtype, modules = backbone.model.dtype, copies(adapted)
        adapted.merge_and_unload(safe_merge=True)
        for module in modules:  # the base's own now, in float32
            module.to(dtype)
        backbone.model.save_pretrained(folder, max_shard_size=SHARD)
    else:
        for name in ADAPTER_FILES:
            shutil.copyfile(tuned.adapter / name, folder / name)
        if released:
            name_as_released(folder, backbone.model)
    _copy_companions(base.folder, folder)
    if kind == "merged" and tuned.run.model.processor is not None:  # of the release, in a folder of its own
        _copy_companions(BaseModel.of(tuned.run.model.processor).folder, folder)
    exported.write(folder)
    return exported, {**logits, "evicting": check.logits(check.slots)}


def _verified(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, float | int]:
    """Differences between the logits of the exported model and the expected ones."""
    exported = Exported.read(folder)
    backbone = load_backbone(exported.model)
    if exported.origin.kind == "adapter":
        load_adapter(backbone.model, folder)
    check = ExportCheck(backbone, exported)
    measured = {
        "tokens": check.tokens,
        "slots_per_layer": check.slots,
        "difference": difference(expected["full"], check.logits(None)),
        "difference_evicting": difference(expected["evicting"], check.logits(check.slots)),
        "adapter_effect": difference(expected["full"], expected["untuned"]),
    }
    _require_same(measured, exported)
    return measured


def _require_same(measured: dict[str, float | int], exported: Exported) -> None:
    """Raises AdapterError unless the logits agree up to the rounding of a merge.

    `evicting` of merged weights compares them with themselves, since rounding can swap two nearly equal scores.
    """
    full, evicting, effect = (measured[name] for name in ("difference", "difference_evicting", "adapter_effect"))
    rounded = exported.origin.kind == "merged" and exported.model.dtype != "float32"
    if rounded and full > LOST * effect:
        raise AdapterError(
            f"merged into {exported.model.dtype}, the adapter is lost: rounding changes the logits by {full:.2g}, the "
            f"adapter by {effect:.2g}; give --dtype float32, or --format adapter"
        )
    if not (evicting <= BOUND and (rounded or full <= BOUND)):  # NaN is refused
        raise AdapterError(
            f"the export differs from the run's weights (by {full:.2g} with full memory, by {evicting:.2g} under the "
            f"policy; allowed: {BOUND:g}); it was removed; check the disk and try again"
        )


def _copy_companions(base: Path, folder: Path) -> None:
    """Copy the other files of the base; they replace those that transformers has written."""
    for pattern in COMPANIONS:
        for file in base.glob(pattern):
            copy = folder / file.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def require_vacant(out: Path) -> None:
    """Raises RunError if `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already and is not empty; give another --out, or remove it first")


def _step(text: str) -> int | Literal["best"]:
    return "best" if text == "best" else int(text)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="runs/X", help="the folder of a run")
    parser.add_argument("--format", choices=("adapter", "merged"), required=True, help="what to write")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--checkpoint",
        type=_step,
        metavar="N|best",
        help="export a checkpoint, `best` of validation (the final adapter)",
    )
    parser.add_argument(
        "--names", choices=("own", "released"), default="own", help="of an adapter's weights (own: of this version)"
    )
    parser.add_argument("--model", metavar="DIR|ID", help="folder of the base, if it was moved (that of the run)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of merged weights (the run's)")
    return parser
