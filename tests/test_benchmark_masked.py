"""The table of fillings: quality against calls, for every way to fill canvases."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specstream.benchmark import (
    HeldOutCanvases,
    MaskedStudy,
    MaskedTask,
    NestedSteps,
    NoPrompt,
    PlainSampling,
    PublishedPuzzles,
)
from specstream.benchmark.command import main
from specstream.benchmark.masked_judge import CausalJudge
from specstream.benchmark.pareto import Point, fewest_steps, front, lies_above
from specstream.benchmark.readme import render
from specstream.benchmark.results_page import read_results, render_page
from specstream.data import Countdown, Sudoku, TextDataModule
from specstream.data.planning import COUNTDOWN_PROMPT, solved
from specstream.data.tokenizer import load_tokenizer, train_character_tokenizer
from specstream.drafters import MaskedDraftModel
from specstream.drafters.loading import save_drafter
from specstream.drafters.self_speculative import save_head
from specstream.generation import Limits, MaskedPipeline, Sampler
from specstream.metrics import Solved
from specstream.models import (
    PretrainedLM,
    PretrainedMaskedLM,
    SelfSpeculativeHead,
    UntrainedLM,
    UntrainedMaskedLM,
)
from specstream.models.fingerprint import fingerprint
from specstream.models.self_speculative import relative_cost
from specstream.processors import TextProcessor
from specstream.unmasking import StaticSchedule
from tests.toys import nearby

CHARACTERS = "sudokcntw 0123456789=+-*/()\n"
MASKS = 8
PUZZLES = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked target, a drafter and a head for it, a causal judge, and three puzzles."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_character_tokenizer([CHARACTERS])
    processor, size, mask = TextProcessor(tokenizer), len(tokenizer), tokenizer.mask_token_id
    target = UntrainedMaskedLM(size, 16, 24, 2, 2, max_positions=64, seed=0, mask_id=mask)
    peaked(target, 5.0)
    target.form = replace(target.form, corruption=0.1)  # so that it may see a whole draft
    target.save(folder / "target", tokenizer)
    draft = nearby(target, 0.05)  # type: ignore[arg-type]
    drafter = MaskedDraftModel(target, lambda: draft)  # type: ignore[arg-type, return-value]
    (folder / "run").mkdir()
    save_drafter(folder / "run/draft", drafter, processor, str(folder / "target"))
    saved = PretrainedMaskedLM(str(folder / "target"), "float32")
    head = SelfSpeculativeHead(saved)
    torch.nn.init.normal_(head.out.weight, std=0.05)
    (folder / "self").mkdir()
    save_head(folder / "self/draft", head, str(folder / "target"), fingerprint(saved.model))
    judge = UntrainedLM(size, 16, 24, 1, 2, max_positions=64, seed=3)
    peaked(judge, 5.0)
    judge.save(folder / "judge", tokenizer)
    lines = [{"numbers": [n, 2, 3], "target": n + 5} for n in range(4, 4 + PUZZLES)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "puzzles.jsonl").write_text(text)
    return folder


@torch.no_grad()
def peaked(lm: PretrainedLM | PretrainedMaskedLM, scale: float) -> None:
    """Scale fresh weights up in place, so that laws depend on what is seen, and no text ends."""
    for weight in lm.parameters():
        if weight.dim() > 1:
            weight.mul_(scale)
    lm.model.get_input_embeddings().weight[0] = 0  # the end of text; embeddings are tied
    lm.eval().requires_grad_(False)


def block(place: str, /, **options: Any) -> dict[str, Any]:
    return {"class_path": f"specstream.{place}", "init_args": options}


def static(num_steps: int) -> dict[str, Any]:
    return block("unmasking.StaticSchedule", num_steps=num_steps)


def plain(name: str, unmasking: dict[str, Any]) -> dict[str, Any]:
    return block("benchmark.PlainSampling", name=name, unmasking=unmasking)


def fixed(max_tokens: int) -> dict[str, Any]:
    return block("generation.FixedLength", max_tokens=max_tokens)


PLAIN = [plain("all", static(MASKS)), plain("half", static(MASKS // 2)), plain("one", static(1))]


def puzzles(models: Path, **options: Any) -> dict[str, Any]:
    """Return a task with a rule that a model which can do nothing solves now and then."""
    return {
        "name": "toy",
        "target": str(models / "target"),
        "prompts": block("benchmark.PublishedPuzzles", path=str(models / "puzzles.jsonl")),
        "quality": block("metrics.Solved", checker="tests.test_benchmark_masked.adds_up"),
        "max_new_tokens": MASKS,
    } | options


def adds_up(prompt: str, text: str) -> bool:
    """Whether the characters of a text add up to a multiple of three."""
    assert COUNTDOWN_PROMPT.fullmatch(prompt)
    return sum(map(ord, text)) % 3 == 0


def write_study(
    folder: Path, task: dict[str, Any], methods: Sequence[dict[str, Any]], **options: Any
) -> str:
    study = {
        "tasks": [task], "methods": list(methods), "num_prompts": PUZZLES, "repeats": 1,
        "warmups": 1, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({"study": block("benchmark.MaskedStudy", **study | options)}))
    return str(path)


def measure(
    config: str, output: Path, capsys: pytest.CaptureFixture[str], *words: str
) -> list[dict[str, Any]]:
    code = main(["--config", config, "--output", str(output), *words])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    rows = json.loads(shown.out.splitlines()[-1])
    assert rows == json.loads(output.read_text())
    return rows


def every_method(models: Path) -> list[dict[str, Any]]:
    run = str(models / "run")
    return [
        *PLAIN,
        plain("threshold", block("unmasking.Threshold", threshold=0.9)),
        block("benchmark.NestedSteps", name="nested", unmasking=static(MASKS), lengths=fixed(3)),
        block(
            "benchmark.DraftAndVerify", name="pair", run=run, lengths=fixed(2), copies=2,
            verifier=block("verification.ExactMatch"),
            draft_unmasking=block("unmasking.EntropyBound", bound=0.5),
        ),
        block("benchmark.DrafterAlone", name="alone", run=run),
        block("benchmark.SelfSpeculative", name="self", run=str(models / "self"), num_windows=2),
    ]  # fmt: skip


def test_every_way_to_fill_gets_a_row_of_quality_and_costs(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, configs = tmp_path / "docs/results", tmp_path / "configs"
    configs.mkdir()
    config = write_study(tmp_path, puzzles(models), every_method(models))
    rows = measure(config, results / "toy.json", capsys)
    found = {row["method"]: row for row in rows}
    assert [row["kind"] for row in rows] == [
        *["plain"] * 4, "nested steps", "draft and verify", "drafter alone", "self-speculative",
    ]  # fmt: skip
    for name, calls in (("all", MASKS), ("half", MASKS // 2), ("one", 1)):
        assert found[name]["target_calls"] == found[name]["full_passes"] == calls
        assert found[name]["call_ratio"] == MASKS / calls
        assert found[name]["above_plain"] is found[name]["acceptance"] is None
        assert found[name]["identical_share"] == 1 or name != "all"
    nested, alone, own = found["nested"], found["alone"], found["self"]
    assert nested["identical_share"] == 1 and nested["quality"] == found["all"]["quality"]
    assert nested["guarantee"] == "exact greedy" and nested["target_calls"] <= MASKS
    assert nested["full_passes"] > nested["target_calls"]
    assert found["pair"]["full_passes"] >= found["pair"]["target_calls"] > 0
    assert 0 <= found["pair"]["acceptance"] <= 1 and found["pair"]["mean_drafted"] > 0
    assert alone["target_calls"] == alone["full_passes"] == 0 and alone["draft_calls"] > 0
    assert alone["call_ratio"] is alone["call_ratio_vs_best"] is None
    assert own["target_calls"] == own["full_passes"] > 2 and own["guarantee"] == "exact law"
    assert sum(row["best_plain"] for row in rows) == 1
    best = next(row for row in rows if row["best_plain"])
    for row in rows:
        assert row["best_plain_method"] == best["method"] and row["reference"] == "all"
        ratio = found["all"]["seconds"] / row["seconds"]
        assert row["speedup"] == pytest.approx(ratio, rel=1e-4)
        assert row["speedup_vs_best"] == pytest.approx(best["seconds"] / row["seconds"], rel=1e-4)
        assert row["seconds_interval"][0] <= row["seconds"] <= row["seconds_interval"][1]
        assert row["judge_nll"] is None and row["entropy"] >= 0
    assert (results / "toy-pareto.png").is_file()
    files = read_results(results)
    page = render_page(files, "README.md")
    assert "| method | solved | better than all steps | calls | full passes |" in page
    assert f"| {best['method']} (best plain) |" in page and "(toy-pareto.png)" in page
    section = render(files, configs, tmp_path)
    for name in ("nested", "pair", "alone", "self"):
        assert f"| {best['method']}: {best['target_calls']:.2f} | {name} | " in section


def test_calls_are_those_of_the_pipelines(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recount plain sampling by its steps, and a head's passes by their operations."""
    own = {"run": str(models / "self"), "num_windows": 2}
    fast = block("benchmark.SelfSpeculative", name="self", **own)
    slow = block("benchmark.SelfSpeculative", name="slow", speculate=False, **own)
    methods = [PLAIN[0], fast, slow]
    config = write_study(tmp_path, puzzles(models), methods, batch_size=2, repeats=2)
    rows = measure(config, tmp_path / "toy.json", capsys)
    assert [row["repeats"] for row in rows] == [2, 2, 2]
    assert rows[0]["target_calls"] == rows[0]["full_passes"] == MASKS
    target = PretrainedMaskedLM(str(models / "target"), "float32")
    cost = relative_cost(target, SelfSpeculativeHead(target))
    assert rows[2]["full_passes"] == pytest.approx(2 + MASKS * cost, rel=1e-4)
    assert 2 + cost <= rows[1]["full_passes"] <= rows[2]["full_passes"]


