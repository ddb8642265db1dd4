"""generate.py from the outside: text, numbers, files, and one line for every mistake."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from specstream import load_run
from specstream.cli import generate
from specstream.generation import FixedLength, Limits, SpeculativePipeline, TextPipeline
from specstream.generation.command import comparison
from specstream.generation.command.display import TextDisplay
from specstream.generation.command.options import parse_options
from specstream.sampling import Sampling
from specstream.structures import Origin, Step
from tests.run_folders import processor, save_run, save_target

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs" / "generate").glob("*.yaml"))
PROMPT = "def read(path):"
KEYS = {
    "modality", "guarantee", "prompts", "elements", "target_calls", "target_rows", "draft_calls",
    "acceptance", "accepted_length", "seconds", "elements_per_second",
}  # fmt: skip
COMPARED = {"baseline_seconds", "baseline_target_calls", "speedup", "identical"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a run, a config that spells both out, and a file of prompts."""
    folder = tmp_path_factory.mktemp("generate")
    words = processor()
    target = save_target(folder / "target", words)
    save_run(folder / "run", target, words)
    (folder / "pair.yaml").write_text(
        f"""
target:
  class_path: specstream.models.PretrainedLM
  init_args: {{path: {target}}}
drafter:
  class_path: specstream.drafters.DraftModel
  init_args:
    model:
      class_path: specstream.models.PretrainedLM
      init_args: {{path: {folder}/run/draft}}
"""
    )
    prompts = [{"prompt": f"def f{i}(" + "line, " * (i % 3)} for i in range(5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return folder


def _options(folder: Path, *more: str) -> list[str]:
    short = ["--max_new_tokens", "10", "--draft_tokens", "3", "--ignore_eos", "true"]
    return ["--run", str(folder / "run"), *short, "--dtype", "float32", *more]


def _one(folder: Path, *more: str) -> list[str]:
    return _options(folder, "--prompt", PROMPT, *more)


def _many(folder: Path, output: Path, *more: str) -> list[str]:
    files = ["--prompts", str(folder / "prompts.jsonl"), "--output", str(output)]
    return _options(folder, *files, "--batch_size", "2", *more)


def _expected(folder: Path) -> str:
    pipeline = load_run(
        folder / "run", dtype="float32", lengths=FixedLength(3), limits=Limits(10, (), True)
    )
    return pipeline.complete([PROMPT], seed=0)[0].text


def test_the_text_goes_to_stdout_and_the_numbers_to_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(_one(folder)) == 0
    shown = capsys.readouterr()
    assert shown.out == PROMPT + _expected(folder) + "\n"
    names = [line.split("  ")[0] for line in shown.err.strip().splitlines()]
    assert names[:3] == ["guarantee", "tokens", "target calls"]
    assert {"accepted length", "acceptance", "alpha by position"} <= set(names)


def test_a_config_generates_what_the_run_generates(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _one(folder)
    options[:2] = ["--config", str(folder / "pair.yaml")]
    assert generate(options) == 0
    assert capsys.readouterr().out == PROMPT + _expected(folder) + "\n"


def test_drafts_are_marked_and_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(_one(folder, "--show_drafts", "true")) == 0
    shown = capsys.readouterr()
    text = shown.out.removeprefix(PROMPT)
    for mark in "[]<>{}":
        text = text.replace(mark, "")
    expected = _expected(folder)
    for mark in "[]<>{}":
        expected = expected.replace(mark, "")
    assert text == expected + "\n"
    assert "legend: drafted and accepted, [the target's correction]" in shown.err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_drafts_have_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    words = processor()
    tokens = words.tokenizer("for line")["input_ids"][1:]
    origins = [Origin.ACCEPTED] * (len(tokens) - 1) + [Origin.BONUS]
    display = TextDisplay(words, show_drafts=True, out=_Terminal())
    display.start("x")
    display.show(Step(0, tokens, origins, "for line", True))
    written = display.out.getvalue()  # type: ignore[attr-defined]
    assert written.startswith("\x1b[2mx\x1b[0m\x1b[32m")
    assert "\x1b[36m" in written
    assert display.shown == len(tokens)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_a_comparison_adds_its_keys_to_the_statistics(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], temperature: str
) -> None:
    stats = tmp_path / "stats.json"
    options = ["--temperature", temperature, "--compare", "true", "--stats", str(stats)]
    assert generate(_one(folder, *options)) == 0
    facts = json.loads(stats.read_text())
    assert facts.keys() >= KEYS | COMPARED
    assert facts["identical"] is (True if temperature == "0" else None)
    assert facts["baseline_target_calls"] == 10 > facts["target_calls"]
    rate = facts["baseline_seconds"] / facts["seconds"]
    assert facts["speedup"] == pytest.approx(rate * facts["elements"] / 10)
    assert capsys.readouterr().out.count(PROMPT) == 1  # only the first run streams


def test_statistics_without_a_comparison_hold_no_baseline(folder: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    stats.write_text("an older run")
    assert generate(_one(folder, "--stats", str(stats), "--overwrite", "true")) == 0
    facts = json.loads(stats.read_text())
    assert facts.keys() >= KEYS and not facts.keys() & COMPARED
    assert (facts["modality"], facts["elements"]) == ("text", 10)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.json"]


def test_a_first_difference_is_explained_by_the_targets_logits(folder: Path) -> None:
    plain = load_run(folder / "target", dtype="float32", sampling=Sampling(0.0), limits=Limits(4))
    right = comparison.decode(plain, PROMPT, 0)
    wrong = comparison.Run([*right.tokens[:2], (right.tokens[2] + 1) % 300], right.stats)
    said = comparison.difference(plain, PROMPT, wrong, right)
    assert said.startswith("from token 3, logit gap")
    assert said.endswith("more than rounding explains")
    longer = comparison.Run([*right.tokens, 5], right.stats)
    assert comparison.difference(plain, PROMPT, longer, right) == "5 tokens, the plain target 4"


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_file_of_prompts_is_decoded_alike_on_one_and_on_two_devices(
    folder: Path, tmp_path: Path
) -> None:
    one, two, stats = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "stats.json"
    assert generate(_many(folder, one)) == 0
    command = _many(folder, two, "--devices", "2", "--device", "cpu", "--stats", str(stats))
    done = subprocess.run(
        [sys.executable, "generate.py", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert two.read_text() == one.read_text()
    rows = _rows(one)
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[1]["prompt"] == "def f1(line, "
    assert json.loads(stats.read_text())["prompts"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.jsonl", "stats.json", "two.jsonl",
    ]  # fmt: skip
    shown = [line.split("  ")[0] for line in done.stderr.splitlines()]
    assert shown[0] == "guarantee", "nothing of third parties on the screen"
    assert shown[-1] == f"5 continuations written to {two}"


def _interrupted_after(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come after so many steps."""
    whole = TextPipeline.generate
    left = iter(range(num_steps))

    def cut(
        self: TextPipeline,
        prompts: Sequence[str],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
    ) -> Iterator[Step]:
        for step in whole(self, prompts, seed=seed, indices=indices):
            if next(left, None) is None:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(SpeculativePipeline, "generate", cut)


def test_ctrl_c_keeps_the_text_so_far(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _interrupted_after(3, monkeypatch)
    assert generate(_one(folder)) == 130
    shown = capsys.readouterr()
    begun = shown.out.removeprefix(PROMPT).removesuffix("\n")
    assert len(begun) > 0 and _expected_start(folder, begun, monkeypatch)
    assert shown.err.startswith("interrupted after ")
    assert len(shown.err.splitlines()) == 1


def _expected_start(folder: Path, begun: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.undo()
    return _expected(folder).startswith(begun)


def test_ctrl_c_keeps_the_prompts_that_were_finished(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "some.jsonl"
    _interrupted_after(25, monkeypatch)  # of about 40
    assert generate(_many(folder, output)) == 130
    num = len(_rows(output))
    assert 2 <= num < 5
    said = capsys.readouterr().err
    assert said == f"interrupted: {num} of 5 prompts finished, written to {output}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["some.jsonl"]


def test_an_output_is_replaced_only_when_asked(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "old.jsonl"
    output.write_text("old\n")
    assert generate(_many(folder, output)) == 2
    assert output.read_text() == "old\n"
    assert generate(_many(folder, output, "--overwrite", "true", "--limit", "1")) == 0
    assert len(_rows(output)) == 1


@pytest.mark.parametrize("name", ["output", "stats"])
def test_a_file_that_is_read_is_never_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    prompts = (folder / "prompts.jsonl").read_text()
    (tmp_path / "link.jsonl").symlink_to(folder / "prompts.jsonl")
    link = str(tmp_path / "link.jsonl")
    options = _many(folder, tmp_path / "o.jsonl", "--overwrite", "true", f"--{name}", link)
    assert generate(options) == 2
    assert capsys.readouterr().err == (
        f"config error: {name}: '{link}' is the file of --prompts, which it would replace\n"
    )
    assert (folder / "prompts.jsonl").read_text() == prompts


@pytest.mark.parametrize(
    ("device", "num_gpus", "found"), [("cpu", 0, "4 CPU cores"), ("cuda", 2, "2 GPUs")]
)
def test_more_devices_than_there_are_is_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    num_gpus: int,
    found: str,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    assert generate(_many(folder, tmp_path / "o", "--device", device, "--devices", "5")) == 2
    assert capsys.readouterr().err == f"config error: devices: 5 asked for, {found} found\n"


MISTAKES = {
    "--promt x": "config error: option 'promt' is not accepted; did you mean 'prompt'?",
    "--max_new_tokens ten": "config error: max_new_tokens: expected int, got 'ten'",
    "--quantize all": "config error: quantize: expected 'none' or 'target' or 'drafter' or 'both',"
    " got 'all'",
    "--verifier specstream.verification.BlockRejecton": "config error: verifier: there is no class"
    " 'BlockRejecton' in specstream.verification; did you mean 'BlockRejection'?",
    "--lengths FixedLength --lengths.max_token 3": "config error: lengths: option 'max_token' is"
    " not accepted by FixedLength; did you mean 'max_tokens'?",
    "--lengths FixedLength --lengths.max_tokens 99": "config error: max_tokens must lie in 0..64,"
    " not 99",
    "--temperature -1": "error: temperature must be 0 (greedy) or at least 0.0001, got -1.0",
    "--config /none/no.yaml": "config error: there is no file '/none/no.yaml'",
    "--prompts x.jsonl": "config error: prompt: give --prompt TEXT, or --prompts FILE with"
    " --output FILE; one of the two",
    "--drafter specstream.drafters.PromptLookup": "config error: drafter: a run has its own"
    " drafter; spell out the target too, in a --config",
    "--output x.jsonl": "config error: output: is for a file of prompts (--prompts FILE)",
    "--stats nowhere/x.json": "config error: stats: there is no folder 'nowhere'",
    "--device tpu9": "error: device 'tpu9' is not auto, cpu, cuda or cuda:N",
    "--run checkpoints/nope": "error: no run folder at 'checkpoints/nope'",
    "--max_new_tokens 900": "error: a prompt of 6 tokens and 900 new ones exceed the target's"
    " context of 256",
    "--run": "config error: run: needs a value: --run VALUE",
    "--run=": "config error: run: needs a value: --run checkpoints/NAME",
    "--prompt \udcff": "error: a prompt is no text: surrogates not allowed in '\\udcff'",
    "--chat true": "error: chat is on, but the tokenizer has no chat template",
}


@pytest.mark.parametrize("extra", MISTAKES)
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], extra: str
) -> None:
    assert generate([*_one(folder), *extra.split()]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", MISTAKES[extra] + "\n")


def test_a_prompt_that_does_not_fit_is_named_before_any_is_decoded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(_many(folder, tmp_path / "o.jsonl", "--max_new_tokens", "246")) == 2
    assert capsys.readouterr().err.startswith("error: prompt 3 of 5: a prompt of ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", ["# read a file", "null", "---", "a: b", "[1", "1.50", " x\n"])
def test_a_prompt_is_never_read_as_yaml(prompt: str) -> None:
    assert parse_options(["--run", "x", f"--prompt={prompt}"]).prompt == prompt


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_parses_without_models_or_network(path: Path) -> None:
    options = parse_options(["--config", str(path), "--prompt", "x", "--dtype", "float16"])
    assert options.dtype == "float16"
    if options.run is None:
        assert options.drafter is not None and "dtype='float16'" in repr(options.target)


def test_generating_on_one_device_does_not_import_lightning() -> None:
    program = (
        "import sys; from specstream.cli import generate;"
        "assert generate(['--run', 'nope', '--prompt', 'x']) == 2;"
        "import specstream.generation.command.many_prompts;"
        "assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
