"""The benchmark: fair alternation, honest numbers, results that survive an interrupt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from specstream.benchmark import Speculative
from specstream.benchmark.cells import markdown
from specstream.benchmark.command import main
from specstream.benchmark.tables import make_tables
from specstream.data.tokenizer import train_tokenizer
from specstream.drafters import DraftModel
from specstream.drafters.loading import save_drafter
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from tests.toys import nearby, toy_lm

VOCABULARY = 300
WORDS = (
    "draft",
    "short",
    "and",
    "the",
    "target",
    "checks",
    "it",
    "in",
    "one",
    "pass",
    "then",
    "both",
)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a drafter near it and a file of prompts, in one folder."""
    folder = tmp_path_factory.mktemp("models")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=12)) for _ in range(40)]
    processor = TextProcessor(train_tokenizer(texts, VOCABULARY))
    target = toy_lm(VOCABULARY, num_layers=2, sharpness=10.0)
    target.save(folder / "target", processor.tokenizer)
    draft = nearby(target, 0.1)
    for name, lm in (("run/draft", draft), ("data/draft", nearby(target, 0.5))):
        (folder / name).parent.mkdir()
        drafter = DraftModel(target, lambda lm=lm: lm)  # type: ignore[misc]
        save_drafter(folder / name, drafter, processor, str(folder / "target"))
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder


def block(name: str, /, **options: Any) -> dict[str, Any]:
    return {"class_path": f"specstream.benchmark.{name}", "init_args": options}


def fixed(max_tokens: int) -> dict[str, Any]:
    return {
        "class_path": "specstream.generation.FixedLength",
        "init_args": {"max_tokens": max_tokens},
    }


def setting(name: str, methods: list[dict[str, Any]], /, **options: Any) -> dict[str, Any]:
    return {"name": name, "methods": methods, "max_new_tokens": 8, "num_prompts": 4, **options}


def write_study(models: Path, folder: Path, settings: list[dict[str, Any]], **options: Any) -> str:
    task = {
        "name": "toy",
        "target": str(models / "target"),
        "draft": str(models / "run"),
        "data_only_draft": str(models / "data"),
        "prompts": [block("FilePrompts", path=str(models / "prompts.jsonl"))],
    }
    study = {"tasks": [task], "settings": settings, "repeats": 1, "warmups": 1, "dtype": "float32"}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump({"study": block("SpeedStudy", **study | options)}))
    return str(path)


COST_MODEL = {
    "class_path": "specstream.generation.CostModelLength",
    "init_args": {"max_tokens": 2},
}
ALL_METHODS = [
    block("Plain"),
    block("Transformers"),
    block("TransformersAssisted", constant=3),
    block("Speculative", name="lookup", draft=None, lookup=True, lengths=fixed(4)),
    block("Speculative", name="fixed", lengths=fixed(3)),
    block("Speculative", name="cost model + lookup", lookup=True, lengths=COST_MODEL),
    block("Speculative", name="data only", draft="data_only", lengths=fixed(3)),
    block("Speculative", name="untrained", draft="untrained", lengths=COST_MODEL),
]


