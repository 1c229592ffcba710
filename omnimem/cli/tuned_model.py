"""A run's tuned adapter and its base, described for an export."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, final

from transformers.utils import cached_file
from typing_extensions import TypedDict

from omnimem.budget import Budget
from omnimem.checksums import damage
from omnimem.config import RunConfig, load
from omnimem.config.exported import HERE, NO_BASE, Exported, Origin
from omnimem.policies import PerturbationOptions
from omnimem.run import RESTORE, RunError, RunFolder, read_json, sha256
from omnimem.tuning import AdapterError

Kind = Literal["adapter", "merged"]
CheckpointStep = int | Literal["best"]  # best: of the validation


class BestCheckpoint(TypedDict):
    """The checkpoint with the best validation."""

    step: int
    metric: str
    value: float


class FinishedRecord(TypedDict):
    """The keys of run.json that an export needs."""

    sha256: dict[str, str | None]
    steps: NotRequired[int]
    adapter_step: NotRequired[int]  # of the weights in adapter/, where they are not the last ones
    config_sha256: NotRequired[str]
    best_checkpoint: NotRequired[BestCheckpoint]


@final
@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """Settings, budget, adapter and record of a run."""

    run: RunConfig
    record: dict[str, Any]  # run.json
    budget: Budget
    adapter: Path
    step: int

    @classmethod
    def of(
        cls, path: Path, *, checkpoint: CheckpointStep | None = None, base: str | None = None, dtype: str | None = None
    ) -> "TunedModel":
        """The adapter of a run folder or of a checkpoint; `base` and `dtype` replace those of the run.

        Raises RunError if the folder is not a run, or if the adapter or the checkpoint does not exist.
        """
        folder = RunFolder(path=path)
        for file in (folder.record, folder.config, folder.budget):
            if not file.is_file():
                raise RunError(f"{file} is missing; give --run the folder of a run of `omnimem finetune`")
        record = read_json(folder.record, FinishedRecord, RESTORE)
        if record.get("config_sha256", sha256(folder.config)) != sha256(folder.config):
            raise RunError(f"{folder.config}: has changed since the run started; {RESTORE}")
        run = load(folder.config, ["train={}"])  # the files of training may be elsewhere now
        model = replace(run.model, path=base or run.model.path, dtype=dtype or run.model.dtype)
        adapter, step = _adapter_of(folder, record, checkpoint)
        return cls(
            run=replace(run, model=model), record=record, budget=Budget.read(folder.budget), adapter=adapter, step=step
        )

    def exported(self, kind: Kind, base: "BaseModel") -> Exported:
        """Content of omnimem.json.

        Raises AdapterError if the base is not the one that was tuned, or is needed and would be merged.
        """
        run, memory, policy = self.run, self.run.memory, self.run.memory.policy
        if kind == "merged" and memory.selection_from == "base":
            raise AdapterError(f"memory.selection_from = {NO_BASE}; export with --format adapter")
        if isinstance(policy, PerturbationOptions):
            memory = replace(memory, policy=policy.written_out())  # presets may change later
        merged = kind == "merged"
        model = replace(run.model, path=HERE, processor=None) if merged else replace(run.model, path=base.path)
        return Exported(
            model=model,
            stream=run.stream,
            memory=memory,
            budget=self.budget,
            max_new_tokens=run.evaluate.max_new_tokens,
            origin=Origin(
                kind=kind,
                base=base.path,
                base_revision=base.revision,
                base_sha256=base.digest(self.record["sha256"].get("base"), self.adapter),
                adapter_sha256=sha256(self.adapter, suffixes=(".safetensors",)),
                step=self.step,
                run=self.record,
            ),
        )


def _adapter_of(folder: RunFolder, record: dict[str, Any], checkpoint: CheckpointStep | None) -> tuple[Path, int]:
    """The adapter to export, and its number of steps."""
    if checkpoint == "best":
        best = record.get("best_checkpoint")
        if best is None:
            raise RunError(
                f"{folder.record}: the run has no best checkpoint; set data.validation, or give --checkpoint N"
            )
        checkpoint = best["step"]
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.checkpoints()}
    known = f"checkpoints: {', '.join(map(str, steps)) or 'none'}"
    if checkpoint is not None:
        if checkpoint not in steps:
            raise RunError(f"{folder.path} has no checkpoint {checkpoint}; {known}")
        if what := damage(steps[checkpoint]):
            raise RunError(f"{steps[checkpoint]} is damaged: {what}; give another one ({known})")
        return steps[checkpoint], checkpoint
    if not folder.adapter.is_dir():
        raise RunError(
            f"{folder.path} has no adapter yet; let it finish (--resume auto), or give --checkpoint N ({known})"
        )
    return folder.adapter, int(record.get("adapter_step", record.get("steps", 0)))


@final
@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The checkpoint that was tuned, on this machine."""

    path: str  # as a config names it: an absolute folder, or a hub id
    folder: Path  # of its files
    revision: str | None  # commit of the hub

    @classmethod
    def of(cls, path: str) -> "BaseModel":
        """A local folder, or a hub id whose files are in the cache."""
        local = Path(path).is_dir()
        folder = Path(path).resolve() if local else Path(str(cached_file(path, "config.json"))).parent
        return cls(path=str(folder) if local else path, folder=folder, revision=None if local else folder.name)

    def digest(self, expected: str | None, adapter: Path) -> str:
        """sha256 of its safetensors files. Raises AdapterError if another one is expected."""
        found = sha256(self.folder, suffixes=(".safetensors",))
        if expected is not None and expected != found:
            raise AdapterError(
                f"{adapter}: made for another base than {self.path} (sha256 {expected[:12]}, not {found[:12]}); "
                "give the base that it was tuned from with --model"
            )
        return found


def write_adapter_description(run: Path) -> None:
    """Write omnimem.json into a run's own adapter, so that `omnimem ask` uses the memory of the run."""
    tuned = TunedModel.of(run)
    tuned.exported("adapter", BaseModel.of(tuned.run.model.path)).write(tuned.adapter)
