"""The wheel alone, in an empty folder: one package, its files, the commands and the demo."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.slow
PUBLIC = """
import omnimem, sys
assert "torch" not in sys.modules
assert not [name for name in sys.modules if name.startswith("omnimem.")]
import omnimem.commands.demo, omnimem.commands.synthesize
assert "torch" not in sys.modules, "a command without a model starts at once"
assert [name for name in omnimem.__all__ if getattr(omnimem, name) is None] == []
backbone = omnimem.load_backbone(omnimem.ModelOptions(path="models/tiny"))
print(omnimem.__file__, omnimem.policy("snapkv", window=16).name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout, without network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), ROOT]
    subprocess.run(command, check=True)
    return next(out.glob("omnimem-*.whl"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and, behind it, all packages that are installed here."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(place), "platbase": str(place)}))
    unpacked = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", packages, wheel]
    subprocess.run(unpacked, check=True)
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return packages


def run(packages: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = next(packages.parents[2].glob("bin/python"))
    return subprocess.run([python, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_one_package_with_its_files(programs) -> None:
    top = {path.name for path in programs.iterdir() if path.suffix not in (".dist-info", ".pth")}
    assert top - {"bin"} == {"omnimem"}
    for name in ("py.typed", "configs/tiny.yaml", "configs/models/tiny/model.safetensors", "comparison/report.html"):
        assert (programs / "omnimem" / name).is_file()
    entry = next(iter(importlib.metadata.Distribution.discover(name="omnimem", path=[str(programs)]))).entry_points
    assert [(each.name, each.value) for each in entry] == [("omnimem", "omnimem.__main__:main")]


def test_the_public_names_are_there_and_importing_is_free(programs, tmp_path) -> None:
    ended = run(programs, tmp_path, "-c", PUBLIC)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [str(programs / "omnimem" / "__init__.py"), "snapkv"]


def test_the_commands_run_in_an_empty_folder(programs, tmp_path) -> None:
    program = str(programs / "bin" / "omnimem")
    listed = run(programs, tmp_path, program, "--help")
    assert (listed.returncode, "finetune" in listed.stdout) == (0, True)
    shown = run(programs, tmp_path, program, "finetune", "--config", "tiny.yaml", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_quick_demo_comes_to_a_report(programs, tmp_path) -> None:
    ended = run(programs, tmp_path, str(programs / "bin" / "omnimem"), "demo", "--quick", "--out", "demo")
    assert ended.returncode == 0, ended.stderr
    report = ended.stdout.splitlines()[-1].removeprefix("report: ")
    assert Path(report) == tmp_path / "demo" / "runs" / "tiny_quick" / "compare" / "report.html"
    assert Path(report).is_file()


def test_a_missing_extra_is_one_line(programs, tmp_path) -> None:
    (tmp_path / "tensorboard.py").write_text("raise ModuleNotFoundError('no', name='tensorboard')\n")
    hidden = "import sys; sys.path.insert(0, ''); sys.argv[0] = 'omnimem'; from omnimem.__main__ import main; main()"
    ended = run(programs, tmp_path, "-c", hidden, "finetune", "--config", "tiny.yaml")
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["tensorboard is not installed; pip install 'omnimem[train]'"]
