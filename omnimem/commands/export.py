"""Exports a tuned model, as an adapter or merged into its base, with all that streaming needs beside the weights.

python train/export.py --run runs/X --format adapter|merged --out DIR [--checkpoint N]

What was written is loaded again and must answer a short synthetic stream as the run's own weights do; only then it
appears under its name.
"""

import gc
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from omnimem.backbones import load_backbone
from omnimem.cli.export_check import ExportCheck, difference
from omnimem.cli.model_card import CARD, card
from omnimem.cli.parser import Parser
from omnimem.cli.tuned_model import BaseModel, Kind, TunedModel
from omnimem.config.exported import Exported
from omnimem.run import RunError, RunFolder, write_text
from omnimem.tuning import AdapterError, load_adapter

BOUND = 1e-5  # of max(1, largest |logit|): what float32 may differ by
LOST = 0.5  # of what the adapter does to the logits: what merging into fewer bits may lose
SHARD = "5GB"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
COMPANIONS = (  # what tokenizers, feature extractors and processors read, and what must travel with the weights
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
    "spk_dict.pt",
    "LICENSE*",
    "NOTICE*",
)


def main(arguments: Sequence[str]) -> None:
    """Write the export, read it back, compare, and give it its name."""
    given = _parser().parse(arguments)
    require_vacant(given.out)
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # saving a model asks DeepSpeed, which would guess, and say so
    tuned = TunedModel.of(given.run, checkpoint=given.checkpoint, base=given.model, dtype=given.dtype)
    with written_whole(given.out) as folder:
        exported = write(tuned, given.format, folder)
        write_text(folder / CARD, card(exported, given.out.resolve().name, RunFolder(path=given.run)))
    print("verified: " + ", ".join(f"{name} {value:.3g}" for name, value in exported.verified.items()))
    print(f"{given.format}: {given.out}")


@final
@dataclass(frozen=True, kw_only=True)
class CheckedLogits:
    """What the probe heard from a model; logits under the exported policy, with full memory, and of the base alone."""

    slots: int
    kept: Tensor
    whole: Tensor
    untuned: Tensor


def write(tuned: TunedModel, kind: Kind, folder: Path) -> Exported:
    """Fill `folder` with an export that was read back. Raises AdapterError when that is not the same model."""
    exported, heard = _saved(tuned, kind, folder)
    gc.collect()  # the model is in reference cycles, and must go before it is loaded once more
    exported = replace(exported, verified=_read_back(folder, heard))
    exported.write(folder)
    return exported


def _saved(tuned: TunedModel, kind: Kind, folder: Path) -> tuple[Exported, CheckedLogits]:
    """Save weights and all that goes with them; what they should answer."""
    backbone = load_backbone(tuned.run.model)
    base = BaseModel.of(tuned.run.model.path)
    exported = tuned.exported(kind, base)
    probe = ExportCheck(backbone, exported)
    untuned = probe.logits(None)
    adapted = load_adapter(backbone.model, tuned.adapter)
    whole = probe.logits(None)
    if kind == "merged":
        adapted.merge_and_unload(safe_merge=True)
        backbone.model.save_pretrained(folder, max_shard_size=SHARD)
    else:
        for name in ADAPTER_FILES:
            shutil.copyfile(tuned.adapter / name, folder / name)
    _copy_companions(base.folder, folder)
    exported.write(folder)
    return exported, CheckedLogits(slots=probe.slots, kept=probe.logits(probe.slots), whole=whole, untuned=untuned)


def _read_back(folder: Path, heard: CheckedLogits) -> dict[str, float | int]:
    """What the saved model answers, compared."""
    exported = Exported.read(folder)
    backbone = load_backbone(exported.model)
    if exported.origin.kind == "adapter":
        load_adapter(backbone.model, folder)
    probe = ExportCheck(backbone, exported)
    measured = {
        "tokens": probe.tokens,
        "slots_per_layer": heard.slots,
        "difference": difference(heard.whole, probe.logits(None)),
        "difference_evicting": difference(heard.kept, probe.logits(heard.slots)),
        "adapter_effect": difference(heard.whole, heard.untuned),
    }
    _require_same(measured, exported)
    return measured


def _require_same(measured: dict[str, float | int], exported: Exported) -> None:
    """Raise AdapterError unless the logits agree, in units of the largest: exactly but for the rounding of a merge.

    Under the policy, merged weights are compared with themselves: rounding may turn a near tie of two scores.
    """
    whole, evicting, effect = (measured[name] for name in ("difference", "difference_evicting", "adapter_effect"))
    rounded = exported.origin.kind == "merged" and exported.model.dtype != "float32"
    if rounded and whole > LOST * effect:
        raise AdapterError(
            f"merged into {exported.model.dtype}, the adapter is lost: that moves the logits by {whole:.2g}, where the "
            f"adapter moves them by {effect:.2g}; give --dtype float32, or --format adapter"
        )
    if not (evicting <= BOUND and (rounded or whole <= BOUND)):  # so that NaN is a difference
        raise AdapterError(
            f"what was written answers otherwise than the run's weights (by {whole:.2g} with full memory, by "
            f"{evicting:.2g} under the policy; allowed: {BOUND:g}); nothing is kept; check the disk and try again"
        )


def _copy_companions(base: Path, folder: Path) -> None:
    """The base's own files beside the weights; they replace what transformers wrote in their place."""
    for pattern in COMPANIONS:
        for file in base.glob(pattern):
            copy = folder / file.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def require_vacant(out: Path) -> None:
    """Raise RunError when something is there already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already and is not empty; give another --out, or remove it first")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which takes its name when the block ends well and is removed otherwise."""
    out = out.resolve()
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="runs/X", help="the folder of a run")
    parser.add_argument("--format", choices=("adapter", "merged"), required=True, help="what to write")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument("--checkpoint", type=int, metavar="N", help="that of step N (the finished run's adapter)")
    parser.add_argument("--model", metavar="DIR|ID", help="the base, where it lies now (as the run says)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of merged weights (the run's)")
    return parser