def measure(
    config: str, output: Path, capsys: pytest.CaptureFixture[str], *words: str
) -> list[dict[str, Any]]:
    assert main(["--config", config, "--output", str(output), *words]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert rows == json.loads(output.read_text())
    return rows


def test_every_method_is_measured_and_greedy_text_is_the_targets(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = setting("greedy", ALL_METHODS, sampling={"temperature": 0})
    rows = measure(write_study(models, tmp_path, [greedy]), tmp_path / "toy.json", capsys)
    assert [row["method"] for row in rows] == [
        "plain", "transformers generate", "transformers assisted",
        *(m["init_args"]["name"] for m in ALL_METHODS[3:]),
    ]  # fmt: skip
    for row in rows:
        assert row["elements"] == 4 * 8
        assert row["differences"] in (None, 0)
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"], rel=1e-4)
        plain = rows[0]["seconds"] / row["seconds"]
        assert row["speedup_vs_plain"] == pytest.approx(plain, rel=1e-4)
        assert row["speedup_vs_hf"] == pytest.approx(rows[1]["seconds"] / row["seconds"], rel=1e-4)
    assert all(row["identical"] for row in rows[1:])
    assert set(rows[2]["variants"]) == {"defaults", "constant 3"}
    by_name = {row["method"]: row for row in rows}
    assert by_name["fixed"]["mean_length"] == 3
    assert by_name["fixed"]["tau"] > by_name["untrained"]["tau"]
    assert (tmp_path / "toy-speedup.png").is_file() and (tmp_path / "toy-alpha.png").is_file()


def test_a_drafter_in_int8_is_a_row_of_its_own_beside_the_same_one(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"lengths": fixed(3)}
    methods = [
        block("Plain"),
        block("Speculative", name="coarse", quantize="int8_weight_only", **options),
        block("Speculative", name="as it is", **options),
    ]
    greedy = setting("greedy", methods, sampling={"temperature": 0})
    rows = measure(write_study(models, tmp_path, [greedy]), tmp_path / "toy.json", capsys)
    assert [row["identical"] for row in rows] == [None, True, True]
    assert rows[0]["bytes_ratio"] is rows[2]["bytes_ratio"] is None
    assert 0.5 < rows[1]["bytes_ratio"] < 1
    assert "| int8 / bf16 bytes |" in markdown(make_tables(rows)[0])
    options["name"], options["quantize"] = "wrong", "int8_dynamic"
    methods = [block("Plain"), block("Speculative", **options)]
    config = write_study(models, tmp_path, [setting("x", methods)], compile=True, device="cpu")
    assert main(["--config", config, "--output", str(tmp_path / "x.json")]) == 2
    assert "not computed right when it is compiled" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'copies' has no draft whose weights could be int8"):
        Speculative("copies", draft=None, lookup=True, quantize="int8_dynamic")


def test_the_bound_follows_from_the_measured_times(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = setting("sampled", [block("Plain"), ALL_METHODS[4]])
    rows = measure(write_study(models, tmp_path, [sampled]), tmp_path / "toy.json", capsys)
    row = rows[1]
    bound = row["tau"] * row["t_plain"] / (row["t_verify"] + row["t_draft"])
    assert row["bound"] == pytest.approx(bound, rel=1e-4)
    assert row["efficiency"] == pytest.approx(row["speedup_vs_plain"] / bound, rel=1e-4)
    assert row["eta"] == pytest.approx(row["speedup_vs_plain"] / row["tau"], rel=1e-4)
    low, high = row["speedup_interval"]
    assert low <= row["speedup_vs_plain"] <= high
    assert row["identical"] is None and rows[0]["speedup_vs_plain"] == 1
    assert row["hardware"] and row["versions"]["torch"] and row["command"].endswith("toy.json")


def test_ragged_batches_are_compared_with_plain_ones_of_their_size(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [
        block("Plain"),
        block("Plain", batch_size=2),
        block("Transformers", batch_size=2),
        block("Speculative", name="fixed", lengths=fixed(2), batch_size=2),
    ]
    ragged = setting("ragged", methods, ragged=True, sampling={"temperature": 0})
    rows = measure(write_study(models, tmp_path, [ragged]), tmp_path / "toy.json", capsys)
    assert [row["method"] for row in rows][1:] == [
        "plain, batch 2", "transformers generate, batch 2", "fixed, batch 2",
    ]  # fmt: skip
    assert rows[3]["speedup_vs_plain"] == pytest.approx(
        rows[1]["seconds"] / rows[3]["seconds"], rel=1e-4
    )
    assert rows[1]["speedup_vs_batch_1"] == pytest.approx(
        rows[0]["seconds"] / rows[1]["seconds"], rel=1e-4
    )
    assert rows[0]["speedup_vs_batch_1"] is None
    assert rows[2]["identical"] and rows[3]["identical"]


def test_divergences_are_compared_by_decoding_alone(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, divergence in (("run", "ForwardKL"), ("data", "CrossEntropy")):
        block_of = {"class_path": f"specstream.divergences.{divergence}"}
        config = {
            "seed_everything": 0,
            "model": {"init_args": {"divergence": block_of, "on_policy_fraction": 0.0}},
            "trainer": {"max_steps": 5},
        }
        (models / folder / "config.yaml").write_text(yaml.safe_dump(config))
    study = {
        "name": "toy",
        "target": str(models / "target"),
        "runs": str(models / "*"),
        "prompts": [block("FilePrompts", path=str(models / "prompts.jsonl"))],
        "num_prompts": 4,
        "max_new_tokens": 16,
        "drafted": 3,
        "batch_size": 2,
        "dtype": "float32",
    }
    path = tmp_path / "divergences.yaml"
    path.write_text(yaml.safe_dump({"study": block("DistillationStudy", **study)}))
    rows = measure(str(path), tmp_path / "out.json", capsys)
    assert [(row["method"], row["sampling"]) for row in rows] == [
        ("CrossEntropy", "T=1"), ("ForwardKL", "T=1"),
        ("CrossEntropy", "greedy"), ("ForwardKL", "greedy"),
    ]  # fmt: skip
    near = rows[1]
    assert near["tau"] > rows[0]["tau"] and near["difference"] == pytest.approx(
        near["tau"] - rows[0]["tau"], rel=1e-3
    )
    assert near["interval"][0] <= near["difference"] <= near["interval"][1]
    assert rows[0]["difference"] is None and near["steps"] == 5
    assert (tmp_path / "out-tau.png").is_file()


def test_drafters_are_compared_up_to_the_ends_of_their_texts(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {"run": ("BlockDrafter", {"markov_rank": 4}), "data": ("Eagle3", {})}
    for folder, (name, options) in kinds.items():
        drafter = {"class_path": f"specstream.drafters.{name}", "init_args": options}
        config = {
            "seed_everything": 0,
            "model": {"init_args": {"drafter": drafter}},
            "trainer": {"max_steps": 5},
        }
        (models / folder / "config.yaml").write_text(yaml.safe_dump(config))
    study = {
        "name": "toy",
        "target": str(models / "target"),
        "runs": str(models / "*"),
        "compared": "drafter",
        "baseline": "Eagle3",
        "prompts": [block("FilePrompts", path=str(models / "prompts.jsonl"))],
        "num_prompts": 4,
        "max_new_tokens": 70,
        "ignore_eos": False,
        "drafted": None,
        "samplings": [{"temperature": 1.0}],
    }
    path = tmp_path / "drafters.yaml"
    path.write_text(yaml.safe_dump({"study": block("DistillationStudy", **study)}))
    rows = measure(str(path), tmp_path / "out.json", capsys)
    assert [row["method"] for row in rows] == ["Eagle3", "BlockDrafter, sequential"]
    assert rows[1]["tau"] > rows[0]["tau"] and rows[1]["pairs"] == 1


def test_tau_by_prompt_adds_up_to_the_pipelines_own(models: Path) -> None:
    from specstream.benchmark import DistillationStudy, FilePrompts
    from specstream.benchmark.pair import Pair
    from specstream.benchmark.prompts import gather
    from specstream.benchmark.trained_runs import TrainedRun

    source = FilePrompts(str(models / "prompts.jsonl"))
    study = DistillationStudy(
        "toy", str(models / "target"), "*", [source], max_new_tokens=13, drafted=4, batch_size=3
    )
    pair = Pair(study.task, "float32", "cpu", "sdpa")
    prompts = gather([source], 5, "", pair.processor, ragged=True)
    run = TrainedRun(models / "run", "ForwardKL", 0, 1, "")
    found = study.decode(pair, run, prompts, Sampling())
    assert found.tau == found.stats.accepted_length
    assert found.rounds.sum() == found.stats.full_rounds
