"""Settings: strict, located, and every mistake told at once with its cure."""

import json
from pathlib import Path

import pytest
import yaml
from support.configs import SMALL, TRAIN, loaded, problems, written_out
from support.paths import ROOT

from omnimem.config import CONFIGS, ConfigError, RunConfig, differences, dump, load, refuse_changes, untuned


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_config_is_valid_and_survives_being_written_and_read(name, tmp_path) -> None:
    run = load(name, train=TRAIN)
    (tmp_path / "config.yaml").write_text(dump(run))
    assert written_out(load(tmp_path / "config.yaml", train=TRAIN)) == written_out(run)


@pytest.mark.parametrize(
    ("absent", "above", "compared", "bits", "stride"),
    [
        ((), None, None, 2, None),
        ((None,), None, None, 4, None),
        (("query_stride",), None, None, 2, 1),
        (("query_stride", "sketch_bits"), None, None, 16, 1),
        (("query_stride", "sketch_bits", "compared"), None, "inputs", 16, 1),
        (("query_stride", "sketch_bits", "compared", "coverage_above"), -1.0, "inputs", 16, 1),
    ],
)
@pytest.mark.parametrize("name", ["omnimem", "paper"])
def test_the_policy_of_an_earlier_run_keeps_its_rule(absent, above, compared, bits, stride, name, tmp_path) -> None:
    """Its config.yaml has every option that there was; a policy given on the command line is one of today."""
    table = yaml.safe_load(dump(load("tiny.yaml", [f"memory.policy={{name: {name}}}"])))
    for option in absent:
        if option is None:
            table["memory"]["policy"]["sketch_bits"] = None
        else:
            del table["memory"]["policy"][option]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(table))
    policy = load(tmp_path / "config.yaml").memory.policy
    found = (policy.coverage_above, policy.compared, policy.sketch_bits, policy.query_stride)
    assert found == (above, compared, bits, stride)
    widths = {"omnimem": {2: 256, 4: 192, 16: 128}, "paper": {}}[name]
    assert policy.build(None).measures.feature == (None if compared == "inputs" else widths.get(bits))
    today = load(tmp_path / "config.yaml", ["memory.policy={name: omnimem}"]).memory.policy
    assert (today.coverage_above, today.compared, today.sketch_bits, today.query_stride) == (None, None, None, None)


def test_a_bare_name_is_found_from_any_folder_and_an_unknown_one_names_the_nearest(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("budget8k.yaml") == load("budget8k") == load(CONFIGS / "budget8k.yaml")
    with pytest.raises(ConfigError, match=r"budget8.yaml: no such config .*did you mean 'budget8k.yaml'"):
        load("budget8.yaml")


def test_all_problems_are_told_at_once_each_with_line_key_and_cure(tmp_path) -> None:
    text = """\
nam: x
model: {path: Qwen/Qwen2.5-Omni-7B}
memory:
  policy:
    name: omnimen
  slots_per_layer: "8192"
  budget: {name: shared, slots: 3}
stream:
  max_pixel: 100
  fps: fast
fps: 2
"""
    assert problems(tmp_path, text, ["memory.slots=3"]) == [
        "my.yaml name: missing; add it, or give name=... on the command line",
        "my.yaml:1 nam: unknown key; did you mean 'name'?",
        "my.yaml:5 memory.policy.name: 'omnimen' is unknown; did you mean 'omnimem'?",
        "my.yaml:6 memory.slots_per_layer: expected a whole number, got '8192'",
        "my.yaml:7 memory.budget.slots: unknown key; known: name",
        "my.yaml:9 stream.max_pixel: unknown key; did you mean 'max_pixels'?",
        "my.yaml:10 stream.fps: expected a number, got 'fast'",
        "my.yaml:11 fps: unknown key; known: name, model, stream, memory, calibration, tuning, data, train, evaluate",
        "command line memory.slots: unknown key; did you mean 'slots_per_layer'?",
    ]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.learning_rat=1", "unknown key; did you mean 'learning_rate'?"),
        ("train.lr=1e-4", "unknown key; did you mean 'train.learning_rate'?"),
        ("train.learning_rate=high", "expected a number, got 'high'"),
        ("train.save_strategy=step", "expected 'no', 'steps' or 'epoch', got 'step'; did you mean 'steps'?"),
        ("train.output_dir=out", "set by `name`: the run folder is runs/<name>"),
        ("train.warmup_ratio=0.1", "removed in transformers 5; set warmup_steps, where a number below 1 is a"),
        ("train.deepspeed=deepspeed/zero4.json", "no file deepspeed/zero4.json; did you mean 'deepspeed/zero3.json'?"),
    ],
)
def test_the_training_section_is_checked_against_the_fields_of_transformers(override, what, tmp_path) -> None:
    key = override.partition("=")[0]
    lines = problems(tmp_path, overrides=[override])
    assert len(lines) == 1
    assert lines[0].startswith(f"command line {key}: {what}")


