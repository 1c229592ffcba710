"""A run's tuned adapter and its base, described for an export."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, final

from typing_extensions import TypedDict

from omnimem.backbones.files import folder_of
from omnimem.budget import Budget
from omnimem.checksums import SEAL, SHOWN, is_sealed, origin_of, seal_again
from omnimem.cli.parser import warn
from omnimem.config import RunConfig, load
from omnimem.config.exported import HERE, NO_BASE, Exported, Origin
from omnimem.run import RESTORE, RunError, RunFolder, read_json, sha256, step_of
from omnimem.tuning import AdapterError, StreamedModel, load_adapter
from omnimem.tuning.lora import SETTINGS

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
        return self.described(kind, base, base.digest(self.record["sha256"].get("base"), self.adapter))

    def described(self, kind: Kind, base: "BaseModel", digest: str) -> Exported:
        """Content of omnimem.json for a base whose files have this sha256."""
        run, memory = self.run, self.run.memory.written_out()
        if kind == "merged" and memory.selection_from == "base":
            raise AdapterError(f"memory.selection_from = {NO_BASE}; export with --format adapter")
        merged = kind == "merged"
        model = replace(run.model, path=HERE, processor=None) if merged else replace(run.model, path=base.path)
        return Exported(
            model=replace(model, adapter=None),
            stream=run.stream,
            memory=memory,
            budget=self.budget,
            max_new_tokens=run.evaluate.max_new_tokens,
            origin=Origin(
                kind=kind,
                base=base.path,
                base_revision=base.revision,
                base_sha256=digest,
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
        if what := folder.defect(steps[checkpoint]):
            raise RunError(f"{steps[checkpoint]} is damaged: {what}; give another one ({known})")
        return steps[checkpoint], checkpoint
    if not folder.adapter.is_dir():
        raise RunError(
            f"{folder.path} has no adapter yet; let it finish (--resume auto), or give --checkpoint N ({known})"
        )
    return folder.adapter, origin_of(folder.adapter).step or int(record.get("adapter_step", record.get("steps", 0)))


def of_run(adapter: Path, model: str) -> tuple[Exported, Path] | None:
    """Settings, and their file, of the run whose folder holds an adapter or a checkpoint; None outside of one.

    Raises RunError if the checkpoint is damaged or the settings have changed, ConfigError if they cannot be read.
    """
    place = adapter.resolve()
    folder = RunFolder(path=place.parent)
    if place not in (folder.adapter, *folder.checkpoints()) or not folder.record.is_file():
        return None
    tuned = TunedModel.of(folder.path, checkpoint=None if place == folder.adapter else step_of(place))
    base = BaseModel(path=model, folder=Path(model), revision=None)
    return tuned.described("adapter", base, tuned.record["sha256"].get("base") or ""), folder.config


def load_tuned(model: Any, adapter: Path) -> StreamedModel:
    """`load_adapter`, for an adapter that is the one its place says: that of its run, or of the step of its checkpoint.

    Prints a warning if it has no seal to check it by. Raises AdapterError.
    """
    if what := _misplaced(adapter.resolve()):
        raise AdapterError(
            f"{adapter}: {what}; give the folder that it came from, or write it again (omnimem finetune --resume auto)"
        )
    adapted = load_adapter(model, adapter)
    if not is_sealed(adapter):
        warn([f"{adapter}: has no {SEAL}: settings, weights and base cannot be checked against what was saved"])
    return adapted


def _misplaced(adapter: Path) -> str | None:
    """Why an adapter is not the one that its run folder says; None also outside of one."""
    folder = RunFolder(path=adapter.parent)
    steps = {path: step_of(path) for path in folder.checkpoints()}
    if adapter not in (folder.adapter, *steps):
        return None
    if what := folder.foreign(adapter, steps.get(adapter)) or _rescaled(adapter, folder):
        return what
    expected = folder.adapter_sha256 if adapter == folder.adapter else None
    if expected is None:
        return None
    found = sha256(adapter, suffixes=(".safetensors",))
    return None if found == expected else f"sha256 {found[:SHOWN]}, but {folder.record} describes {expected[:SHOWN]}"


def _rescaled(adapter: Path, folder: RunFolder) -> str | None:
    """How an adapter without a seal differs from the config of its run; None also where a file cannot be read."""
    path = adapter / SETTINGS
    if is_sealed(adapter) or not path.is_file() or not folder.config.is_file():
        return None
    found, lora = read_json(path, dict[str, Any], RESTORE), load(folder.config, ["train={}"]).tuning.lora
    usual = {"r": lora.r, "lora_alpha": lora.alpha, "use_rslora": False}
    differing = (f"{name} is {found[name]!r:.60}" for name in usual if found.get(name, usual[name]) != usual[name])
    return next((f"{SETTINGS} {what}, but the run was tuned with {usual}" for what in differing), None)


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
        local, folder = Path(path).is_dir(), folder_of(path).resolve()
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
    seal_again(tuned.adapter)
