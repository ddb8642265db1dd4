"""generate.py with masked diffusion models: tiny ones, written to a folder."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specstream import load_run
from specstream.cli import generate
from specstream.data.tokenizer import train_character_tokenizer
from specstream.drafters import MaskedDraftModel, TranslatedDrafter
from specstream.drafters.loading import save_drafter
from specstream.drafters.self_speculative import save_head
from specstream.generation import MaskedPipeline
from specstream.generation.autoregressive import AutoregressivePipeline
from specstream.generation.command import make_pipeline
from specstream.generation.command.options import parse_options
from specstream.generation.dual_diffusion import DualDiffusionPipeline
from specstream.generation.free_dave import FreeDavePipeline
from specstream.generation.lengths import CostModelLength
from specstream.generation.masked_loading import build_masked_pipeline
from specstream.generation.self_speculative_pipeline import SelfSpeculativePipeline
from specstream.models import (
    PretrainedMaskedLM,
    SelfSpeculativeHead,
    UntrainedLM,
    UntrainedMaskedLM,
)
from specstream.models.fingerprint import fingerprint
from specstream.processors import TextProcessor

PROMPT = "ab[MASK]d[MASK:3]"


def network(block_length: int | None = None, hidden_size: int = 32) -> UntrainedMaskedLM:
    return UntrainedMaskedLM(
        16, hidden_size, 48, 2, 2, max_positions=64, block_length=block_length, mask_id=1
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of a target, a drafter of it, a head on it, and a causal model's none."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = train_character_tokenizer(["abcdefghijkl"])
    target = folder / "target" / "model"
    network().save(target, tokenizer)
    processor, loaded = TextProcessor(tokenizer), PretrainedMaskedLM(str(target), "float32")
    drafter = MaskedDraftModel(loaded, lambda: network(4, 16))
    (folder / "drafter").mkdir()
    save_drafter(folder / "drafter" / "draft", drafter, processor, str(target))
    (folder / "head").mkdir()
    head = SelfSpeculativeHead(loaded)
    save_head(folder / "head" / "draft", head, str(target), fingerprint(loaded.model))
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = generate([str(argument) for argument in arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


@pytest.mark.parametrize("run", ["target", "drafter", "head"])
def test_a_run_fills_the_masks_of_a_prompt_and_nothing_else(
    runs: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, shown = answer(
        capsys, "--run", str(runs / run), "--prompt", PROMPT, "--ignore_eos", "true"
    )
    assert code == 0
    assert text.startswith("ab")
    assert "MASK" not in text and "<|mask|>" not in text
    assert "target calls" in shown


def test_a_prompt_without_masks_is_continued(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run", str(runs / "target"), "--prompt", "abc", "--max_new_tokens", "8"]
    code, _, shown = answer(capsys, *options, "--canvas.steps", "4")
    assert code == 0
    assert re.search(r"^target calls +4$", shown, re.MULTILINE)


def test_rounds_comparison_and_statistics_are_shown(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats.json"
    options = ["--show_drafts", "true", "--compare", "true", "--stats", str(stats)]
    code, _, shown = answer(
        capsys, "--run", str(runs / "drafter"), "--prompt", PROMPT, "--draft_tokens", "2", *options
    )
    assert code == 0
    assert "remasked" in shown and "plain target" in shown
    facts = json.loads(stats.read_text())
    assert facts["guarantee"] == "heuristic"
    assert facts["elements"] == 4
    assert facts["baseline_target_calls"] == 4  # one a mask


def test_nested_steps_say_what_the_plain_sampler_says(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run", str(runs / "target"), "--prompt", "abc", "--max_new_tokens", "8"]
    options += ["--dtype", "float32", "--ignore_eos", "true"]
    plain = answer(capsys, *options)
    nested = answer(capsys, *options, "--canvas.nested_steps", "3")
    assert plain[0] == nested[0] == 0
    assert plain[1] == nested[1]
    assert "exact greedy" in nested[2]


def test_a_file_of_prompts_is_filled_in_order(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "filled.jsonl"
    prompts.write_text('{"prompt": "a[MASK]"}\n{"prompt": "bc[MASK:2]"}\n{"prompt": "d[MASK]"}\n')
    options = ["--prompts", str(prompts), "--output", str(output), "--batch_size", "2"]
    code, _, _ = answer(capsys, "--run", str(runs / "drafter"), *options, "--ignore_eos", "true")
    assert code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"][0] for row in rows] == ["a", "b", "d"]
    assert [row["num_tokens"] for row in rows] == [1, 2, 1]


@pytest.mark.parametrize(
    ("run", "options", "line"),
    [
        ("target", "--lookup true", "config error: lookup: is for causal text"),
        ("target", "--canvas.block_tokens 3 --max_new_tokens 8", "does not divide max_new_tokens"),
        ("target", "--draft_tokens 2", "there is no drafter: a draft length has no use"),
        ("target", "--max_new_tokens 100", "exceeds the target's context of 64"),
        ("target", "--stop x", "stop strings have no meaning"),
        ("target", "--canvas.nested_steps 2 --temperature 1", "temperature 0 only"),
        ("drafter", "--canvas.nested_steps 2", "nested steps are the target's own"),
        ("drafter", "--canvas.copies 0", "copies must be at least 1"),
        ("drafter", "--canvas.copies 1", "it was not trained with corruption to score tokens"),
        ("head", "--canvas.guidance 1", "neither guidance nor block_tokens"),
        ("head", "--canvas.windows 0", "num_windows"),
        ("head", "--compile true", "verifies itself: compile has no use"),
        ("head", "--canvas.copies 3", "verifies itself: copies has no use"),
        ("head", "--canvas.max_target_calls 3", "verifies itself: max_target_calls has no use"),
        ("head", "--canvas.steps 8", "verifies itself: steps has no use"),
        ("head", "--canvas.order margin", "verifies itself: order has no use"),
        ("head", "--canvas.unmasking Threshold", "verifies itself: unmasking has no use"),
        ("head", "--canvas.sure 0.5", "verifies itself: sure has no use"),
        ("head", "--quantize both --draft_tokens 2", "a draft length, quantize have no use"),
        ("head", "--verifier ExactMatch", "ExactMatch judges canvases, a self-speculative head"),
        ("target", "--canvas.windows 2", "no self-speculative head: windows has no use"),
        ("drafter", "--canvas.windows 2", "no self-speculative head: windows has no use"),
        ("target", "--canvas.nested_steps 3 --draft_tokens 5", "draft length of 5 contradict"),
        ("target", "--canvas.sure 0.5", "there is no drafter: sure has no use"),
        ("drafter", "--canvas.sure 1.5", "sure must be in [0, 1], got 1.5"),
        ("drafter", "--verifier TokenRejection", "TokenRejection judges causal text, not canvases"),
    ],
)
def test_what_cannot_be_is_one_line(
    runs: Path, run: str, options: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, shown = answer(
        capsys, "--run", str(runs / run), "--prompt", "abc", *options.split()
    )
    assert code == 2
    assert text == ""
    assert line in shown
    assert shown.count("\n") == 1


def rows_of(shown: str) -> dict[str, int]:
    """Return the calls of each row of the table of `--compare`."""
    rows = re.findall(r"^(\S.*?) {2,}[\d.]+ +(\d+) +[\d.]+x +\S+$", shown, re.MULTILINE)
    return {name: int(calls) for name, calls in rows}


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ("", {"this run": 8, "plain, 4 steps": 4, "plain, 2 steps": 2}),
        ("--canvas.steps 4", {"this run": 4, "plain, 2 steps": 2, "plain, 1 step": 1}),
        ("--canvas.block_tokens 4", {"this run": 8, "plain, 2 steps": 4, "plain, 1 step": 2}),
        (
            "--canvas.nested_steps 8",
            {"this run": 0, "plain target": 8, "plain, 4 steps": 4, "plain, 2 steps": 2},
        ),
        (
            "--canvas.unmasking Threshold --canvas.unmasking.threshold 1",
            {"this run": 0, "plain, 4 steps": 4, "plain, 2 steps": 2},
        ),
    ],
)
def test_compare_takes_half_and_a_quarter_of_the_steps_that_are_made(
    runs: Path, options: str, rows: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--run", str(runs / "target"), "--prompt", "abc", "--max_new_tokens", "8"]
    common += ["--ignore_eos", "true", "--compare", "true"]
    code, _, shown = answer(capsys, *common, *options.split())
    assert code == 0
    found = rows_of(shown)
    assert list(found) == list(rows)
    assert all(found[name] == calls for name, calls in rows.items() if calls)


@pytest.mark.parametrize(("run", "temperature"), [("target", 0), ("drafter", 1), ("head", 1)])
def test_texts_that_are_drawn_are_not_called_identical_or_different(
    runs: Path, tmp_path: Path, run: str, temperature: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats.json"
    options = ["--temperature", str(temperature), "--compare", "true", "--stats", str(stats)]
    code, _, shown = answer(capsys, "--run", str(runs / run), "--prompt", PROMPT, *options)
    assert code == 0
    assert json.loads(stats.read_text())["identical"] is (None if temperature else True)
    assert ("plain target " in shown) == (run != "target")
    assert ("drawn" in shown) == bool(temperature)


def test_drafts_are_marked_as_the_legend_says_and_the_canvas_is_filled_once(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs_made = []
    fill = MaskedPipeline.generate

    def counted(self: MaskedPipeline, *prompts: Any, **options: Any) -> Iterator[Any]:
        runs_made.append(self)
        return fill(self, *prompts, **options)

    monkeypatch.setattr(MaskedPipeline, "generate", counted)
    options = ["--run", str(runs / "drafter"), "--prompt", PROMPT, "--draft_tokens", "2"]
    code, text, shown = answer(capsys, *options, "--show_drafts", "true")
    assert code == 0 and len(runs_made) == 1
    assert answer(capsys, *options)[1] == text
    legend = "(+x) drafted and kept, (-) drafted and masked again, (*x) filled by the target"
    assert f"legend: {legend}, . masked\n" in shown
    rounds = re.findall(
        r"^ +\d+ (\d+) kept, (\d+) remasked, (\d+) by the target\n +(.*)$", shown, re.MULTILINE
    )
    assert sum(int(kept) + int(own) for kept, _, own, _ in rounds) == 4
    for kept, remasked, own, canvas in rounds:
        assert canvas.count("(+") == int(kept)
        assert canvas.count("(-)") == int(remasked)
        assert canvas.count("(*") == int(own)
    assert any(int(remasked) for _, remasked, _, _ in rounds)


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_colours_unless_they_are_unwanted(
    runs: Path,
    no_color: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    options = ["--run", str(runs / "target"), "--prompt", PROMPT, "--show_drafts", "true"]
    _, _, shown = answer(capsys, *options)
    assert ("\x1b[" in shown) != no_color
    assert ("(*" in shown) == no_color


def test_a_head_takes_verifiers_of_chains(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--run", str(runs / "head"), "--prompt", PROMPT, "--verifier", "BlockRejection"]
    code, _, shown = answer(capsys, *options, "--temperature", "1")
    assert code == 0
    assert "exact law" in shown
    pipeline = make_pipeline(parse_options(options), "cpu")
    assert isinstance(pipeline, SelfSpeculativePipeline)
    assert type(pipeline.verifier).__name__ == "BlockRejection"


def test_the_cost_model_chooses_among_the_nested_steps_that_were_asked_for(runs: Path) -> None:
    options = ["--run", str(runs / "target"), "--prompt", "abc", "--draft_tokens", "auto"]
    pipeline = make_pipeline(parse_options([*options, "--canvas.nested_steps", "3"]), "cpu")
    assert isinstance(pipeline, FreeDavePipeline)
    assert pipeline.lengths == CostModelLength(3)


@pytest.mark.parametrize(
    "options", [["--prompt", "a[MASK:99999999999999]"], ["--max_new_tokens", "99999999999999"]]
)
def test_more_masks_than_memory_holds_are_refused(
    runs: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--prompt", "abc"] if "--prompt" not in options else []
    code, text, shown = answer(capsys, "--run", str(runs / "target"), *given, *options)
    assert (code, text) == (2, "")
    assert "more masked tokens than" in shown and shown.count("\n") == 1


def test_the_drafter_is_as_sure_as_it_was_built_unless_said(runs: Path) -> None:
    for options, sure in (([], 0.0), (["--canvas.sure", "0.9"], 0.9), (["--canvas.sure", "0"], 0)):
        arguments = ["--run", str(runs / "drafter"), "--prompt", PROMPT, *options]
        pipeline = make_pipeline(parse_options(arguments), "cpu")
        assert isinstance(pipeline, DualDiffusionPipeline)
        assert isinstance(pipeline.drafter, MaskedDraftModel)
        assert pipeline.drafter.sure == sure


def test_a_target_trained_with_corruption_is_shown_the_whole_draft_unless_said(
    runs: Path, tmp_path: Path
) -> None:
    tokenizer, trained = train_character_tokenizer(["abcdefghijkl"]), network()
    trained.form = replace(trained.form, corruption=0.1)
    trained.save(tmp_path / "model", tokenizer)
    drafter, processor = MaskedDraftModel(trained, lambda: network(4, 16)), TextProcessor(tokenizer)
    (tmp_path / "run").mkdir()
    save_drafter(tmp_path / "run" / "draft", drafter, processor, str(tmp_path / "model"))
    for run, copies in ((runs / "drafter", 2), (tmp_path / "run", 1)):
        for options, expected in (([], copies), (["--canvas.copies", "3"], 3)):
            arguments = ["--run", str(run), "--prompt", PROMPT, *options]
            pipeline = make_pipeline(parse_options(arguments), "cpu")
            assert isinstance(pipeline, DualDiffusionPipeline)
            assert pipeline.copies == expected


def test_only_a_masked_draft_model_is_told_how_sure_to_be(runs: Path) -> None:
    path = str(runs / "target" / "model")
    target = PretrainedMaskedLM(path, "float32")
    with pytest.raises(ValueError, match="sure is for a MaskedDraftModel, not for TranslatedDraft"):
        build_masked_pipeline(
            target,
            lambda t: TranslatedDrafter(t, lambda: PretrainedMaskedLM(path, "float32")),
            sure=0.5,
        )


def test_load_run_takes_masked_runs_too(runs: Path, tmp_path: Path) -> None:
    kinds = {
        "target": MaskedPipeline,
        "drafter": DualDiffusionPipeline,
        "head": SelfSpeculativePipeline,
    }
    for run, kind in kinds.items():
        pipeline = load_run(runs / run, dtype="float32", batch_size=2)
        assert type(pipeline) is kind
        (completion,) = pipeline.complete(["a[MASK]"], seed=0)
        assert len(completion.tokens) == 1
    tokenizer = train_character_tokenizer(["abcdefghijkl"])
    UntrainedLM(len(tokenizer), 16, 32, 1, 1).save(tmp_path / "model", tokenizer)
    assert isinstance(load_run(tmp_path, dtype="float32"), AutoregressivePipeline)
    with pytest.raises(TypeError, match="lookup"):
        load_run(runs / "target", lookup=True)
    with pytest.raises(ValueError, match=r"makes media: load it with .*load_media_run"):
        load_run(Path(__file__).parents[1] / "checkpoints/digits")


def test_windows_are_refused_for_a_target_that_is_spelled_out(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "target.yaml"
    model = {"class_path": "PretrainedMaskedLM", "init_args": {"path": str(runs / "target/model")}}
    config.write_text(json.dumps({"target": model}))
    options = ["--config", str(config), "--prompt", PROMPT]
    code, _, shown = answer(capsys, *options, "--canvas.windows", "2")
    assert code == 2
    assert shown == "config error: canvas.windows: is for a run with a self-speculative head\n"
    assert answer(capsys, *options)[0] == 0
