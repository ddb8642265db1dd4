"""generate.py with masked diffusion models: tiny ones, written to a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from specstream.cli import generate
from specstream.data.tokenizer import train_character_tokenizer
from specstream.drafters import MaskedDraftModel
from specstream.drafters.loading import save_drafter
from specstream.drafters.self_speculative import save_head
from specstream.models import PretrainedMaskedLM, SelfSpeculativeHead, UntrainedMaskedLM
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
    assert "remasked" in shown and "plain target" in shown and "16 steps" in shown
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
        ("head", "--canvas.guidance 1", "neither guidance nor block_tokens"),
        ("head", "--canvas.windows 0", "num_windows"),
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
