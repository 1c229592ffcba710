"""Judge predictions of lmms-eval or VLMEvalKit by our rules, and write an eval folder that can be compared.

omnimem score FILE --benchmark NAME --root DIR [--set rules=lmms_eval] --out DIR [--arm NAME]
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omnimem.cli.data_report import add_benchmark_options, benchmark_from, require_annotations
from omnimem.cli.parser import Parser
from omnimem.data import Question, Sample
from omnimem.errors import counted
from omnimem.run import provenance, sha256, write_json, write_text
from omnimem.tasks import Benchmark
from omnimem.tasks.accuracy import accuracy, breakdown
from omnimem.tasks.predictions import Matched, Prediction, matched, read_predictions


def main(arguments: Sequence[str]) -> None:
    """Write `<benchmark>.jsonl` and summary.json to --out, and print the accuracies."""
    given = _parser().parse(arguments)
    benchmark = benchmark_from(given.benchmark, given.root, given.settings)
    require_annotations(benchmark)
    # 1. judge every question
    samples = benchmark.samples()
    found = matched(samples, read_predictions(given.predictions))
    lines = list(_lines(benchmark, samples, found))
    # 2. write an eval folder
    write_text(given.out / f"{benchmark.label}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    entry = _entry(benchmark, lines)
    origin = {"predictions": sha256(given.predictions), **{path.name: sha256(path) for path in benchmark.annotations}}
    record = {**provenance(command=["train/score.py"], seed=0, sha256=origin), "predictions": str(given.predictions)}
    summary = {"arm": given.arm or given.out.name, "provenance": record, "benchmarks": {benchmark.label: entry}}
    write_json(given.out / "summary.json", summary)
    # 3. print
    for line in _report(entry, lines):
        print(line)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("predictions", type=Path, metavar="FILE", help="samples .jsonl of lmms-eval, or .tsv, .xlsx")
    add_benchmark_options(parser, name="the benchmark of the predictions; its videos are not needed", required=True)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the eval folder to write")
    parser.add_argument("--arm", metavar="NAME", help="its name in a comparison (the name of --out)")
    return parser


def _lines(benchmark: Benchmark, samples: Sequence[Sample], found: Matched) -> Iterator[dict[str, Any]]:
    """One line per question; without a prediction it is wrong in `strict` and not counted in `official`."""
    for sample in samples:
        for question in sample.questions:
            prediction = found.predictions.get(question.item.id)
            prompt = (prediction and (prediction.prompt or prediction.question)) or question.text
            yield {
                "id": question.item.id,
                "video": sample.cluster or sample.id,
                "stream": sample.id,
                "question": question.text,
                "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
                "answer": question.answer or "",
                "kind": question.kind,
                "categories": {axis: list(labels) for axis, labels in question.item.categories.items()},
                "at": question.at,
                "prediction": None if prediction is None else prediction.text,
                **_verdict(benchmark, question, prediction),
            }


def _verdict(benchmark: Benchmark, question: Question, prediction: Prediction | None) -> dict[str, Any]:
    if prediction is None:
        return {"read": None, **dict.fromkeys(("correct", "parsed", "counted", "bare"), False)}
    verdict = benchmark.judge(question, prediction.text)
    return {
        "read": verdict.answer,
        "correct": verdict.correct,
        "parsed": verdict.answer is not None,
        "counted": verdict.counted,
        "bare": verdict.bare,
        **({"failure": True} if verdict.failed else {}),
        **({} if prediction.score is None else {"agrees": prediction.score == verdict.correct}),
    }


def _entry(benchmark: Benchmark, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The benchmark's entry of summary.json; quantities that only our own runs measure are null."""
    return {
        "rules": benchmark.rules,
        **accuracy(lines),
        "categories": breakdown(lines),
        **dict.fromkeys(("peak_entries", "answer_entries", "text_entries", "bytes")),
        "input": {"frames": None, "audio_seconds": None},
        "missing": sum(line["prediction"] is None for line in lines),
        "failures": sum("failure" in line for line in lines),
        "defects": [vars(defect) for defect in benchmark.defects()],
    }


def _report(entry: dict[str, Any], lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        f"rules {entry['rules']}: official {entry['official']:.1%}, strict {entry['strict']:.1%} of {entry['n']:,}; "
        f"no answer {entry['no_answer']:.1%}, in the requested form {entry['format']:.1%}"
    )
    for axis, labels in entry["categories"].items():
        yield f"  {axis}: " + ", ".join(f"{label} {numbers['strict']:.1%}" for label, numbers in labels.items())
    judged = [line["agrees"] for line in lines if "agrees" in line]
    if judged:
        yield f"the file's own scores: {len(judged):,}, of which {judged.count(False):,} differ from ours"
    if entry["missing"]:
        yield f"note: {counted(entry['missing'], 'question')} without a prediction"
    if entry["failures"]:
        first = next(line for line in lines if "failure" in line)
        yield (
            f"note: {counted(entry['failures'], 'failure message')} in place of predictions, counted as none (first: "
            f"{first['id']}, {first['prediction'][:60]!r})"
        )
