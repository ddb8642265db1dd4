"""The report: all results on one page, and a summary whose lines are chosen by rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from specstream.benchmark.cells import Line
from specstream.benchmark.command import main
from specstream.benchmark.masked_tables import best_of_each_kind
from specstream.benchmark.media_tables import fewest_rounds
from specstream.benchmark.readme import BEGIN, END, render, update, with_section
from specstream.benchmark.results_page import read_results, render_page
from specstream.benchmark.rows import (
    STUDIES,
    DistillationRow,
    Machine,
    PairedDifference,
    as_json,
    write_rows,
)
from specstream.benchmark.tables import STUDY_TABLES
from specstream.benchmark.text_tables import fastest_exact, most_committed

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m specstream.benchmark --config configs/benchmark/done.yaml"
MACHINE = Machine("a CPU, 2 CPU cores", "float32", 1, {"torch": "2"}, "c0ffee1", False, COMMAND)
BASELINE = "CrossEntropy"


def trained(method: str, tau: float) -> DistillationRow:
    gap = None if method == BASELINE else tau - 2.0
    difference = PairedDifference(1, gap, gap, None if gap is None else (gap, gap), "prompts")
    return DistillationRow(
        task="toy", method=method, baseline=BASELINE, sampling="greedy", num_prompts=1,
        max_new_tokens=8, drafted=2, steps=1, seeds=[0], taus=[tau], tau=tau, alpha=0.5,
        alphas=[0.5, 0.4], difference=difference, machine=MACHINE,
    )  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two files of results with a plot each, and a config that was not measured."""
    folder, configs = tmp_path / "docs/results", tmp_path / "configs/benchmark"
    configs.mkdir(parents=True)
    for name in ("done", "gpu"):
        (configs / f"{name}.yaml").touch()
    for name in ("pair", "pair-batches"):
        rows = [trained(BASELINE, 2.0), trained("JSD", 1.5), trained("ForwardKL", 1.75)]
        write_rows(folder / f"{name}.json", rows)
        (folder / f"{name}-tau.png").touch()
    (tmp_path / "README.md").write_text(f"a\n{BEGIN}\nold\n{END}\nb\n")
    return folder


def test_the_report_writes_the_page_and_the_summary_once(results: Path, tmp_path: Path) -> None:
    readme, configs = tmp_path / "README.md", tmp_path / "configs/benchmark"
    page = results / "README.md"
    assert update(readme, results, configs) is True
    written = readme.read_text(), page.read_text()
    assert update(readme, results, configs) is False
    assert (readme.read_text(), page.read_text()) == written
    page.unlink()
    assert update(readme, results, configs) is True
    assert page.read_text() == written[1]
    assert written[0].startswith(f"a\n{BEGIN}\n") and written[0].endswith(f"\n{END}\nb\n")
    assert "old" not in written[0]


def test_the_page_holds_every_row_and_each_plot_with_its_own_file(results: Path) -> None:
    page = render_page(read_results(results), "../../README.md")
    for method in ("CrossEntropy | 1 | 2.000", "JSD | 1 | 1.500", "ForwardKL | 1 | 1.750"):
        assert page.count(f"| {method} |") == 2
    assert COMMAND in page and "[pair.json](pair.json)" in page
    assert "- [pair-batches](#pair-batches): toy, greedy" in page
    assert page.count("![pair-tau](pair-tau.png)") == 1
    assert page.count("![pair-batches-tau](pair-batches-tau.png)") == 1


def test_the_summary_links_to_all_rows_and_names_what_was_not_measured(
    results: Path, tmp_path: Path
) -> None:
    section = render(read_results(results), tmp_path / "configs/benchmark", tmp_path)
    link = "[pair](docs/results/README.md#pair)"
    assert f"| {link} | toy, greedy | CrossEntropy: 2.000 | ForwardKL | 1 | 1.750 |" in section
    assert "JSD" not in section and "Rule: of every task" in section
    assert "Not measured: `configs/benchmark/gpu.yaml`." in section
    assert MACHINE.hardware in section