def test_files_named_in_a_config_are_found_beside_it_and_in_configs(tmp_path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    assert loaded(tmp_path, "train.deepspeed=mine.json").train["deepspeed"] == str(tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text("{")
    assert "mine.json is not a JSON object" in problems(tmp_path, overrides=["train.deepspeed=mine.json"])[0]
    (tmp_path / "base").mkdir()
    assert loaded(tmp_path, "model.processor=base").model.processor == str(tmp_path / "base")
    assert loaded(tmp_path, "model.processor=hub/id").model.processor == "hub/id"
    shipped = loaded(tmp_path, "train.deepspeed=deepspeed/zero2.json").train["deepspeed"]
    assert json.loads(Path(shipped).read_text())["zero_optimization"]["stage"] == 2


def test_the_recipe_of_the_release_is_a_config(tmp_path) -> None:
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8").partition("## Run it as the release does")[2]
    recipe = page.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "budgets").mkdir()
    (tmp_path / "a.yaml").write_text(f"name: a\nmodel: {{path: m}}\n{recipe}")
    with pytest.raises(ConfigError, match=r"memory\.budget\.table: no file budgets/8k_avratio5\.json; give a table"):
        load(tmp_path / "a.yaml")
    (tmp_path / "budgets/8k_avratio5.json").write_text(json.dumps([[1000, 7000], [1000, 7190]]))
    run = load(tmp_path / "a.yaml")
    budget = run.memory.budget.build(2, run.memory.slots_per_layer)
    policy = run.memory.policy.build(budget)
    assert policy.budget is not None
    assert policy.budget.slots == ((1000, 7000), (1000, 7190))
    assert (policy.markers, run.stream.cut, run.tuning.selection.softening) == ("keep", "tokens", "hard")


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "a b", "ä"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name, tmp_path) -> None:
    assert "cannot name a folder" in problems(tmp_path, overrides=[f"name='{name}'"])[0]


def test_overrides_replace_what_the_file_says_the_last_one_wins(tmp_path) -> None:
    run = loaded(tmp_path, "memory.slots_per_layer=5", "memory.slots_per_layer=7", "train.save_steps=5")
    assert run.memory.slots_per_layer == 7
    assert run.train == {"learning_rate": 1e-5, "save_steps": 5}


def test_override_values_are_yaml_scalars_lists_and_maps(tmp_path) -> None:
    run = loaded(
        tmp_path,
        "train.learning_rate=1e-5",
        "train.report_to=[tensorboard, wandb]",
        "train.run_name=on",
        "train.data_seed=null",
        "memory.budget={name: audio_visual, layer_temperature: .inf, clip: [0.5, 2]}",
    )
    expected = {"learning_rate": 1e-5, "report_to": ["tensorboard", "wandb"], "run_name": "on", "data_seed": None}
    assert run.train == expected
    assert isinstance(run.train["learning_rate"], float)
    assert run.memory.budget.name == "audio_visual"
    assert run.memory.budget.layer_temperature == float("inf")
    assert run.memory.budget.clip == (0.5, 2)


