"""The files that Qwen2.5-Omni is published with, under each of their names: all give the same model, none runs code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import families
from support.planted import Command
from support.thinkers import write_folder

from omnimem.backbones import ModelOptions, load_backbone
from omnimem.backbones.qwen2_5_omni import PREPROCESSED, CheckpointError, Qwen25Omni
from omnimem.errors import UserError

Change = Callable[[Path], object]
AUDIO = ("feature_size", "hop_length", "n_fft", "sampling_rate")


def load(folder: Path) -> Qwen25Omni:
    return Qwen25Omni.load(ModelOptions(path=str(folder)))


def table(path: Path) -> dict[str, object]:
    return json.loads(path.read_text())


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def template_json(folder: Path) -> None:
    """As Qwen/Qwen2.5-Omni-7B: chat_template.json alone."""
    jinja = folder / "chat_template.jinja"
    write(folder / "chat_template.json", {"chat_template": jinja.read_text()})
    jinja.unlink()


def template_in_tokenizer(folder: Path) -> None:
    jinja, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    write(settings, {**table(settings), "chat_template": jinja.read_text()})
    jinja.unlink()


def template_of_text_in_tokenizer(folder: Path) -> None:
    """The template of the processor replaces one that knows only text."""
    template_in_tokenizer(folder)
    settings = folder / "tokenizer_config.json"
    write(folder / "chat_template.json", {"chat_template": table(settings)["chat_template"]})
    write(settings, {**table(settings), "chat_template": "{{ messages[0]['content'] }}"})


def template_in_processor(folder: Path) -> None:
    jinja = folder / "chat_template.jinja"
    write(folder / "processor_config.json", {"processor_class": "X", "chat_template": jinja.read_text()})
    jinja.unlink()


def video_apart(folder: Path) -> None:
    """As save_pretrained of transformers 4: the feature extractor has replaced the image processor in its file."""
    whole = table(folder / "preprocessor_config.json")
    write(folder / "preprocessor_config.json", {name: whole[name] for name in whole if not name.startswith("image")})
    write(folder / "video_preprocessor_config.json", {name: whole[name] for name in whole if name not in AUDIO})


def processor_alone(folder: Path) -> None:
    """As save_pretrained of transformers 5."""
    file = folder / "preprocessor_config.json"
    whole = table(file)
    picture = {name: whole[name] for name in whole if name.startswith("image")}
    parts = {"image_processor": picture, "video_processor": picture}
    parts["feature_extractor"] = {name: whole[name] for name in AUDIO if name in whole}
    write(folder / "processor_config.json", {**parts, "processor_class": "Qwen2_5OmniProcessor"})
    file.unlink()


def vocabulary_and_merges(folder: Path) -> None:
    """Without tokenizer.json."""
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    whole = json.loads(file.read_text())
    write(folder / "vocab.json", whole["model"]["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    write(folder / "added_tokens.json", {token["content"]: int(number) for number, token in added.items()})
    write(settings, {**table(settings), "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added})
    file.unlink()


SETS: dict[str, Change] = {
    "chat_template.jinja": lambda folder: None,
    "chat_template.json": template_json,
    "template in tokenizer_config.json": template_in_tokenizer,
    "template of text in tokenizer_config.json": template_of_text_in_tokenizer,
    "template in processor_config.json": template_in_processor,
    "video_preprocessor_config.json": video_apart,
    "processor_config.json": processor_alone,
    "vocab.json and merges.txt": vocabulary_and_merges,
    "no generation_config.json": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("hub", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", SETS)
def test_each_published_set_of_files_gives_the_same_model(name, hub, tmp_path) -> None:
    expected = load(write_folder(tmp_path / "plain"))
    folder = write_folder(tmp_path / "m", hub=hub)
    SETS[name](folder)
    got = load(folder)
    assert got.geometry == expected.geometry
    assert got.framed("what ?") == expected.framed("what ?")
    control = expected.tokenizer.get_added_vocab()
    assert {token: got.tokenizer.convert_tokens_to_ids(token) for token in control} == control
    assert got.stop == expected.stop
    states = expected.model.state_dict(), got.model.state_dict()
    assert all(torch.equal(states[0][weight], states[1][weight]) for weight in states[0])


@pytest.mark.parametrize("family", ["video_salmonn2_plus", "qwen3_vl", "qwen3_omni"])
def test_each_published_set_of_files_gives_the_same_model_of_other_families(family, tmp_path) -> None:
    expected = load_backbone(ModelOptions(path=str(families.write(tmp_path / "plain", family))), "cpu")
    for number, change in enumerate((template_json, template_in_tokenizer, video_apart, processor_alone)):
        folder = families.write(tmp_path / f"{number}", family)
        change(folder)
        got = load_backbone(ModelOptions(path=str(folder)), "cpu")
        assert got.geometry == expected.geometry
        assert got.framed("what ?") == expected.framed("what ?")


@pytest.mark.parametrize("setting", PREPROCESSED)
def test_a_missing_setting_of_the_preprocessor_is_named(setting, tmp_path) -> None:
    folder = write_folder(tmp_path / "m")
    file = folder / "preprocessor_config.json"
    write(file, {name: value for name, value in table(file).items() if name != setting})
    with pytest.raises(CheckpointError, match=rf"has {setting}; copy preprocessor_config\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"chat_template": '])
def test_a_damaged_file_is_named(name, content, tmp_path) -> None:
    folder = write_folder(tmp_path / "m")
    if name == "chat_template.json":
        (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name}: "):
        load(folder)


def test_without_any_template_the_files_to_copy_are_named(tmp_path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"copy chat_template\.json or chat_template\.jinja from"):
        load(folder)


@pytest.mark.parametrize("template", [{"default": "x"}, [{"name": "default", "template": "x"}], 3])
def test_a_template_that_is_not_one_text_is_named(template, tmp_path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    write(folder / "chat_template.json", {"chat_template": template})
    with pytest.raises(CheckpointError, match=r"chat_template in chat_template\.json is not one text"):
        load(folder)


def only_pickled_weights(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Command(mark)}, folder / "pytorch_model.bin")


def code_beside(folder: Path, mark: Path) -> None:
    code = f"import os\nos.system('touch {mark}')\n"
    for name in ("evil.py", "configuration.py", "modeling_qwen2_5_omni.py"):
        (folder / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        classes = {"AutoConfig": "evil.X", "AutoTokenizer": ["evil.X", "evil.X"], "AutoModel": "evil.X"}
        write(folder / name, {**table(folder / name), "auto_map": classes})


def voices(folder: Path, mark: Path) -> None:
    torch.save(Command(mark), folder / "spk_dict.pt")


def template_of_code(folder: Path, mark: Path) -> None:
    found = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch " + str(mark)
    (folder / "chat_template.jinja").write_text(found + "') }}")


@pytest.mark.parametrize("plant", [only_pickled_weights, code_beside, voices, template_of_code])
def test_no_file_of_a_model_runs_code(plant, tmp_path, monkeypatch) -> None:
    folder, mark = write_folder(tmp_path / "m"), tmp_path / "ran"
    plant(folder, mark)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if plant in (voices, code_beside):  # not read
        load(folder)
    else:
        with pytest.raises(UserError) as error:
            load(folder)
        assert len(str(error.value).splitlines()) == 1
    assert not mark.exists()
