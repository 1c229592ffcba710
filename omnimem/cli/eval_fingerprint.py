"""The settings of an arm's results, stored beside them: results of different settings are never mixed."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from omnimem.config import RunConfig
from omnimem.evaluation import Arm, EvaluationError
from omnimem.run import RunFolder, provenance, sha256, write_text
from omnimem.textfile import StoredFileError, read_stored
from omnimem.tuning.lora import SETTINGS

FILE = "setting.json"
ASIDE = "eval_earlier"


class Setting(TypedDict):
    """The key of setting.json whose values are merged."""

    benchmarks: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class EvalFingerprint:
    """The settings that determine the results of one evaluation."""

    run: RunConfig
    folder: RunFolder
    adapter: Path

    def prepare(self, arms: Iterable[tuple[Arm, bool]], *, leading: bool) -> None:
        """Write the settings of each arm (True: with the adapter).

        The leading process moves results of other settings to `eval_earlier/`; others raise EvaluationError.
        """
        for arm, tuned in arms:
            target, setting = self.folder.evaluation(arm.name), self._of(arm, tuned=tuned)
            differing = list(_differences(target, setting))
            if differing and not leading:
                raise EvaluationError(
                    f"{target}: made with another {', '.join(differing)}; start the command without --shard once, "
                    "which moves them away, or give the run another name"
                )
            if differing:
                aside = _free(self.folder.path / ASIDE / arm.name)
                aside.parent.mkdir(exist_ok=True)
                target.rename(aside)
                print(f"{arm.name}: made with another {', '.join(differing)}; moved to {aside}", flush=True)
            known = _read(target)
            setting["benchmarks"] = {**known.get("benchmarks", {}), **setting["benchmarks"]}
            write_text(target / FILE, json.dumps(setting, indent=1) + "\n")

    def provenance(self, *, tuned: bool) -> dict[str, Any]:
        """Provenance of an arm for summary.json."""
        run, digests = self.run, {"base": self._base, "adapter": self._adapter if tuned else None}
        for label, facts in self._benchmarks.items():
            digests |= {f"{label}/{name}": digest for name, digest in facts["annotations"].items()}
        return {
            **provenance(command=sys.argv, seed=0, sha256=digests),
            "model": run.model.path,
            "policy": run.memory.policy.name,
            "slots_per_layer": run.memory.slots_per_layer,
            "selection_from": run.memory.selection_from if tuned else "tuned",
            "reading": {
                "fps": run.stream.fps,
                "max_pixels": run.stream.max_pixels,
                "min_pixels": run.stream.min_pixels,
            },
            "generation": {"greedy": True, "max_new_tokens": run.evaluate.max_new_tokens},
        }

    def _of(self, arm: Arm, *, tuned: bool) -> dict[str, Any]:
        """Everything that answers may depend on, as JSON returns it."""
        run, whole = self.run, arm.policy.budget is None
        memory, model = asdict(run.memory), _given(run.model, "processor")
        model.pop("adapter")  # where training started
        selection_from = memory.pop("selection_from")  # the same for all arms that have no adapter or evict nothing
        memory["policy"].pop("query_stride", None)  # a key of its own, which results without the option match
        stride = arm.policy.measures.query_stride
        setting = {
            "model": {**model, "sha256": self._base},
            "adapter": self._adapter if tuned else None,
            "adapter_scale": self._scale if tuned else None,
            "stream": {**_given(run.stream, "timestamps"), "tracks": arm.tracks},
            "memory": None if whole else {**memory, "sha256": sha256(self.folder.budget)},
            "policy": None if whole else repr(replace(arm.policy, budget=None)),  # with the values of its preset
            "selection_from": "base" if tuned and not whole and selection_from == "base" else None,  # None: tuned
            "query_stride": None if whole or stride == 1 else stride,
            "max_new_tokens": run.evaluate.max_new_tokens,
            "benchmarks": self._benchmarks,
        }
        return json.loads(json.dumps(setting, default=str))

    @cached_property
    def _base(self) -> str | None:
        base = Path(self.run.model.path)
        return sha256(base, suffixes=(".safetensors",)) if base.is_dir() else None

    @cached_property
    def _adapter(self) -> str | None:
        return sha256(self.adapter, suffixes=(".safetensors",)) if self.adapter.is_dir() else None

    @cached_property
    def _scale(self) -> dict[str, Any]:
        """The settings in adapter_config.json that scale the weights."""
        path = self.adapter / SETTINGS
        table = read_stored(path, dict[str, Any], "copy it again, or export it again") if path.is_file() else {}
        return {name: table.get(name) for name in ("r", "lora_alpha", "use_rslora", "use_dora")}

    @cached_property
    def _benchmarks(self) -> dict[str, dict[str, Any]]:
        return {
            benchmark.label: {
                "rules": benchmark.rules,
                "annotations": {file.name: sha256(file) for file in benchmark.annotations},
            }
            for benchmark in self.run.evaluate.benchmarks
        }


def _given(options: Any, *later: str) -> dict[str, Any]:
    """The settings; those that a `later` version added only where they are set, so that older results stay valid."""
    return {name: value for name, value in asdict(options).items() if value is not None or name not in later}


def _differences(target: Path, setting: Mapping[str, Any]) -> Iterator[str]:
    """Names of the settings in which the results of a folder differ."""
    if not any(target.glob("*.jsonl")) and not any(target.glob("parts/*.jsonl")):
        return
    known = _read(target)
    if not known:
        yield "version of this program"
        return
    for key, value in setting.items():
        if key == "benchmarks":
            yield from (label for label in value if known[key].get(label, value[label]) != value[label])
        elif known.get(key) != value:
            yield key


def _read(target: Path) -> dict[str, Any]:
    """The settings beside the results; empty without the file, or if it is damaged."""
    path = target / FILE
    if not path.exists():
        return {}
    try:
        return read_stored(path, Setting, "these results count as made with other settings")
    except StoredFileError as error:
        print(error, file=sys.stderr, flush=True)
        return {}


def _free(path: Path) -> Path:
    """path.1, path.2 ...: the first free name."""
    number = 1
    while (free := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return free