def test_a_section_chosen_by_name_is_replaced_as_a_whole(tmp_path) -> None:
    text = SMALL.replace("{name: recency}", "{name: omnimem, sharpness: 0.1}")
    assert problems(tmp_path, text, ["memory.policy.name=uniform"]) == [
        "my.yaml:4 memory.policy.sharpness: unknown key; known: name, preset, seed"
    ]
    assert loaded(tmp_path, "memory.policy={name: uniform}", text=text).memory.policy.name == "uniform"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("memory", "not a setting; write section.key=value, without blanks around ="),
        ("memory.slots_per_layer = 9", "not a setting; write section.key=value, without blanks around ="),
        ("name.first=x", "name is 'small', not a section; set name itself"),
        ("memory.slots_per_layer=[1", "not valid YAML"),
        ("train.report_to.4=x", "train.report_to has 1 item, counted from 0; set train.report_to=[...]"),
    ],
)
def test_an_override_that_cannot_be_placed_says_why(override, what, tmp_path) -> None:
    text = SMALL.replace("1e-5}", "1e-5, report_to: [none]}")
    assert what in problems(tmp_path, text, [override])[0]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "my.yaml:1: holds no settings; write sections such as `name:` and `model:`"),
        ("name: x\nname: y\n", "my.yaml:2 name: already given at my.yaml:1; keep one"),
        ("name: x\nmodel: {path: [}\n", "my.yaml:2: not valid YAML"),
        ("name: !!python/object:os.system x\n", "my.yaml:1: not valid YAML"),
    ],
)
def test_text_that_is_no_mapping_of_settings_is_refused_with_its_line(text, what, tmp_path) -> None:
    lines = problems(tmp_path, text)
    assert len(lines) == 1
    assert lines[0].startswith(what)


@pytest.mark.parametrize("word", ["no", "on", "2024-01-01", "0x10", "1e"])
def test_words_that_old_yaml_took_for_something_else_stay_words(word, tmp_path) -> None:
    assert loaded(tmp_path, f"name={word}").name == word


def test_a_run_is_resumed_only_with_the_settings_that_made_it(tmp_path) -> None:
    run = loaded(tmp_path)
    earlier = tmp_path / "config.yaml"
    earlier.write_text(dump(run))
    refuse_changes(run, earlier)
    refuse_changes(loaded(tmp_path, "train.max_steps=9", "evaluate.limit=3", "data.max_failures=0.5"), earlier)
    with pytest.raises(ConfigError) as error:
        refuse_changes(loaded(tmp_path, "tuning.lora.r=8", "memory.policy={name: uniform}"), earlier)
    assert [line.replace(str(earlier), "config.yaml") for line in error.value.problems] == [
        "config.yaml memory.policy.name: 'recency' there, 'uniform' now; "
        "resume with the old value, or start a new run with name=... or --overwrite",
        "config.yaml tuning.lora.r: 128 there, 8 now; "
        "resume with the old value, or start a new run with name=... or --overwrite",
    ]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("tuning.lora.targets=[q_proj, q]", "tuning.lora.targets.1: expected 'q_proj', 'k_proj', 'v_proj'"),
        ("evaluate.benchmarks=[{name: video_mne}]", "evaluate.benchmarks.0.name: 'video_mne' is unknown; did you mean"),
        ("evaluate.benchmarks=[{name: own}, {name: own}]", "evaluate.benchmarks: benchmarks: own is given 2 times"),
        ("data.max_failures=2", "data.max_failures: max_failures must be between 0 and 1, got 2"),
        ("memory.policy=snapkv", "memory.policy: expected a section of key: value lines, got 'snapkv'; write {name: s"),
        ("memory.budget=shared", "memory.budget: expected a section of key: value lines, got 'shared'; write {name: s"),
        ("tuning.lora=8", "tuning.lora: expected a section of key: value lines, got 8"),
        ("model.dtype=float8", "model.dtype: expected 'float32', 'bfloat16' or 'float16', got 'float8'"),
    ],
)
def test_every_part_refuses_what_it_does_not_know(override, what, tmp_path) -> None:
    (line,) = problems(tmp_path, overrides=[override])
    assert line.startswith(f"command line {what}")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["tuning.chunk_tokens=[24, 36]", "stream.chunk_tokens=72"], ["tuning.chunk_tokens"]),
        (["tuning.chunk_tokens=[24, 72]", "stream.chunk_tokens=72"], []),
        (["tuning.chunk_tokens={low: 24, high: 36}", "stream.chunk_tokens=72"], ["tuning.chunk_tokens"]),
        (["tuning.chunk_tokens={low: 24, high: 100}", "stream.chunk_tokens=72"], []),
        ([], []),
        (["tuning.budgets=[full]"], ["tuning.budgets"]),
        (["tuning.budgets=[full, full]"], ["tuning.budgets"]),
        (["tuning.budgets=[full, self]"], []),
        (["stream.fps=0.5", "evaluate.benchmarks=[{name: video_mme, subtitles: true}]"], []),
        (
            ["evaluate.benchmarks=[{name: recall}, {name: video_mme, subtitles: true, subtitle_fps: 2.0}]"],
            ["evaluate.benchmarks[1].subtitle_fps"],
        ),
        (["stream.fps=0.5", "evaluate.benchmarks=[{name: video_mme, subtitle_fps: 1.0}]"], []),
    ],
)
def test_settings_that_follow_each_other_are_named_where_they_do_not(settings, named, tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: model}\n")
    run = load(tmp_path / "x.yaml", settings)
    assert [line.partition(":")[0] for line in differences(run)] == named
    assert written_out(load_again(run, tmp_path)) == written_out(run)


