"""The parts of the benchmark by themselves: alternation, intervals, outputs, results, sweep."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from specstream.benchmark import FilePrompts, Study
from specstream.benchmark.command import main, make_parser, measure
from specstream.benchmark.distillation import Decoded, paired_difference
from specstream.benchmark.outputs import compare_greedy, repeated_share
from specstream.benchmark.prompts import gather
from specstream.benchmark.rows import DistillationRow as Line
from specstream.benchmark.rows import Machine, PairedDifference, Row
from specstream.benchmark.runners import Runner
from specstream.benchmark.sweep import DIVERGENCES, Sweep
from specstream.benchmark.timing import Measured, Plan, alternate, ratio_interval
from specstream.benchmark.trained_runs import TrainedRun, describe_block
from specstream.generation.ties import logit_gap
from specstream.sampling import Sampling, probabilities
from specstream.structures import Guarantee, Stats
from tests.toys import letters, toy_lm

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs/benchmark").glob("*.yaml"))
MACHINE = Machine("a CPU, 2 CPU cores", "float32", 1, {"torch": "2"}, "c0ffee1", False, "run it")


@dataclass
class Sleeper(Runner):
    """Decodes one token a prompt in a known time and writes down when."""

    variant: str
    seconds: float
    diary: list[str]
    stop_after: int = 10**9

    def run(
        self, prompts: Sequence[list[int]], indices: Sequence[int], seed: int
    ) -> list[list[int]]:
        if len(self.diary) >= self.stop_after:
            raise KeyboardInterrupt
        self.diary.append(self.variant)
        time.sleep(self.seconds)
        return [[index] for index in indices]


def plan(repeats: int = 2, warmups: int = 0) -> Plan:
    return Plan([[1]] * 3, [[0], [1], [2]], repeats, warmups, 0, "cpu")


def test_decoders_meet_each_block_in_turn_and_in_rotated_order() -> None:
    diary: list[str] = []
    found, complete = alternate([Sleeper("a", 0.002, diary), Sleeper("b", 0.008, diary)], plan())
    assert complete
    assert "".join(diary) == "abbaab" + "baabba"
    assert found[0].tokens == [[0], [1], [2]]
    assert found[0].total < found[1].total
    assert found[1].total >= 0.024


def test_everything_is_warm_before_anything_is_timed() -> None:
    diary: list[str] = []
    alternate([Sleeper("a", 0, diary), Sleeper("b", 0, diary)], plan(1, warmups=1))
    assert "".join(diary[:2]) == "ab" and len(diary) == 2 + 6


def test_an_interrupt_keeps_the_repeats_that_were_complete() -> None:
    diary: list[str] = []
    found, complete = alternate([Sleeper("a", 0, diary, stop_after=4)], plan(3))
    assert not complete and found[0].seconds.shape == (1, 3)
    with pytest.raises(KeyboardInterrupt):
        alternate([Sleeper("a", 0, [], stop_after=2)], plan(3))


def test_medians_over_repeats_forgive_one_slow_run() -> None:
    seconds = np.array([[1.0, 2.0], [1.0, 50.0], [1.0, 2.0]])
    assert Measured(Sleeper("a", 0, []), seconds, [[1], [2]]).total == 3.0


def test_the_interval_of_a_ratio_holds_the_ratio_and_narrows() -> None:
    below = np.random.default_rng(0).uniform(1, 2, 400)
    above = 2 * below + np.random.default_rng(1).normal(0, 0.2, 400)
    few, many = ratio_interval(above[:20], below[:20]), ratio_interval(above, below)
    assert many[0] < above.sum() / below.sum() < many[1]
    assert many[1] - many[0] < few[1] - few[0]


def test_repeated_4_grams_are_those_that_occurred_before() -> None:
    assert repeated_share([[1, 2, 3, 4, 5, 6]]) == 0
    assert repeated_share([[1] * 8]) == pytest.approx(4 / 5)  # five 4-grams, all alike
    assert repeated_share([[1, 2]]) is None


def test_a_difference_within_rounding_is_a_tie_and_any_other_is_not() -> None:
    lm = toy_lm().to(torch.bfloat16)
    prompt = [0, 1, 2]
    logits = lm(torch.tensor([prompt]))[0, -1].float()
    order = logits.argsort(descending=True).tolist()
    gap = logit_gap(lm, prompt, order[0], order[-1])
    assert gap.size == pytest.approx(float(logits[order[0]] - logits[order[-1]]), abs=0.2)
    far = compare_greedy(lm, [prompt], [[order[-1]]], [[order[0]]])
    assert (far.identical, far.ties, far.differences) == (False, 0, int(not gap.is_tie)) == (
        False, 0, 1,
    )  # fmt: skip
    with torch.no_grad():
        lm.head.weight[order[1]] = lm.head.weight[order[0]]
    tied = compare_greedy(lm, [prompt], [[order[1]]], [[order[0]]])
    assert (tied.identical, tied.ties, tied.differences, tied.largest_gap) == (False, 1, 0, 0.0)
    short = compare_greedy(lm, [prompt], [[order[0], 1]], [[order[0]]])
    assert short.differences == 1
    assert compare_greedy(lm, [prompt], [[1]], [[1]]).identical


def test_a_repetition_penalty_is_part_of_the_gap() -> None:
    lm, prompt = toy_lm(), [0, 1, 2]
    scores = lm(torch.tensor([prompt]))[0, -1].double()
    seen = torch.tensor([True, True, True, False, False])
    law = probabilities(scores, Sampling(repetition_penalty=1.5), seen).log()
    for one, other in ((0, 3), (1, 2), (3, 4)):
        expected = abs(float(law[one] - law[other]))
        assert logit_gap(lm, prompt, one, other, 1.5).size == pytest.approx(expected, rel=1e-4)


def test_prompts_are_taken_from_the_sources_in_turn_and_cut_to_be_ragged(tmp_path: Path) -> None:
    for name, letter in (("one", "a"), ("two", "b")):
        lines = [json.dumps({"prompt": letter * (i + 8)}) + "\n" for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines * 2))
    sources = [FilePrompts(str(tmp_path / f"{name}.jsonl")) for name in ("one", "two")]
    prompts = gather(sources, 5, "", letters())
    assert [prompt[0] for prompt in prompts] == [0, 1, 0, 1, 0]
    ragged = gather(sources, 5, "", letters(), ragged=True)
    shares = [len(r) / len(p) for r, p in zip(ragged, prompts, strict=True)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 0.25], abs=0.1)
    with pytest.raises(ValueError, match="9 different prompts, not 10"):
        gather(sources[:1], 10, "", letters())


def decoded(seed: int, committed: list[float], rounds: list[float]) -> Decoded:
    run = TrainedRun(Path("run"), "ForwardKL", seed, 1, "")
    stats = Stats("text", Guarantee.EXACT_LAW)
    return Decoded(run, stats, np.array(committed), np.array(rounds))


def test_taus_are_compared_seed_by_seed_with_a_t_interval() -> None:
    base = [decoded(s, [10 * t], [10]) for s, t in enumerate((2.0, 2.2, 2.1))]
    better = [decoded(s, [10 * t], [10]) for s, t in enumerate((2.3, 2.6, 2.4))]
    found = paired_difference(better, base)
    assert (found.pairs, found.interval_over) == (3, "seeds")
    assert found.difference == pytest.approx(1 / 3)
    assert found.relative == pytest.approx(1 / 6.3)
    half = 4.303 * np.std([0.3, 0.4, 0.3], ddof=1) / np.sqrt(3)
    assert found.interval == pytest.approx((1 / 3 - half, 1 / 3 + half))
    assert paired_difference(base, base) == PairedDifference()
    one = paired_difference([decoded(0, [30, 20], [10, 10])], [decoded(0, [20, 20], [10, 10])])
    assert one.interval_over == "prompts" and one.difference == pytest.approx(0.5)


def test_a_divergence_is_named_with_the_options_that_are_not_its_defaults() -> None:
    place = "specstream.divergences."
    inner = {"class_path": f"{place}ForwardKL", "init_args": {"temperature": 1.0}}
    block = {"class_path": f"{place}DPace", "init_args": {"gamma": 5, "divergence": inner}}
    assert describe_block(block) == "DPace"
    block["init_args"] = {"gamma": 7, "divergence": {"class_path": f"{place}ReverseKL"}}
    assert describe_block(block) == "DPace(gamma=7, divergence=ReverseKL)"
    assert (
        describe_block({"class_path": f"{place}JSD", "init_args": {"beta": 0.1}}) == "JSD(beta=0.1)"
    )


def line(method: str) -> Line:
    return Line(
        task="toy", method=method, baseline="CrossEntropy", sampling="greedy", num_prompts=1,
        max_new_tokens=8, drafted=2, steps=1, seeds=[0], taus=[2.0], tau=2.0, alpha=0.5,
        alphas=[0.5, 0.4], difference=PairedDifference(), machine=MACHINE,
    )  # fmt: skip


class Interrupted(Study):
    """Finishes one row, then Ctrl-C arrives."""

    def check(self) -> None:
        """Nothing to check."""

    def run(self, arguments: Sequence[str]) -> Iterator[list[Row]]:
        yield [line("CrossEntropy")]
        raise KeyboardInterrupt


def test_an_interrupt_keeps_finished_rows_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(Interrupted(), tmp_path / "out.json", []) == 130
    shown = capsys.readouterr()
    assert "1 finished rows are kept" in shown.err
    rows = json.loads(shown.out.splitlines()[-1])
    assert rows == json.loads((tmp_path / "out.json").read_text())
    assert rows[0]["method"] == "CrossEntropy" and rows[0]["hardware"] == MACHINE.hardware
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_benchmark_builds_its_study(path: Path) -> None:
    parser = make_parser()
    study = parser.instantiate(parser.parse_args(["--config", str(path)])).study
    assert isinstance(study, Study)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speed = {"class_path": "specstream.benchmark.SpeedStudy"}
    plain = {"class_path": "specstream.benchmark.Plain"}
    eight = {"class_path": "specstream.benchmark.Transformers", "init_args": {"batch_size": 8}}
    task = {"name": "toy", "target": str(tmp_path / "none/here"), "prompts": []}
    path, output = tmp_path / "x.yaml", tmp_path / "x.json"

    def write(methods: list[Any], **options: Any) -> list[str]:
        setting = {"name": "one", "methods": methods}
        arguments = {"tasks": [task], "settings": [setting], **options}
        path.write_text(yaml.safe_dump({"study": speed | {"init_args": arguments}}))
        return ["--config", str(path), "--output", str(output)]

    assert "needs a Plain method of batch size 8" in refused(write([plain, eight]), capsys)
    assert "'toy' names no prompts" in refused(write([plain]), capsys)
    assert "no task 'x'; there are toy" in refused(write([plain], only_tasks=["x"]), capsys)
    assert "did you mean 'repeats'?" in refused(write([plain], repeat=1), capsys)
    output.write_text("[]")
    assert "exists; give --overwrite true" in refused(write([plain]), capsys)
    assert "study: give a --config" in refused([], capsys)


def test_a_sweep_trains_resumes_and_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    script = "import json, os, sys; print(json.dumps([sys.argv, os.environ['OMP_NUM_THREADS']]))"
    (tmp_path / "train.py").write_text(script)
    sweep = Sweep("recipe.yaml", "runs", 9, ["ForwardKL"], [0], ["ForwardKL"], [1])
    assert sweep.runs == [("ForwardKL", 0), ("ForwardKL", 1)]
    assert sweep.train(("ForwardKL", 1)) == 0
    words, threads = json.loads((tmp_path / "runs/ForwardKL-1.log").read_text())
    assert "--data.init_args.seed=1" in words and "--trainer.max_steps=9" in words
    assert words[-2:] == ["--overwrite", "true"] and threads == "1"
    run = sweep.run_folder("ForwardKL", 0)
    (run / "draft").mkdir(parents=True)
    (run / "last.ckpt").touch()
    resumed = sweep.command("ForwardKL", 0)
    assert resumed is not None and resumed[0] == sys.executable
    assert resumed[-2:] == ["--ckpt_path", "last"]
    (run / "draft/specstream.json").touch()
    assert sweep.command("ForwardKL", 0) is None
    with pytest.raises(ValueError, match="no divergence 'KL'"):
        Sweep("recipe.yaml", "runs", 9, ["KL"])
    shutil.rmtree(tmp_path / "runs")


def test_every_run_of_the_sweep_is_a_config_that_train_py_accepts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from specstream.training import command

    class Parsed(Exception):
        """Raised in place of building anything."""

    class ParseOnly(command.TrainCLI):
        def before_instantiate_classes(self) -> None:
            model = self.config["model"]["init_args"]
            raise Parsed(model["divergence"]["class_path"], self.config["seed_everything"])

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(command, "TrainCLI", ParseOnly)
    sweep = Sweep(folder="outputs/never", options=["--trainer.val_check_interval=100"])
    for name, seed in [(DIVERGENCES[0], 0), (DIVERGENCES[-1], 2)]:
        words = sweep.command(name, seed)
        assert words is not None
        with pytest.raises(Parsed) as found:
            command.run_training(words[2:])
        assert found.value.args == (f"specstream.divergences.{name}", seed)
