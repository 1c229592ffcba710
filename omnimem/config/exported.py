"""omnimem.json: the settings that stream a folder of weights with the same memory elsewhere."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from omnimem.backbones import ModelOptions
from omnimem.budget import Budget, ReleasedBudget, SharedBudget, SplitBudget, scaled
from omnimem.checksums import SEAL, damage, is_sealed
from omnimem.config import MemoryOptions, changed, untuned
from omnimem.config.check import strict, validated
from omnimem.config.source import ConfigError, dotted
from omnimem.policies.base import Policy
from omnimem.run import RunFolder, write_text
from omnimem.streaming.options import StreamOptions
from omnimem.textfile import StoredFileError, read_stored

FILE = "omnimem.json"
HERE = "."  # model.path of weights in the folder of the file
NO_BASE = "base needs the model without its adapter, which merged weights no longer hold"

Policies = Callable[[int | None], Policy]


@final
@dataclass(frozen=True, kw_only=True)
class Origin:
    """Origin of the weights."""

    kind: Literal["adapter", "merged"]
    base: str  # a local folder or a hub id
    base_revision: str | None  # commit of the hub
    base_sha256: str  # of its safetensors files (`omnimem.run.sha256`)
    adapter_sha256: str
    step: int  # optimizer steps
    run: dict[str, Any]  # run.json


@strict
@final
@dataclass(frozen=True, kw_only=True)
class Exported:
    """A tuned model: model, stream and memory options, budget, and origin of the weights."""

    format: Literal["omnimem export 5"] = "omnimem export 5"
    model: ModelOptions
    stream: StreamOptions
    memory: MemoryOptions
    budget: Annotated[Budget, PlainValidator(Budget.of), PlainSerializer(Budget.json)]
    max_new_tokens: int
    origin: Origin
    verified: dict[str, float | int] = field(default_factory=dict)  # differences measured by the export

    @property
    def policies(self) -> Policies:
        """Policy by number of slots per layer; None: full memory."""
        return policies_of(self.memory, self.budget)

    @property
    def policy(self) -> Policy:
        """The policy at the tuned number of slots."""
        return self.policies(self.memory.slots_per_layer)

    @classmethod
    def read(cls, folder: Path | str) -> "Exported":
        """The omnimem.json of a folder; raises ConfigError if it is missing, wrong or not as it was sealed."""
        path = Path(folder) / FILE
        if is_sealed(Path(folder)) and (what := damage(Path(folder), (FILE,), listed=False)):
            cure = f"restore it or export again; without {SEAL} the folder is not checked"
            raise ConfigError([f"{folder}: {what}; {cure}"])
        try:
            table = read_stored(path, dict[str, Any], "make it again with `omnimem export`")
        except StoredFileError as error:
            raise ConfigError([str(error)]) from error
        exported, problems = validated(cls, _current(table))
        if exported is None:
            raise ConfigError([f"{path} {dotted(key)}: {what}" for key, what in problems])
        if exported.memory.selection_from == "base" and exported.origin.kind == "merged":
            raise ConfigError([f"{path} memory.selection_from: {NO_BASE}; set it to tuned"])
        beside = exported.model.path == HERE
        return replace(exported, model=replace(exported.model, path=str(folder))) if beside else exported

    def write(self, folder: Path) -> None:
        """Write omnimem.json."""
        table = TypeAdapter(Exported).dump_python(self, mode="json")
        write_text(folder / FILE, json.dumps(table, indent=1) + "\n")


def _current(table: dict[str, Any]) -> dict[str, Any]:
    """The table of a file as it is written today.

    In format 1, coverage discounted every token; before format 3 it compared layer inputs, in format 3 sketches of 16
    bits. Before format 5, attention was measured from all queries.
    """
    queries = {"query_stride": 1}
    bits = {"sketch_bits": 16, **queries}
    inputs = {"compared": "inputs", **bits}
    rules = {
        "omnimem export 1": {"coverage_above": -1.0, **inputs},
        "omnimem export 2": inputs,
        "omnimem export 3": bits,
        "omnimem export 4": queries,
    }
    if (rule := rules.get(table.get("format", ""))) is None:
        return table
    table = {**table, "format": "omnimem export 5"}
    match table:
        case {"memory": {"policy": {"name": "omnimem" | "paper" | "released"} as policy} as memory}:
            return {**table, "memory": {**memory, "policy": {**policy, **rule}}}
    return table


def is_recorded(folder: Path) -> bool:
    """Whether a folder has an omnimem.json, of whatever kind, or was sealed with one: `Exported.read` names faults."""
    return os.path.lexists(folder / FILE) or (is_sealed(folder) and damage(folder, (FILE,), listed=False) is not None)


def not_tuned_at(memory: MemoryOptions | None, stream: StreamOptions, adapter: Path) -> list[str]:
    """A line for each setting of memory (None: full) and stream at which an adapter was not tuned.

    Its own are those of its run beside it, or of its omnimem.json; without both a line says that they are unknown.
    """
    place = adapter.resolve()
    if (training := RunFolder(path=place.parent).config).is_file():
        return untuned(memory, stream, training)
    if is_recorded(place):
        exported = Exported.read(place)
        return changed((exported.memory, exported.stream), (memory, stream))
    return [
        f"{adapter}: has no {FILE}, and no config.yaml of a run beside it; the settings it was tuned at are unknown"
    ]


def policies_of(memory: MemoryOptions, budget: Budget) -> Policies:
    """The policy of `memory` at any number of slots per layer; None: full memory.

    `budget` is used for its own number of slots; other numbers are allocated from the same signals or shares.
    """

    def policy(slots: int | None) -> Policy:
        built = memory.policy.build(None if slots is None else _resized(memory, budget, slots))
        return replace(built, selection_from=memory.selection_from)

    return policy


def _resized(memory: MemoryOptions, budget: Budget, slots: int) -> Budget:
    """The same allocation at another number of slots per layer; no file is read."""
    wanted = memory.budget
    if slots == memory.slots_per_layer:
        return budget
    if isinstance(wanted, SharedBudget | SplitBudget):
        return wanted.build(budget.layers, slots)
    if isinstance(wanted, ReleasedBudget) or budget.signals is None:
        return scaled(budget, slots)
    return replace(wanted, table="calibrate").build(budget.layers, slots, budget.signals)