@pytest.mark.parametrize("budgets", ["[]", "[self]", "[self, full]", "[full]"])
def test_self_is_the_budget_of_the_training_not_that_of_the_evaluation(budgets, tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: model}\n")
    trained = load(tmp_path / "x.yaml", ["memory.slots_per_layer=64", f"tuning.budgets={budgets}"])
    (tmp_path / "config.yaml").write_text(dump(trained))
    for slots, named in ((64, 0), (32, 0 if budgets == "[full]" else 1)):  # a control is for no budget
        run = load(tmp_path / "config.yaml", [f"memory.slots_per_layer={slots}"])
        assert len(untuned(run.memory, run.stream, tmp_path / "config.yaml")) == named


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ([], []),
        (["tuning.budgets=[2048]"], []),  # only training reads it
        (["memory.slots_per_layer=4096"], []),
        (["memory.slots_per_layer=2048"], ["memory.slots_per_layer"]),
        (["stream.chunk_tokens=50"], []),
        (["stream.chunk_tokens=200"], ["stream.chunk_tokens"]),
        (["stream.fps=2", "stream.max_pixels=12544"], ["stream.max_pixels", "stream.fps"]),
        (["stream.tracks=video", "memory.policy={name: distinct}"], ["memory.policy", "stream.tracks"]),
        (["memory.policy={name: omnimem, coverage: 0.5, markers: with_group}"], []),  # what null stands for
        (["memory.policy={name: omnimem, coverage: 0.4}"], ["memory.policy"]),
        (["memory.policy={name: paper}"], ["memory.policy"]),
    ],
)
def test_settings_at_which_an_adapter_was_not_tuned_are_named(settings, named, tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: model}\n")
    tuned = ["memory.slots_per_layer=8192", "tuning.budgets=[self, 0.5, full]", "tuning.chunk_tokens=[36, 72]"]
    trained = load(tmp_path / "x.yaml", [*tuned, "stream.chunk_tokens=72"])
    (tmp_path / "config.yaml").write_text(dump(trained))
    run = load(tmp_path / "config.yaml", settings)
    found = [line.partition(":")[0] for line in untuned(run.memory, run.stream, tmp_path / "config.yaml")]
    assert sorted(".".join(name.split(".")[:2]) for name in found) == sorted(named)


def test_a_damaged_config_of_the_training_is_named(tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: model}\n")
    (tmp_path / "config.yaml").write_text("name: [")
    run = load(tmp_path / "x.yaml")
    (line,) = untuned(run.memory, run.stream, tmp_path / "config.yaml")
    assert line.startswith(f"{tmp_path / 'config.yaml'}: cannot be read")


def test_subtitles_follow_the_frames(tmp_path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: model}\n")
    run = load(tmp_path / "x.yaml", ["stream.fps=0.5", "evaluate.benchmarks=[{name: video_mme, subtitles: true}]"])
    assert [getattr(each, "subtitle_fps", None) for each in run.evaluate.benchmarks] == [0.5]


def load_again(run: RunConfig, folder: Path) -> RunConfig:
    (folder / "again.yaml").write_text(dump(run))
    return load(folder / "again.yaml")
