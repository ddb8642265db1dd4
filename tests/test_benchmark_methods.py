"""The table of drafters: tasks with answers, every drafter in turn, the paper's columns."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch import nn

from specstream.benchmark import Drafted, DrafterStudy, JudgedTask, QuestionFile
from specstream.benchmark.cells import markdown
from specstream.benchmark.command import main, make_parser
from specstream.benchmark.parameters import extra_parameters
from specstream.benchmark.readme import render
from specstream.benchmark.results_page import read_results, render_page
from specstream.benchmark.runners import Runner
from specstream.benchmark.tables import make_tables
from specstream.benchmark.timing import Measured, Plan, warm_up
from specstream.data.tokenizer import train_tokenizer
from specstream.drafters import DraftModel, PromptLookup
from specstream.drafters.loading import save_drafter
from specstream.generation import AutoregressivePipeline, Limits
from specstream.metrics import Rouge
from specstream.models import PretrainedLM
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from tests.toys import nearby, toy_lm

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 300
QUESTIONS = 4  # measured, of eight
TOKENS = 10
WORDS = ("draft", "short", "and", "the", "target", "checks", "it", "in", "one", "pass")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two targets with runs of drafters, and questions of which the first target knows a half.

    Of eight questions the even ones are measured, and of these every other has, beside a wrong
    answer, the target's own for a reference.
    """
    folder = tmp_path_factory.mktemp("models")
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=8)) for _ in range(8)]
    processor = TextProcessor(train_tokenizer(prompts, VOCABULARY))
    for seed, path, runs in ((0, "target", ("run", "fresh")), (5, "tuned/model", ("tuned",))):
        target = toy_lm(VOCABULARY, seed, num_layers=2, sharpness=10.0)
        target.save(folder / path, processor.tokenizer)
        for run in runs:
            draft = toy_lm(VOCABULARY, seed=9) if run == "fresh" else nearby(target, 0.02)
            drafter = DraftModel(target, lambda draft=draft: draft)  # type: ignore[misc]
            (folder / run).mkdir(exist_ok=True)
            save_drafter(folder / run / "draft", drafter, processor, str(folder / path))
    loaded = PretrainedLM(str(folder / "target"), "float32")
    plain = AutoregressivePipeline(
        loaded.eval(), processor, Sampling(temperature=0), Limits(TOKENS)
    ).complete([f"{prompt}\n" for prompt in prompts])
    lines = []
    for number, (prompt, answer) in enumerate(zip(prompts, plain, strict=True)):
        right = f" {answer.text}\n" if number % 4 == 0 else "wrong too"
        lines += [{"ask": prompt, "say": "wrong"}, {"ask": prompt, "say": right}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def quick_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time the passes for the bound three times each, instead of for two seconds."""
    monkeypatch.setattr("specstream.generation.costs.SECONDS", 0.0)


def block(place: str, /, **options: Any) -> dict[str, Any]:
    return {"class_path": f"specstream.{place}", "init_args": options}


def fixed(max_tokens: int) -> dict[str, Any]:
    return block("generation.FixedLength", max_tokens=max_tokens)


def write_study(
    models: Path, folder: Path, methods: list[dict[str, Any]], /, **options: Any
) -> str:
    task = {
        "name": "toy",
        "target": str(models / "target"),
        "questions": {
            "path": str(models / "questions.jsonl"),
            "prompt": "{ask}\n",
            "references": ["{say}"],
        },
        "quality": block("metrics.ExactMatch"),
    }
    study = {
        "tasks": [task],
        "methods": methods,
        "num_prompts": QUESTIONS,
        "max_new_tokens": TOKENS,
        "repeats": 1,
        "warmups": 1,
        "dtype": "float32",
        "device": "cpu",
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({"study": block("benchmark.DrafterStudy", **study | options)}))
    return str(path)


LOOKUP = {"name": "lookup", "drafter": block("drafters.PromptLookup"), "lengths": fixed(3)}


def measure(
    config: str, output: Path, capsys: pytest.CaptureFixture[str], *words: str
) -> list[dict[str, Any]]:
    code = main(["--config", config, "--output", str(output), *words])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    rows = json.loads(shown.out.splitlines()[-1])
    assert rows == json.loads(output.read_text())
    return rows


def test_every_drafter_gets_the_columns_of_the_paper(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [
        LOOKUP,
        {"name": "near", "run": str(models / "run"), "lengths": fixed(3)},
        {"name": "untrained", "run": str(models / "fresh"), "lengths": fixed(3)},
    ]
    rows = measure(write_study(models, tmp_path, methods), tmp_path / "toy.json", capsys)
    assert [row["method"] for row in rows] == ["plain", "lookup", "near", "untrained"]
    plain, lookup, near, fresh = rows
    assert plain["calls_per_token"] == plain["call_reduction"] == plain["speedup_vs_plain"] == 1
    for row in rows[1:]:
        assert row["identical"] and row["identical_share"] == 1
        assert row["quality"] == row["quality_plain"] == plain["quality"] == {"exact_match": 0.5}
        reduction = plain["target_calls"] / row["target_calls"]  # of the same text
        assert row["call_reduction"] == pytest.approx(reduction, rel=1e-4)
        assert row["speedup_vs_plain"] == pytest.approx(plain["seconds"] / row["seconds"], rel=1e-4)
        assert row["efficiency"] == pytest.approx(row["speedup_vs_plain"] / row["bound"], rel=1e-4)
    assert near["tau"] > 2 > fresh["tau"] >= 1
    assert near["call_reduction"] > 1.5
    draft = PretrainedLM(str(models / "run/draft"))
    assert near["extra_parameters"] == sum(weight.numel() for weight in draft.parameters())
    assert near["share_of_medusa"] == pytest.approx(
        near["extra_parameters"] / (4 * (16 * 16 + 16 * VOCABULARY)), rel=1e-4
    )
    assert lookup["extra_parameters"] == near["lora_parameters"] == 0
    assert near["hardware"] and near["command"].endswith("toy.json")
    assert (tmp_path / "toy-speedup.png").is_file() and (tmp_path / "toy-alpha.png").is_file()


def test_a_model_of_its_own_is_judged_by_its_own_plain_text(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = {"name": "tuned", "run": str(models / "tuned"), "lengths": fixed(3)}
    rows = measure(write_study(models, tmp_path, [tuned]), tmp_path / "toy.json", capsys)
    assert [row["method"] for row in rows] == ["plain", f"plain, {models}/tuned/model", "tuned"]
    plain, own, row = rows
    assert row["identical"] and row["quality"] == own["quality"] == {"exact_match": 0.0}
    assert row["quality_plain"] == plain["quality"] == {"exact_match": 0.5}
    assert row["baseline"] == plain["target"] and row["target"] == own["target"]
    per_token = [r["seconds"] / r["elements"] for r in rows]
    assert row["speedup_vs_plain"] == pytest.approx(per_token[0] / per_token[2], rel=1e-3)
    rows = measure(
        write_study(models, tmp_path, [tuned | {"baseline": str(models / "tuned/model")}]),
        tmp_path / "own.json",
        capsys,
    )
    assert rows[2]["quality_plain"] == rows[1]["quality"]


def test_every_target_is_judged_on_more_questions_than_are_timed(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lossy = block("verification.TypicalAcceptance")
    methods = [
        LOOKUP,
        {"name": "tuned", "run": str(models / "tuned"), "lengths": fixed(3)},
        {"name": "typical", "run": str(models / "run"), "lengths": fixed(3), "verifier": lossy},
    ]
    config = write_study(models, tmp_path, methods, quality_prompts=8, max_new_tokens=TOKENS)
    rows = measure(config, tmp_path / "toy.json", capsys)
    plain, own, lookup, tuned, typical = rows
    for row in rows[:4]:
        assert (row["num_prompts"], row["quality_prompts"]) == (QUESTIONS, 8)
        assert row["quality_plain"] == plain["quality"] == {"exact_match": 0.25}
    assert lookup["quality"] == plain["quality"] and tuned["quality"] == {"exact_match": 0.0}
    assert typical["quality_prompts"] == QUESTIONS  # it promises nothing: its own text is judged
    assert typical["quality_plain"] == {"exact_match": 0.5}
    assert plain["quality_differences"] is lookup["quality_differences"] is None
    for row in (own, tuned):
        assert row["quality_differences"] == {"exact_match": -0.25}
        low, high = row["quality_intervals"]["exact_match"]
        assert -0.7 < low < -0.25 < high <= 0
    (table,) = make_tables(rows)
    assert "prompts judged" in markdown(table) and "-25.00 [-" in markdown(table)
    for row in rows:
        for name in ("quality_prompts", "quality_differences", "quality_intervals"):
            del row[name]  # as in results from before
    (table,) = make_tables(rows)
    assert "over the target's" not in markdown(table) and "judged" not in markdown(table)


def test_a_file_of_too_few_questions_is_refused_before_anything_is_loaded(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("specstream.benchmark.drafter_study.Pair")
    config = write_study(models, tmp_path, [LOOKUP], quality_prompts=9)
    assert main(["--config", config, "--output", str(tmp_path / "toy.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("questions.jsonl' holds 8 different prompts, not 9")


def test_questions_that_are_too_long_are_left_out_and_counted(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = tmp_path / "q.jsonl", str(models / "target")
    records = [{"ask": "draft " * count, "say": "it"} for count in (1, 2, 3, 9)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    file = QuestionFile(str(path), "{ask}", ["{say}"])
    most = len(TextProcessor.from_pretrained(target).encode(records[2]["ask"]))
    task = JudgedTask("toy", target, file, Rouge(), most)
    assert [question.prompt for question in task.read()] == [r["ask"] for r in records[:3]]
    assert capsys.readouterr().err == f"left out of toy: 1 questions of over {most} tokens\n"
    with pytest.raises(ValueError, match="holds 3 different prompts, not 4"):
        DrafterStudy([task], [], num_prompts=4).read(task)


def test_drawn_text_is_judged_too_but_not_compared(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(
        models, tmp_path, [LOOKUP], samplings=[{"temperature": 0}, {"temperature": 1.0}]
    )
    rows = measure(config, tmp_path / "toy.json", capsys)
    assert [row["sampling"] for row in rows] == ["greedy", "greedy", "T=1", "T=1"]
    assert rows[3]["identical"] is None and rows[3]["identical_share"] is None
    assert rows[3]["quality"].keys() == {"exact_match"}
    assert rows[3]["guarantee"] == "exact law"


def test_missing_runs_are_refused_or_left_out_in_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "begun").mkdir(exist_ok=True)
    methods = [
        LOOKUP,
        {"name": "gone", "run": str(models / "gone")},
        {"name": "begun", "run": str(models / "begun")},
    ]
    config, output = write_study(models, tmp_path, methods), tmp_path / "toy.json"
    assert main(["--config", config, "--output", str(output)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"'gone': there is no folder '{models}/gone'" in lines[0]
    assert "skip_missing: true leaves it out" in lines[0] and not output.exists()
    assert main(["--config", config, "--output", str(output), "--study.skip_missing", "true"]) == 0
    shown = capsys.readouterr()
    assert [row["method"] for row in json.loads(shown.out.splitlines()[-1])] == ["plain", "lookup"]
    assert f"left out of toy: method 'begun': '{models}/begun' holds no finished" in shown.err


def test_mistakes_are_found_before_anything_is_loaded(models: Path) -> None:
    def refusal(*methods: Drafted, **options: Any) -> str:
        questions = QuestionFile(str(models / "questions.jsonl"), "{ask}", ["{say}"])
        task = JudgedTask("toy", str(models / "target"), questions, Rouge())
        with pytest.raises(ValueError) as found:
            DrafterStudy([task], list(methods), device="cpu", **options).check()
        return str(found.value)

    near = Drafted("near", str(models / "run"))
    other = Drafted("other", str(models / "run"), target=str(models / "tuned/model"))
    assert f"was trained for the target '{models}/target', not for" in refusal(other)
    assert "two methods named 'near'" in refusal(near, near)
    assert "no method 'far'; there are near" in refusal(near, only_methods=["far"])
    assert "no task 'x'; there are toy" in refusal(near, only_tasks=["x"])
    assert "no method is left" in refusal(Drafted("gone", "no/such/run"), skip_missing=True)
    questions = QuestionFile(str(models / "questions.jsonl"), "{ask}", ["{say}"])
    with pytest.raises(ValueError, match="max_prompt_tokens must be at least 1, not 0"):
        JudgedTask("toy", str(models / "target"), questions, Rouge(), max_prompt_tokens=0).check()
    assert "max_new_tokens must be at least 1, not 0" in refusal(near, max_new_tokens=0)
    with pytest.raises(ValueError, match="'both' needs a run or a drafter, and not both"):
        Drafted("both", str(models / "run"), lambda _: PromptLookup())


def test_a_part_of_the_methods_can_be_measured(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [LOOKUP, {"name": "gone", "run": str(models / "gone")}]
    config = write_study(models, tmp_path, methods)
    words = ("--study.only_methods", "[lookup]", "--study.num_prompts", "1")
    rows = measure(config, tmp_path / "toy.json", capsys, *words)
    assert [row["method"] for row in rows] == ["plain", "lookup"] and rows[0]["num_prompts"] == 1


def test_the_report_shows_the_table(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, configs = tmp_path / "docs/results", tmp_path / "configs"
    configs.mkdir()
    measure(write_study(models, tmp_path, [LOOKUP]), results / "toy.json", capsys)
    files = read_results(results)
    page = render_page(files, "README.md")
    assert f"**toy (greedy; {QUESTIONS} prompts, {TOKENS} new tokens at most)**" in page
    assert "| method | speedup | call reduction | exact match | extra parameters |" in page
    assert "| lookup |" in page and "| 50.00 | 0 |" in page and "| 100% |" in page
    assert "(toy-speedup.png)" in page
    section = render(files, configs, tmp_path)
    assert "| lookup | exact law |" in section and "exact match 50.00 (50.00)" in section
    assert "(docs/results/toy-speedup.png)" in section


def test_questions_of_equal_prompts_pool_their_references(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    records = [{"p": p, "a": a, "b": f"{a}!"} for p, a in ("x1", "y2", "x3", "z4")]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    one = QuestionFile(str(path), "{p}\n", ["{a}"]).read(3)
    assert [(q.prompt, q.references) for q in one] == [
        ("x\n", ("1", "3")), ("y\n", ("2",)), ("z\n", ("4",)),
    ]  # fmt: skip
    several = QuestionFile(str(path), "{p}", ["{a}", "{b}"]).read(1)
    assert several[0].references == ("1", "1!", "3", "3!")
    with pytest.raises(ValueError, match="holds 3 different prompts, not 4"):
        QuestionFile(str(path), "{p}", ["{a}"]).read(4)
    with pytest.raises(ValueError, match="'answer' names no field in braces"):
        QuestionFile(str(path), "{p}", ["answer"]).check()


class Heads(nn.Module):
    """Shares the target's output projection, adds a head and an adapter."""

    def __init__(self, target: PretrainedLM) -> None:
        super().__init__()
        self.output = target.head
        self.head = nn.Linear(16, 16, bias=False)
        self.lora_A = nn.Linear(16, 2, bias=False)


def test_parameters_shared_with_the_target_are_not_extra() -> None:
    target = toy_lm()
    found = extra_parameters(Heads(target), target)  # type: ignore[arg-type]
    assert (found.extra_parameters, found.lora_parameters) == (16 * 16, 32)
    assert found.share_of_medusa == 256 / (4 * (16 * 16 + 16 * target.vocab_size))


def test_a_drafter_may_name_its_parts() -> None:
    target = toy_lm()
    heads: Any = Heads(target)
    parts = {"streams": 40, "early exit": 20, "adapters": 7}
    heads.extra_parameters = lambda: parts
    found = extra_parameters(heads, target)
    assert (found.extra_parameters, found.lora_parameters) == (60, 7)
    assert found.parameter_parts == parts


@dataclass
class Diary(Runner):
    """Writes down which prompts it is given."""

    seen: list[int]
    variant: str = "only"

    def run(
        self, prompts: Sequence[list[int]], indices: Sequence[int], seed: int
    ) -> list[list[int]]:
        self.seen += indices
        return [[0]]


def test_warm_up_meets_the_longest_prompt_and_the_shortest() -> None:
    prompts = [[0] * size for size in (2, 9, 5, 7, 1)]
    for warmups, expected in ((0, []), (1, [1]), (2, [1, 4]), (3, [1, 2, 4]), (9, [1, 3, 2, 0, 4])):
        seen: list[int] = []
        plan = Plan(prompts, [[i] for i in range(5)], 1, warmups, 0, "cpu")
        warm_up([Measured(Diary(seen), np.zeros((1, 5)), [])], plan)
        assert seen == expected


def test_the_shipped_table_names_every_drafter_once() -> None:
    parser = make_parser()
    path = ROOT / "configs/benchmark/text-methods.yaml"
    study = parser.instantiate(parser.parse_args(["--config", str(path)])).study
    assert [task.name for task in study.tasks] == ["e2e", "wikisql"]
    assert [method.name for method in study.methods] == [
        "prompt lookup", "draft LM", "streaming, lossless", "streaming, shared", "Medusa",
        "EAGLE-3", "block (DFlash)", "block, sequential (DSpark)",
    ]  # fmt: skip
    assert [sampling.greedy for sampling in study.samplings] == [True]
