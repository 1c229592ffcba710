"""Results: facts, checks and measurements, written as they come so that nothing is lost."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

import torch

from benchmarks.accelerator.clock import GIB
from benchmarks.accelerator.targets import Rows, Target
from benchmarks.tables import markdown
from omnimem.run import provenance, write_json, write_text

PACKAGES = ("triton", "jaxtyping", "nvidia-cudnn-cu13")


@final
@dataclass(frozen=True, kw_only=True)
class Check:
    """A number that must not exceed its bound; reported only if there is no bound."""

    name: str
    dtype: str
    found: float
    bound: float | None

    @property
    def ok(self) -> bool:
        """False for NaN."""
        return self.bound is None or self.found <= self.bound


@final
class Record:
    """Grows result by result; `gpu.json` and `gpu.md` always hold all results so far."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], targets: Sequence[Target]) -> None:
        self.folder, self.facts, self.targets = folder, facts, targets
        self.checks: list[Check] = []
        self.rows: list[dict[str, Any]] = []
        self.sections: dict[str, dict[str, Any]] = {}

    def check(self, name: str, dtype: torch.dtype, found: float, bound: float | None) -> None:
        """Note a comparison."""
        self.checks.append(Check(name=name, dtype=str(dtype).removeprefix("torch."), found=found, bound=bound))
        self.write()

    def measured(self, section: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Note measurements, one row per arm."""
        self.rows += [{"section": section, "arm": arm, **row} for arm, row in rows.items()]
        self.write()

    def ended(self, name: str, state: Mapping[str, Any]) -> None:
        """Note the state of a section."""
        self.sections[name] = dict(state)
        print(f"{name}: {state['state']}, {state.get('error') or state['seconds']}".splitlines()[0], flush=True)
        self.write()

    @property
    def ok(self) -> bool:
        """Whether all sections, checks and arms succeeded; out of memory is a result."""
        ran = all("error" not in row or row["out_of_memory"] for row in self.rows)
        done = all(section["state"] == "done" for section in self.sections.values())
        return ran and done and all(check.ok for check in self.checks)

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """The targets, what was measured of them, and whether they are met."""
        rows: Rows = {(row["section"], row["arm"]): row for row in self.rows}
        return [target.verdict(rows) for target in self.targets]

    def write(self) -> None:
        """gpu.json and gpu.md."""
        checks = [{**asdict(check), "ok": check.ok} for check in self.checks]
        whole = {"ok": self.ok, "facts": dict(self.facts), "targets": self.verdicts, "sections": self.sections}
        write_json(self.folder / "gpu.json", {**whole, "checks": checks, "rows": self.rows})
        write_text(self.folder / "gpu.md", self.table())

    def table(self) -> str:
        """Everything on one page."""
        lines = [f"# {self.facts['device']}, torch {self.facts['packages'].get('torch')}", ""]
        aims = [[aim["target"], *map(_shown, (aim["bound"], aim["found"])), aim["verdict"]] for aim in self.verdicts]
        lines += [self.facts["targets of"], "", markdown(["target", "at most", "measured", ""], aims), ""]
        for name, section in self.sections.items():
            reason = (
                f": {(section['error'] or ' ').splitlines()[0]}" if "error" in section else f", {section['seconds']} s"
            )
            lines.append(f"- {name}: {section['state']}{reason}")
        checks = []
        for check in self.checks:
            bound = "" if check.bound is None else f"{check.bound:.1e}"
            verdict = "FAILED" if not check.ok else "" if check.bound is None else "ok"
            checks.append([check.name, check.dtype, f"{check.found:.2e}", bound, verdict])
        lines += ["", markdown(["check", "dtype", "found", "bound", ""], checks), ""]
        titles = ["section", "arm", "median ms", "transient GiB", "peak GiB", ""]
        return "\n".join([*lines, markdown(titles, map(_row, self.rows)), ""])


def _row(row: Mapping[str, Any]) -> list[str]:
    digits = {"median_ms": 3, "transient_gib": 2, "peak_gib": 2}
    shown = ("section", "arm", "fastest_ms", "slowest_ms", "repeats", *digits)
    rest = ", ".join(f"{key} {_number(value, 3)}" for key, value in row.items() if key not in shown)
    return [row["section"], row["arm"], *(_number(row.get(key), places) for key, places in digits.items()), rest]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _number(value: object, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def facts_of(device: torch.device, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hardware, versions and settings."""
    found = provenance(command=["benchmarks/gpu.sh"], seed=0, sha256={})
    packages = {**found["packages"], **{name: at for name in PACKAGES if (at := _version(name))}}
    return {**found, "packages": packages, "settings": dict(settings), **_hardware(device)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    common = {"threads": torch.get_num_threads(), "float32_matmul": torch.get_float32_matmul_precision()}
    if device.type != "cuda":
        return {"device": f"{device.type} ({platform.machine()})", **common}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **common,
    }
