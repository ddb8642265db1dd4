"""Reading records: formats, and one clear line for everything that can be wrong."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from types import ModuleType

import pytest

from specstream.data.records import Location, Template, require_field


def fields(path: str) -> list[dict]:
    return [record for _, record in Location(path).records()]


def test_every_local_format_gives_the_same_records(tmp_path: Path, write_jsonl) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    records = [{"a": "x", "n": 1}, {"a": "ü\n", "n": 2}]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "r.parquet")
    assert fields(write_jsonl("r.jsonl", records)) == records
    assert fields(write_jsonl("r.jsonl.gz", records)) == records
    assert fields(str(tmp_path / "r.parquet")) == records


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    assert fields(str(tmp_path / "*.txt*")) == [{"text": "one\ntwo\n"}, {"text": "three"}]


def test_a_pattern_reads_its_files_in_sorted_order(write_jsonl, tmp_path: Path) -> None:
    write_jsonl("part-2.jsonl", [{"n": 2}])
    write_jsonl("part-1.jsonl", [{"n": 1}])
    assert fields(str(tmp_path / "part-*.jsonl")) == [{"n": 1}, {"n": 2}]


def test_a_missing_file_names_the_files_that_exist(write_jsonl, tmp_path: Path) -> None:
    write_jsonl("train.jsonl", [{"n": 1}])
    with pytest.raises(ValueError, match=r"trian\.jsonl' does not exist; .* has train\.jsonl"):
        Location(str(tmp_path / "trian.jsonl")).check()
    with pytest.raises(ValueError, match="nor does the folder"):
        Location(str(tmp_path / "nowhere" / "train.jsonl")).check()


def test_a_folder_or_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; name \.jsonl"):
        Location(str(tmp_path)).check()
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(ValueError, match="not of a known format"):
        Location(str(tmp_path / "table.csv")).check()


def test_hub_options_are_refused_for_local_files(write_jsonl) -> None:
    path = write_jsonl("a.jsonl", [{"n": 1}])
    with pytest.raises(ValueError, match="split and subset are for the hub"):
        Location(path, split="test").check()


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n\n{"n": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl' line 3 is not JSON"):
        fields(str(path))
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="line 1 holds a list, not an object"):
        fields(str(path))


def test_damaged_files_are_named(tmp_path: Path, write_jsonl) -> None:
    path = Path(write_jsonl("a.jsonl.gz", [{"n": i} for i in range(2000)]))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz' is damaged after line \d+"):
        fields(str(path))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"b\.parquet' is damaged after record 0"):
        fields(str(tmp_path / "b.parquet"))
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"c\.txt' cannot be read as text"):
        fields(str(tmp_path / "c.txt"))


def test_a_missing_field_names_the_fields_that_exist() -> None:
    with pytest.raises(ValueError, match="line 1: field 'txt' is missing; the record has id, text"):
        require_field("line 1", {"text": "a", "id": 0}, "txt")
    with pytest.raises(ValueError, match="field 'text' is null"):
        require_field("line 1", {"text": None}, "text")


def test_templates_take_fields_items_and_braces() -> None:
    record = {"q": "why", "turns": ["first", "second"], "n": 3}
    assert Template("{{{q}}} {turns[1]} {n}").fill("here", record) == "{why} second 3"
    with pytest.raises(ValueError, match="does not fit"):
        Template("{turns[7]}").fill("here", record)
    with pytest.raises(ValueError, match=r"template '\{q'"):
        Template("{q").fields()


def test_a_hub_id_is_loaded_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, subset: str | None, split: str) -> list[dict]:
        asked.append((path, subset, split))
        if path == "no/such":
            raise OSError("offline\nand more")
        return [{"text": "a"}]

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    location = Location("owner/name", split="test[:10]", subset="main")
    location.check()
    assert list(location.records()) == [("owner/name (test[:10]), record 1", {"text": "a"})]
    assert asked == [("owner/name", "main", "test[:10]")]
    with pytest.raises(ValueError, match=r"'no/such \(train\)' could not be loaded: offline$"):
        list(Location("no/such").records())
