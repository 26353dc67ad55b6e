"""Rows come in from three formats as the same rows; what cannot be used says where and why."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_hub.errors import InvalidInput, UnreadableFile
from adapter_hub.examples import BadRow, Example, as_examples, fault, read_examples, read_rows, to_example

ROWS = [{"id": "1", "text": "plain", "label": "a"}, {"id": "2", "text": 'with "quotes", commas\nand lines', "label": "b"}, {"id": "3", "text": "ünï 日本 🙂", "label": "c"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def bad(path: Path) -> list[tuple[int, str]]:
    return [(line, row.reason) for line, row in read_rows(path) if isinstance(row, BadRow)]


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.csv", "r.tsv", "r.parquet", "r.jsonl.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert [row for _, row in read_rows(write(tmp_path / name, ROWS))] == ROWS


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), min_size=1), min_size=1, max_size=5))
def test_any_text_survives_jsonl_and_csv(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [{"text": text, "n": "x"} for text in texts]
    for name in ("r.jsonl", "r.csv"):
        assert [row for _, row in read_rows(write(folder / name, rows))] == rows


def test_a_bad_line_of_jsonl_has_its_number_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fine"}\r\n\n{"text": \n[1]\n{"text": "\xff"}\n{"text": NaN}\n"bare"\n{"text": "last"}')
    rows = list(read_rows(path))
    assert [row for _, row in rows if not isinstance(row, BadRow)] == [{"text": "fine"}, {"text": "last"}]
    found = bad(path)
    assert [line for line, _ in found] == [3, 4, 5, 6, 7]
    for (_, reason), expected in zip(
        found, ["is not JSON", "is a list, not an object", "is not UTF-8 (byte 11)", "NaN is not a JSON number", "is a string, not an object"], strict=True
    ):
        assert expected in reason


def test_a_bad_line_of_csv_has_its_physical_number_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(b'text,label\r\n"two\r\nlines",a\r\nonly one\r\nbad \xff,b\r\nfine,c\r\n')
    assert bad(path) == [(4, "has 1 values for 2 columns"), (5, "is not UTF-8")]
    assert [line for line, row in read_rows(path) if not isinstance(row, BadRow)] == [2, 6]


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("r.csv", b"what is my balance,balance\nanother,x\n", "has no column 'text'; its first line is 'what is my balance', 'balance'"),
        ("r.csv", b"text,text\na,b\n", "has a column name twice"),
        ("r.parquet", b"not parquet", "is not a Parquet file"),
        ("r.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9_000)[:-40], "cannot be read to its end"),
        ("r.txt", b"x", "ends with none of .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_as_its_name_says_is_refused(tmp_path: Path, name: str, content: bytes, fact: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFile) as caught:
        list(read_rows(tmp_path / name))
    assert fact in str(caught.value) and caught.value.hint


def test_parquet_without_text_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="has no column 'text', only 'question'"):
        list(read_rows(write(tmp_path / "r.parquet", [{"question": "x"}])))
    with pytest.raises(UnreadableFile, match="there is no file"):
        read_rows(tmp_path / "none.jsonl")


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("r.jsonl", "r.csv"):
        (tmp_path / name).write_bytes(b"")
        assert list(read_rows(tmp_path / name)) == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "has no 'text'"),
        ({"txt": "x"}, "has no 'text', only 'txt'"),
        ({"text": 3}, "has a 'text' that is a number, not a string"),
        ({"text": None}, "has a 'text' that is null, not a string"),
        ({"text": " \t"}, "has an empty 'text'"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        (["x"], "is a list, not an object with a text"),
    ],
)
def test_a_row_that_cannot_be_answered_says_why(row: Any, reason: str) -> None:
    assert reason in (fault(row) or "")
    with pytest.raises(InvalidInput):
        to_example(row)


def test_a_very_long_text_is_a_text() -> None:
    assert fault({"text": "x" * 100_000}) is None


def test_examples_keep_label_id_and_the_rest() -> None:
    assert to_example({"text": "x", "label": 3, "id": 7, "source": "mail"}) == Example("x", "3", 7, {"source": "mail"})
    assert as_examples(["a", {"text": "b"}, Example("c")]) == [Example("a"), Example("b"), Example("c")]


def test_the_first_bad_example_is_named_by_position_or_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="row 2: a row has an empty 'text'"):
        as_examples(["a", ""])
    with pytest.raises(InvalidInput, match="the rows are one str"):
        as_examples("a")
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n\n{"label": "x"}\n')
    with pytest.raises(InvalidInput, match=r"r\.jsonl, line 3: the row has no 'text', only 'label'"):
        read_examples(tmp_path / "r.jsonl")