def test_a_study_without_a_headline_is_a_link(results: Path, tmp_path: Path) -> None:
    rows = json.loads(as_json([trained(BASELINE, 2.0)]))
    (results / "pair.json").write_text(json.dumps(rows))
    section = render(read_results(results), tmp_path / "configs/benchmark", tmp_path)
    assert "Only there: [pair](docs/results/README.md#pair) (toy, greedy)." in section


def test_a_readme_without_a_place_for_results_is_refused(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"a\n{BEGIN}\nold\n{END}\nb\n"
    assert with_section(text, "new") == text.replace("old", "new")
    (tmp_path / "README.md").write_text(BEGIN)
    before = sorted(results.iterdir())
    with pytest.raises(ValueError, match="needs one <!-- results:begin -->"):
        update(tmp_path / "README.md", results, tmp_path / "configs/benchmark")
    assert sorted(results.iterdir()) == before
    assert main(["--report", "--readme", str(tmp_path / "none.md")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def speed(method: str, tokens: float, role: str = "ours", **more: Any) -> dict[str, Any]:
    gain = tokens / 100
    row = {
        "study": "speed", "method": method, "role": role, "guarantee": "exact law",
        "tokens_per_second": tokens, "speedup_vs_plain": gain, "batch_size": 1, "task": "toy",
        "setting": "one", "sampling": "T=1", "tau": 2.0, "quality": None, "identical": None,
        "speedup_interval": None if role == "plain" else [gain - 0.1, gain + 0.1],
        "variants": {"eager": 1.0}, "variant": "eager", "repeated_4grams": 0.0,
    }  # fmt: skip
    return row | more


def said(study: str, line: Line) -> dict[str, str]:
    """Return the cells of a line by their headings."""
    summary = STUDY_TABLES[study].summary
    assert summary is not None
    row = line.with_link("")
    return {column.heading: column.cell(row) for column in summary.columns}


def test_of_text_the_fastest_exact_method_stands_though_it_lost() -> None:
    rows = [
        speed("plain", 100, "plain"),
        speed("assisted", 300, "transformers assisted", guarantee=None),
        speed("typical", 200, guarantee="heuristic"),
        speed("slow", 50), speed("best", 90), speed("other", 70),
    ]  # fmt: skip
    (line,) = fastest_exact(rows)
    cells = said("speed", line)
    assert cells["best exact method"] == "best" and cells["speedup"] == "0.90x [0.80, 1.00]"
    assert cells["all exact methods"] == "3: 0.50x to 0.90x"
    assert cells["without a draft: tokens/s"] == "plain: 100"
    assert fastest_exact(rows[:3]) == []


def test_of_text_the_strongest_plain_decoding_of_the_same_batch_is_the_baseline() -> None:
    rows = [
        speed("plain", 100, "plain"), speed("generate", 125, "transformers", guarantee=None),
        speed("plain 8", 900, "plain", batch_size=8), speed("best", 150),
    ]  # fmt: skip
    cells = said("speed", fastest_exact(rows)[0])
    assert cells["without a draft: tokens/s"] == "generate: 125"
    assert cells["speedup"] == "1.20x"  # its interval is over our own plain decoding


def test_a_drafter_with_its_own_target_says_whose_law_it_keeps() -> None:
    score = {"quality": {"rouge1": 0.4}, "quality_plain": {"rouge1": 0.5}, "identical_share": None}
    own = {"study": "drafters", "baseline": "runs/a/model", **score}
    rows = [
        speed("plain", 100, "plain", target="runs/a/model", **own),
        speed("plain, tuned", 130, "plain", target="runs/b/target", **own),
        speed("streams", 120, target="runs/b/target", **own),
    ]  # fmt: skip
    cells = said("drafters", fastest_exact(rows)[0])
    assert cells["guarantee"] == "exact law, of b" and cells["speedup"] == "1.20x [1.10, 1.30]"
    assert cells["without a draft: tokens/s"] == "a: 100"
    assert cells["text, its quality (plain's)"] == "rouge1 40.00 (50.00)"


def test_of_trained_drafters_the_best_besides_the_baseline_stands() -> None:
    rows = json.loads(as_json([trained(BASELINE, 2.0), trained("a", 1.5), trained("b", 1.75)]))
    (line,) = most_committed(rows)
    assert line.row["method"] == "b" and line.row["difference"] == -0.25
    assert most_committed(rows[:1]) == most_committed(rows[1:]) == []


def filling(method: str, kind: str, calls: float, solved: float, gain: float) -> dict[str, Any]:
    return {
        "method": method, "kind": kind, "target_calls": calls, "quality": {"solved": solved},
        "speedup_vs_best": gain, "reference": "all", "best_plain": method == "half",
    }  # fmt: skip


def test_of_fillings_the_fastest_of_a_kind_that_is_as_good_stands() -> None:
    rows = [
        filling("all", "plain", 16, 0.90, 0.5), filling("half", "plain", 8, 0.895, 1.0),
        filling("one", "plain", 1, 0.2, 9.0),
        filling("same", "nested steps", 8, 0.9, 0.6), filling("slow", "nested steps", 4, 0.9, 0.4),
        filling("worse", "draft and verify", 2, 0.88, 3.0),
        filling("near", "draft and verify", 3, 0.89, 2.0),
        filling("bad", "drafter alone", 0, 0.3, 5.0), filling("fast", "drafter alone", 0, 0.1, 9.0),
    ]  # fmt: skip
    lines = best_of_each_kind(rows)
    assert [line.row["method"] for line in lines] == ["same", "near", "bad"]
    assert {line.beside["plain"]["method"] for line in lines} == {"half"}


def sampler(
    method: str, kind: str, rounds: float, distance: float, guarantee: str = "exact law",
    law: str = "the target's",
) -> dict[str, Any]:  # fmt: skip
    return {
        "task": "toy", "setting": "9 steps", "method": method, "kind": kind, "rounds": rounds,
        "data_distance": distance, "data_noise": 0.1, "guarantee": guarantee, "law": law,
        "reference": "plain", "speedup_alone": 1.5, "speedup_alone_interval": [1.5, 1.5],
        "round_ratio": 2.0, "speedup_in_batch": 0.5,
    }  # fmt: skip


def test_of_samplers_the_exact_one_with_the_fewest_rounds_stands_beside_what_is_as_near() -> None:
    rows = [
        sampler("plain", "plain", 9, 0.3), sampler("six", "plain", 6, 0.39),
        sampler("two", "equal rounds", 2, 0.5), sampler("free", "free draft", 5, 0.3),
        sampler("int8", "trained draft", 3, 0.3, law="the target's (target in int8)"),
        sampler("residual", "trained draft", 4, 0.9),
        sampler("student", "student", 0, 0.35, "heuristic"),
        sampler("rough", "refined", 0, 0.45, "heuristic"),
    ]  # fmt: skip
    (line,) = fewest_rounds(rows)
    cells = said("media", line)
    assert cells["exact method"] == "residual" and cells["rounds (plain's)"] == "4.00 (9.00)"
    assert cells["speedup alone"] == "1.50x" and cells["in a batch"] == "0.50x"
    assert cells["target alone, as near"] == "six: 6 rounds, 1.50x"
    assert cells["no promise, as near"] == "student: 0 rounds, 1.50x"
    assert fewest_rounds(rows[:3]) == []
    (line,) = fewest_rounds([rows[0], rows[-2]])
    assert said("media", line)["exact method"] == "none measured"
    assert said("media", line)["fewer"] == ""


def test_every_study_has_its_tables() -> None:
    assert set(STUDY_TABLES) == STUDIES


def test_the_readme_and_the_page_agree_with_the_committed_results() -> None:
    files = read_results(ROOT / "docs/results")
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/results/README.md"))
    section = render(files, ROOT / "configs/benchmark", ROOT)
    stale = "run python -m specstream.benchmark --report"
    assert with_section(readme, section) == readme, stale
    assert render_page(files, "../../README.md") == page, stale


def anchors(text: str) -> set[str]:
    """Return the anchors that headings get where Markdown is shown."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", ["README.md", *(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]
)
def test_a_link_to_a_place_in_the_repository_finds_it(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text()), link
