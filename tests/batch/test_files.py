"""An answered job in each format: the same rows from every input into every output, whatever their values."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from adapter_hub.batch import files as files_module
from adapter_hub.batch.files import JobFiles, finish, line_of
from adapter_hub.batch.job import run_job
from adapter_hub.examples import BadRow, read_rows, text_fault

FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: not text_fault(text))


def answer(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"adapter": "a@1" if len(text) % 2 else None, "score": len(text) / 8, "label": text[:1]} for text in texts]


def job(source: Path, output: Path) -> list[dict[str, Any]]:
    """The answered rows, as the package itself reads them again."""
    run_job(source, output, answer, settings={}, overwrite=True)
    rows = [row for _, row in read_rows(output)]
    assert not any(isinstance(row, BadRow) for row in rows)
    return rows  # type: ignore[return-value]


def as_strings(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What a CSV holds of them."""
    return [{key: "" if value is None else value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows]


def finished(tmp_path: Path, rows: list[dict[str, Any]], suffix: str) -> Path:
    files = JobFiles(tmp_path / f"out{suffix}")
    files.partial.write_bytes(b"".join(line_of(row) for row in rows))
    finish(files)
    assert [path.name for path in tmp_path.iterdir()] == [files.output.name]
    return files.output


@pytest.mark.parametrize("into", [*FORMATS, ".jsonl.gz"])
def test_every_input_gives_the_same_rows_in_every_output(tmp_path: Path, into: str) -> None:
    rows = [{"id": str(i), "text": 'a "b", c\t\n' + "é" * i, "label": f"t{i}", "note": "" if i % 2 else "n\r"} for i in range(20)]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = tmp_path / f"in{into}"
    if into == ".jsonl.gz":
        source.write_bytes(gzip.compress(plain.read_bytes()))
    else:
        run_job(plain, source, lambda texts: [{} for _ in texts], settings={})
    outputs = {suffix: job(source, tmp_path / f"out{suffix}") for suffix in FORMATS}
    expected = [
        {"id": row["id"], "text": row["text"], "target": row["label"], "note": row["note"], **made}
        for row, made in zip(rows, answer([row["text"] for row in rows]), strict=True)
    ]
    for suffix, found in outputs.items():
        assert as_strings(found) == as_strings(expected), suffix
    for suffix in (".jsonl", ".ndjson", ".parquet"):
        assert outputs[suffix] == expected


@hypothesis_settings(max_examples=20)
@given(st.lists(st.tuples(TEXTS, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), min_size=1, max_size=18))
def test_any_text_comes_out_of_every_format_as_it_went_in(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = folder / "in.jsonl"
    source.write_bytes(b"".join(line_of({"text": text, "note": note}) for text, note in pairs))
    for suffix in FORMATS:
        assert [(row["text"], row["note"]) for row in job(source, folder / f"out{suffix}")] == pairs, suffix
        assert [row["text"] for row in job(folder / f"out{suffix}", folder / "again.jsonl")] == [text for text, _ in pairs], suffix


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@hypothesis_settings(max_examples=20)
@given(st.lists(st.fixed_dictionaries({"text": TEXTS}, optional=dict.fromkeys(["a", "b", "ünï,\n"], JSON_VALUES)), min_size=1, max_size=15))
def test_fields_of_any_kind_travel_through_every_format(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("kinds")
    source = folder / "in.jsonl"
    source.write_bytes(b"".join(line_of(row) for row in rows))
    kept = [json.loads(line) for line in source.read_bytes().splitlines()]
    for suffix in FORMATS:
        for found, row in zip(job(source, folder / f"out{suffix}"), kept, strict=True):
            for key, value in row.items():
                if suffix in (".jsonl", ".ndjson"):
                    assert found[key] == value and type(found[key]) is type(value)
                elif suffix == ".parquet" and not isinstance(found[key], str):
                    assert found[key] == value
                elif isinstance(value, str) or value is None:
                    assert found[key] == (value or ""), (suffix, key)
                else:
                    assert json.loads(found[key]) == value, (suffix, key)


def test_a_carriage_return_alone_is_quoted_in_csv(tmp_path: Path) -> None:
    """Previously, before Python 3.13, it stood bare and the row could not be read again."""
    output = finished(tmp_path, [{"text": "a\rb", "n": 1}, {"text": "c", "n": 2}], ".csv")
    assert output.read_bytes() == b'text,n\n"a\rb","1"\nc,2\n'
    with output.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{"text": "a\rb", "n": "1"}, {"text": "c", "n": "2"}]


@pytest.mark.parametrize(
    ("values", "kind", "stored"),
    [
        ([1, None, 2**62], "int64", [1, None, 2**62]),
        ([1, 0.5], "double", [1.0, 0.5]),
        ([2**53 + 1, 0.5], "string", [str(2**53 + 1), "0.5"]),
        ([2**53, 0.5], "double", [2.0**53, 0.5]),
        ([2**63, 1], "string", [str(2**63), "1"]),
        ([True, False, None], "bool", [True, False, None]),
        ([True, 1], "string", ["true", "1"]),
        (["a", 1, None], "string", ["a", "1", None]),
        ([[1, "é"], {"k": None}], "string", ['[1, "é"]', '{"k": null}']),
        ([None, None], "string", [None, None]),
    ],
)
def test_a_parquet_column_has_the_narrowest_type_that_loses_nothing(tmp_path: Path, values: list[Any], kind: str, stored: list[Any]) -> None:
    """Previously a large whole number beside a fraction ended the job with pyarrow's own error, after the last row."""
    output = finished(tmp_path, [{"text": "t", "v": value} for value in values], ".parquet")
    assert str(pq.read_schema(output).field("v").type) == kind
    assert pq.read_table(output)["v"].to_pylist() == stored


def test_a_column_that_appears_late_is_empty_before(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b", "late": "x"}]
    assert finished(tmp_path, rows, ".csv").read_text() == "text,late\na,\nb,x\n"
    (tmp_path / "out.csv").unlink()
    assert pq.read_table(finished(tmp_path, rows, ".parquet")).to_pylist() == [{"text": "a", "late": None}, {"text": "b", "late": "x"}]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("content", [b"", b"not json\n", b'{"text": ""}\n'])
def test_a_job_without_a_good_row_writes_a_file_that_can_be_read_again(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert job(tmp_path / "in.jsonl", tmp_path / f"out{suffix}") == []
    if suffix == ".csv":
        assert (tmp_path / "out.csv").read_bytes() == b"text\n"
    if suffix == ".parquet":
        assert pq.read_table(tmp_path / "out.parquet").schema.names == ["text"]


def test_long_rows_make_small_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "PARQUET_BYTES", 10_000)
    output = finished(tmp_path, [{"text": "x" * 3_000, "n": i} for i in range(10)], ".parquet")
    file = pq.ParquetFile(output)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]
    assert file.read()["n"].to_pylist() == list(range(10))


def test_what_is_not_json_is_written_as_its_nearest() -> None:
    row = {"nan": math.nan, "infinite": [math.inf], "bytes": b"\xffa", "half": "\ud800", "set": {1}, 3: (1, 2)}
    assert json.loads(line_of(row)) == {"nan": None, "infinite": [None], "bytes": "\ufffda", "half": "?", "set": "{1}", "3": [1, 2]}


def test_parquet_dates_and_decimals_travel_as_text(tmp_path: Path) -> None:
    row = {"text": "a", "day": datetime.date(2026, 1, 2), "at": datetime.datetime(2026, 1, 2, 3), "price": decimal.Decimal("1.50")}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "in.parquet")
    [row] = job(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert (row["day"], row["at"], row["price"]) == ("2026-01-02", "2026-01-02 03:00:00", "1.50")
