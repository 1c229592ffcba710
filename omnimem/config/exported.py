"""omnimem.json: what a folder of weights says of itself, so that it is streamed with the same memory elsewhere."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from omnimem.backbones import ModelOptions
from omnimem.budget import AudioVisualBudget, Budget
from omnimem.config import MemoryOptions
from omnimem.config.check import strict, validated
from omnimem.config.source import ConfigError, dotted
from omnimem.policies.base import Policy
from omnimem.run import write_text
from omnimem.streaming.options import StreamOptions

FILE = "omnimem.json"
HERE = "."  # model.path of weights that lie beside the file

Policies = Callable[[int | None], Policy]


@final
@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which weights these are."""

    kind: Literal["adapter", "merged"]
    base: str  # a local folder or a hub id
    base_revision: str | None  # commit of the hub
    base_sha256: str  # of its safetensors files (`omnimem.run.sha256`)
    adapter_sha256: str
    step: int  # optimizer steps that were taken
    run: dict[str, Any]  # run.json


@strict
@final
@dataclass(frozen=True, kw_only=True)
class Exported:
    """A tuned model as it left its run: how it reads a stream, what it remembers, and where it came from."""

    format: Literal["omnimem export 1"] = "omnimem export 1"
    model: ModelOptions
    stream: StreamOptions
    memory: MemoryOptions
    budget: Annotated[Budget, PlainValidator(Budget.of), PlainSerializer(Budget.json)]
    max_new_tokens: int
    origin: Origin
    verified: dict[str, float | int] = field(default_factory=dict)  # what was measured when it was written

    @property
    def policies(self) -> Policies:
        """The policy at a number of slots per layer; None: full memory."""
        return policies_of(self.memory, self.budget)

    @property
    def policy(self) -> Policy:
        """The policy at the slots that the model was tuned for."""
        return self.policies(self.memory.slots_per_layer)

    @classmethod
    def read(cls, folder: Path | str) -> "Exported":
        """What the omnimem.json of a folder says; ConfigError when it is missing or wrong."""
        path = Path(folder) / FILE
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError([f"{path}: cannot be read ({error}); make it with train/export.py"]) from error
        exported, problems = validated(cls, table)
        if exported is None:
            raise ConfigError([f"{path} {dotted(key)}: {what}" for key, what in problems])
        beside = exported.model.path == HERE
        return replace(exported, model=replace(exported.model, path=str(folder))) if beside else exported

    def write(self, folder: Path) -> None:
        """Write omnimem.json."""
        table = TypeAdapter(Exported).dump_python(self, mode="json")
        write_text(folder / FILE, json.dumps(table, indent=1) + "\n")


def policies_of(memory: MemoryOptions, budget: Budget) -> Policies:
    """The policy of `memory` at any number of slots per layer; None: full memory.

    The slots of `budget` are used as they stand; another size is apportioned from the same signals or shares.
    """
    return partial(_policy, memory, budget)


def _policy(memory: MemoryOptions, budget: Budget, slots: int | None) -> Policy:
    if slots is None:
        return memory.policy.build(None)
    return memory.policy.build(budget if slots == memory.slots_per_layer else resized(memory, budget, slots))


def resized(memory: MemoryOptions, budget: Budget, slots: int) -> Budget:
    """The same allocation at another number of slots per layer; no file is read."""
    wanted = memory.budget
    if not isinstance(wanted, AudioVisualBudget):
        return wanted.build(budget.layers, slots)
    if budget.signals is None and budget.shares is not None:
        return replace(budget, slots=budget.shares.slots(slots))
    return replace(wanted, table="calibrate").build(budget.layers, slots, budget.signals)