def test_free_text_is_judged_by_a_causal_model(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = puzzles(
        models, quality=None, judge=str(models / "judge"), prompts=block("benchmark.NoPrompt"),
        samplings=[{"temperature": 1.0}],
    )  # fmt: skip
    methods = [*PLAIN, block("benchmark.NestedSteps", name="nested", unmasking=static(MASKS))]
    config, output = write_study(tmp_path, task, methods), tmp_path / "toy.json"
    assert main(["--config", config, "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert "left out of toy, T=1: method 'nested': nested steps are verified at" in shown.err
    rows = json.loads(shown.out.splitlines()[-1])
    assert [row["method"] for row in rows] == ["all", "half", "one"]
    best = next(row for row in rows if row["best_plain"])
    assert best["judge_nll"] <= rows[0]["judge_nll"] + 0.01
    for row in rows:
        assert row["quality"] == {} and row["identical_share"] is None
        assert row["judge_nll"] > 0 and 0 < row["distinct_2"] <= 1
        bits = row["judge_nll"] / math.log(2)
        assert row["judge_bits_per_character"] == pytest.approx(bits, rel=1e-4)
    assert "judge NLL" in shown.out


def test_a_judge_reads_long_texts_in_overlapping_windows(models: Path) -> None:
    judge = CausalJudge(str(models / "judge"), "cpu")
    lm = PretrainedLM(str(models / "judge"), "float32")
    processor = TextProcessor(load_tokenizer(str(models / "judge")))

    def expected(text: str, most: int = 64) -> torch.Tensor:
        tokens = torch.tensor([processor.encode(text)[:most]])
        law = lm(tokens)[0, :-1].log_softmax(-1)
        return law.gather(1, tokens[0, 1:, None])[:, 0]

    torch.testing.assert_close(judge("12=", "3+4"), expected("12=3+4")[-3:])
    torch.testing.assert_close(judge("", "3+4"), expected("3+4"))
    assert judge("12=", "").shape == (0,)
    text = "0123456789" * 9  # 91 tokens in a context of 64
    long = judge("", text)
    assert long.shape == (90,) and long.isfinite().all()
    torch.testing.assert_close(long[:31], expected(text, 32))
    tail = torch.tensor([processor.encode(text)[64 - 32 :]])  # the second window
    law = lm(tail)[0, :-1].log_softmax(-1).gather(1, tail[0, 1:, None])[:, 0]
    torch.testing.assert_close(long[63:], law[31:])


def test_prompts_are_what_training_held_out(models: Path, tmp_path: Path) -> None:
    source, target = Countdown(num_puzzles=400), str(models / "target")
    processor = TextProcessor(load_tokenizer(target))
    options: dict[str, Any] = {
        "sequence_length": 48, "validation_fraction": 0.02, "test_fraction": 0.05,
        "cache_dir": str(tmp_path),
    }  # fmt: skip
    prompts = HeldOutCanvases(source, **options)
    found = prompts.read(4, target, processor)
    training = TextDataModule(
        [Sudoku(num_puzzles=100), source], tokenizer=target, pack=False, **options
    )
    held_out = {tuple(prompt) for prompt in training._split("test").prompts[1]}
    learned = {tuple(prompt) for prompt in training._split("train").prompts[1]}
    assert {tuple(question.tokens) for question in found} <= held_out
    assert not {tuple(question.tokens) for question in found} & learned
    assert all(COUNTDOWN_PROMPT.fullmatch(question.text) for question in found)
    assert prompts.read(4, target, processor) == found
    assert [q.tokens for q in NoPrompt().read(2, target, processor)] == [[0], [0]]


def test_the_fewest_steps_that_are_as_good_are_the_baseline() -> None:
    steps = [Point(16, 0.90), Point(8, 0.895), Point(4, 0.89), Point(2, 0.70)]
    assert fewest_steps(steps, 0) == 2  # one point worse is as good
    assert fewest_steps([*steps, Point(4, 0.91)], 0) == 4  # of equal calls the better
    # another order of full steps is better, so that less counts as good
    assert fewest_steps([*steps, Point(16, 0.902)], 0) == 1
    # a sampler with fewer steps may be better than all steps; it does not raise the bar
    assert fewest_steps([Point(16, 0.5), Point(8, 0.6), Point(4, 0.49), Point(2, 0.4)], 0) == 2
    nll = [Point(16, -2.0), Point(8, -2.005), Point(4, -2.02)]
    assert fewest_steps(nll, 0) == 1


def test_above_plain_is_above_the_line_through_its_best_points() -> None:
    steps = [Point(16, 0.9), Point(4, 0.5), Point(1, 0.1), Point(5, 0.4)]
    assert front(steps) == [Point(1, 0.1), Point(4, 0.5), Point(16, 0.9)]
    assert lies_above(Point(2, 0.31), steps) is True  # half-way in the logarithm: 0.3
    assert lies_above(Point(2, 0.29), steps) is False
    assert lies_above(Point(8, 0.71), steps) is True
    assert lies_above(Point(4, 0.5), steps) is False  # equal is not above
    assert lies_above(Point(32, 0.9), steps) is False
    assert lies_above(Point(32, 0.91), steps) is True
    assert lies_above(Point(0, 0.1), steps) is True  # as good as the cheapest, for nothing
    assert lies_above(Point(0, 0.05), steps) is None


def test_what_is_missing_is_refused_or_left_out_in_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = block("benchmark.DrafterAlone", name="gone", run=str(models / "gone"))
    begun = block("benchmark.SelfSpeculative", name="begun", run=str(models / "target"))
    config = write_study(tmp_path, puzzles(models), [PLAIN[0], gone, begun])
    output = tmp_path / "toy.json"
    assert main(["--config", config, "--output", str(output)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"'gone': there is no folder '{models}/gone'" in lines[0]
    assert "skip_missing: true leaves it out" in lines[0] and not output.exists()
    assert main(["--config", config, "--output", str(output), "--study.skip_missing", "true"]) == 0
    shown = capsys.readouterr()
    assert [row["method"] for row in json.loads(shown.out.splitlines()[-1])] == ["all"]
    assert "left out: toy: method 'begun'" in shown.err and "no finished drafter" in shown.err


def test_mistakes_are_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*methods: dict[str, Any], words: Sequence[str] = (), **options: Any) -> str:
        config = write_study(tmp_path, puzzles(models, **options), methods or PLAIN)
        output = str(tmp_path / "never.json")
        assert main(["--config", config, "--output", output, *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    assert "there is no task 'x'; there are toy" in refusal(words=["--study.only_tasks", "[x]"])
    assert "there is no method 'x'" in refusal(words=["--study.only_methods", "[x]"])
    causal = refusal(target=str(models / "judge"))
    assert "judge' is a causal language model, not a masked diffusion one" in causal
    assert "there is no folder" in refusal(target=str(models / "none"))
    assert "there is no folder" in refusal(judge=str(models / "none"))
    assert "there is no file of puzzles 'no'" in refusal(
        prompts=block("benchmark.PublishedPuzzles", path="no")
    )
    assert "needs a quality or a judge" in refusal(quality=None)
    assert "two methods named 'all'" in refusal(PLAIN[0], PLAIN[0])
    nested = block("benchmark.NestedSteps", name="nested", unmasking=static(4))
    assert "no PlainSampling method" in refusal(nested)
    rouge = refusal(quality=block("metrics.Rouge"))
    assert "Rouge needs references, which PublishedPuzzles do not have" in rouge
    assert "did you mean 'tasks'?" in refusal(
        block("benchmark.PlainSampling", name="x", unmasking=static(1), task=["toy"])
    )
    many = refusal(
        prompts=block("benchmark.NoPrompt"), words=["--study.num_prompts", "99999999999"]
    )
    assert "num_prompts must be at most 100000, not 99999999999" in many
    run = str(models / "run")
    scheduled = block("benchmark.DrafterAlone", name="x", run=run, unmasking=static(1))
    assert "a drafter's steps have no schedule" in refusal(*PLAIN, scheduled)


def test_options_are_checked_where_they_are_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested steps need an order, not 'random'"):
        NestedSteps("nested", StaticSchedule(4, "random"))
    gone = MaskedTask("gone", str(tmp_path / "gone"), NoPrompt(), Solved(solved))
    with pytest.raises(ValueError, match="must be at least 1"):
        MaskedStudy([gone], [PlainSampling("all", StaticSchedule(4))], batch_size=0).check()
    with pytest.raises(ValueError, match="no task is left"):
        MaskedStudy([gone], [], skip_missing=True).check()


def test_quality_is_of_what_the_pipeline_wrote(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tmp_path, puzzles(models), PLAIN[1:2])
    rows = measure(config, tmp_path / "toy.json", capsys)
    target = PretrainedMaskedLM(str(models / "target"), "float32").eval()
    processor = TextProcessor.from_pretrained(str(models / "target"))
    prompts = PublishedPuzzles(str(models / "puzzles.jsonl")).read(PUZZLES, "", processor)
    sampler = Sampler(StaticSchedule(MASKS // 2), limits=Limits(MASKS))
    done = MaskedPipeline(target, processor, sampler).complete([q.tokens for q in prompts], seed=0)
    right = [adds_up(q.text, c.text) for q, c in zip(prompts, done, strict=True)]
    assert rows[0]["quality"] == {"solved": pytest.approx(sum(right) / PUZZLES, rel=1e-4)}
