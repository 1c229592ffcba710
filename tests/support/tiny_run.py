"""A run of seconds: a random thinker of two layers, six videos of eight seconds; its results."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import av
import torch
from safetensors.torch import load_file
from torch import Tensor

from omnimem.recall.renderer import write_mp4
from omnimem.recall.worlds import draw_world
from support.ranks import Ended, command
from support.thinkers import write_folder

SCRIPT = "train/finetune.py"
TIMED = ("seconds_per_chunk", "speed", "memory")  # differ between two runs
ANSWERS = ("red", "blue and green", "a long dark yellow")
CONFIG = """\
name: {name}
model: {{path: model}}
stream: {{chunk_tokens: 36, max_pixels: 12544}}
memory: {{slots_per_layer: 8, budget: {{name: split, visual_audio_ratio: 2}}}}
tuning:
  lora: {{r: 4, alpha: 8, dropout: 0.2, targets: [q_proj, v_proj, up_proj]}}
  budgets: [8, 4, full]
data: {{train: train.jsonl}}
train: {{max_steps: 10, save_steps: 5, learning_rate: 1e-2, per_device_train_batch_size: 1, dataloader_num_workers: 0}}
evaluate: {{after_training: false}}
"""


def write_videos(place: Path) -> Path:
    write_folder(place / "model", rates="tiny")
    rows = []
    for number in range(6):
        write_mp4(draw_world(number, 8), place / f"{number}.mp4")
        messages = []
        for question in range(1 + number % 3):
            messages.append({"role": "user", "content": f"what is {question} ?", "at": 5 if question == 1 else None})
            messages.append({"role": "assistant", "content": ANSWERS[(number + question) % 3]})
        rows.append({"id": f"film{number}", "video": f"{number}.mp4", "messages": messages})
    write_manifest(place / "train.jsonl", rows)
    (place / "broken.mp4").write_bytes(b"no video")
    silence(place / "0.mp4", place / "silent.mp4")
    for name in ("broken", "silent"):
        write_manifest(place / f"{name}.jsonl", [*rows[1:], {**rows[0], "id": name, "video": f"{name}.mp4"}])
    return place


def silence(source: Path, target: Path) -> None:
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        frames = read.streams.video[0]
        copied = write.add_stream_from_template(frames)
        for packet in read.demux(frames):
            if packet.dts is not None:
                packet.stream = copied
                write.mux(packet)


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@final
@dataclass(frozen=True, kw_only=True)
class Run:
    path: Path
    ended: Ended

    @property
    def logged(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl without times."""
        return [{name: value for name, value in line.items() if name not in TIMED} for line in self.logged]

    @property
    def losses(self) -> Tensor:
        return torch.tensor([line["loss"] for line in self.lines], dtype=torch.float64)

    @property
    def adapter(self) -> Tensor:
        tensors = load_file(self.path / "adapter" / "adapter_model.safetensors")
        return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.path / "run.json").read_text())


def tune(folder: Path, name: str, *arguments: str, ranks: int = 0) -> Run:
    """A run by plain `python`, or by so many ranks."""
    return Run(path=folder / "runs" / name, ended=command(SCRIPT, given(folder, name, *arguments), folder, ranks=ranks))


def given(folder: Path, name: str, *arguments: str) -> list[str]:
    (folder / f"{name}.yaml").write_text(CONFIG.format(name=name))
    return ["--config", f"{name}.yaml", *arguments]
