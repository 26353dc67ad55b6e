"""Rows come in from three formats as the same rows; what cannot be used says where and why."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Callable
from decimal import Decimal
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_hub import examples
from adapter_hub.errors import InvalidInput, UnreadableFile
from adapter_hub.examples import BadRow, Example, RowReader, as_examples, check_targets, fault, jsonl_of, read_examples, read_rows, to_example

ROWS = [
    {"id": "1", "text": "plain", "label": "a"},
    {"id": "2", "text": 'with "quotes", commas\nand lines', "label": "b"},
    {"id": "3", "text": "ünï 日本 🙂", "label": "c"},
]


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


def as_nobody(folder: Path, act: Callable[[], bool]) -> bool:
    """Whether `act` is true in a child that works in `folder` without root's rights, which no permission binds."""
    folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            if os.geteuid() == 0:
                os.seteuid(65534)
            code = 0 if act() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


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
    expected = ["is not JSON", "is a list, not an object", "is not UTF-8 (byte 11)", "NaN is not a JSON number", "is a string, not an object"]
    assert all(fact in reason for (_, reason), fact in zip(found, expected, strict=True))


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
        ({"text": " \t"}, "has a 'text' that is empty"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        (["x"], "is a list, not an object with a text"),
    ],
)
def test_a_row_that_cannot_be_answered_says_why(row: Any, reason: str) -> None:
    assert reason in (fault(row) or "")
    with pytest.raises(InvalidInput):
        to_example(row)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl"])
def test_a_file_without_the_column_of_targets_is_told_with_the_columns_that_it_has(tmp_path: Path, name: str) -> None:
    rows = [{"text": row["text"], "intent": row["label"], "n": row["id"]} for row in ROWS]
    given = read_examples(write(tmp_path / name, rows))
    with pytest.raises(InvalidInput, match=r"no training row has a target in `label`; beside `text` they have 'intent', 'n'\. Name the column of"):
        check_targets(given, "training", ("label",))
    check_targets([*given, Example("a", "b")], "training", ("label",))


def test_columns_are_those_of_all_rows() -> None:
    rows = as_examples([{"text": "a"}, {"text": "b", "labels": ["x"]}, {"text": "c", "id": 4}])
    with pytest.raises(InvalidInput, match=r"`spans` or `messages`; beside `text` they have 'labels', 'id'\..* or say by task_type or problem_type"):
        check_targets(rows, "training", ("spans", "messages"))


def test_a_very_long_text_is_a_text() -> None:
    assert fault({"text": "x" * 100_000}) is None


def test_examples_keep_label_id_and_the_rest() -> None:
    assert to_example({"text": "x", "label": 3, "id": 7, "source": "mail"}) == Example("x", "3", 7, {"source": "mail"})
    assert as_examples(["a", {"text": "b"}, Example("c")]) == [Example("a"), Example("b"), Example("c")]


class Colour(Enum):
    RED = 1


class Shade(StrEnum):
    DARK = "dark"


@pytest.mark.parametrize(
    ("label", "read"),
    [(3, "3"), (2.5, "2.5"), (True, "True"), (np.int64(7), "7"), (np.float32(0.5), "0.5"), (np.str_("a"), "a"), (np.bool_(False), "False"),
     (Colour.RED, "Colour.RED"), (Shade.DARK, "dark"), (Decimal("1.50"), "1.50"), ("nan", "nan"), (None, None)],
)  # fmt: skip
def test_one_label_of_any_type_is_its_text(label: object, read: str | None) -> None:
    assert as_examples([{"text": "x", "label": label}]) == [Example("x", read)]


@pytest.mark.parametrize("label", [float("nan"), np.float32("nan"), np.nan, Decimal("nan"), np.datetime64("NaT")])
def test_a_label_that_is_nan_is_none_and_refused_with_its_row(label: Any) -> None:
    """Previously it was learned as the label 'nan'."""
    for row in ({"text": "b", "label": label}, Example("b", label)):
        with pytest.raises(InvalidInput, match=r"row 2: a row has a 'label' that is NaN: it has no label\. Write its label, or remove the row\."):
            as_examples([{"text": "a", "label": "x"}, row])


@pytest.mark.parametrize(
    ("label", "kind"),
    [(["a"], "a list"), (("a", "b"), "tuple"), ({"a"}, "set"), ({"a": 1}, "an object"), (np.array(["a"]), "ndarray"), (b"a", "bytes")],
)
def test_several_labels_where_one_is_wanted_are_refused_with_their_row(label: Any, kind: str) -> None:
    """Previously they were learned as the label "['a']"."""
    with pytest.raises(InvalidInput) as caught:
        as_examples([{"text": "a", "label": "x"}, {"text": "b", "label": label}])
    assert caught.value.fact == f"row 2: a row has a 'label' that is {kind}, not one label."
    assert 'its list `labels`, learned with problem_type="multi_label_classification"' in str(caught.value.hint)


def test_labels_of_a_file_that_are_none_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "a", "label": "x"}\n\n{"text": "b", "label": ["y"]}\n')
    with pytest.raises(InvalidInput, match=r"r\.jsonl, line 3: the row has a 'label' that is a list, not one label\. Several labels are"):
        read_examples(tmp_path / "r.jsonl")
    with pytest.raises(InvalidInput, match=r"r\.parquet, line 2: the row has a 'label' that is NaN"):
        read_examples(write(tmp_path / "r.parquet", [{"text": "a", "label": 1.0}, {"text": "b", "label": float("nan")}]))


def test_the_rows_of_a_data_frame_are_rows(tmp_path: Path) -> None:
    """Previously the names of its columns were taken for its rows."""
    pandas = pytest.importorskip("pandas", reason="the pandas package is not installed")
    frame = pandas.DataFrame({"text": ["a", "b"], "label": pandas.Categorical(["x", "y"]), "id": [7, 8]}, index=[5, 5])
    assert as_examples(frame) == [Example("a", "x", 7), Example("b", "y", 8)]
    assert as_examples(frame["text"]) == [Example("a"), Example("b")]
    for missing in (None, np.nan, pandas.NA, pandas.NaT):    # no other way to say that a row has none
        holed = pandas.DataFrame({"text": ["a", "b"], "label": ["x", missing], "id": ["1", missing]})
        assert as_examples(holed) == [Example("a", "x", "1"), Example("b")]
        if missing is not None:
            with pytest.raises(InvalidInput, match="row 1: a row has a 'label' that is NaN"):
                as_examples([{"text": "b", "label": missing}])
    with pytest.raises(InvalidInput, match="row 1: a row has no 'text', only 'question'"):
        as_examples(pandas.DataFrame({"question": ["a"]}))
    with pytest.raises(InvalidInput, match="the data frame has the column 'label' twice"):
        as_examples(pandas.concat([frame, frame["label"]], axis=1))
    several = [{"text": "a", "labels": ["x", "y"], "spans": [{"start": 0, "end": 1, "label": "z"}]}]
    read = pandas.read_parquet(write(tmp_path / "r.parquet", several))    # its lists are arrays
    assert as_examples(read) == as_examples(several)


@pytest.mark.parametrize("messages", [[], "hello", [{"role": "bot", "content": "hello"}], [{"role": "assistant", "content": "hello"}]])
def test_messages_without_a_question_are_told_as_such(messages: object) -> None:
    """Previously a text was missed that nobody needs to give."""
    with pytest.raises(InvalidInput, match=r"row 1: a row has `messages` that no user's question can be read from: a list of \{role, content\}"):
        as_examples([{"messages": messages}])


def test_columns_are_no_rows() -> None:
    for columns in ({"text": ["a", "b"], "label": ["x", "y"]}, {"text": np.array(["a"]), "label": np.array(["x"])}):
        with pytest.raises(InvalidInput, match=r"the rows are a dict of columns: 'text', 'label'\. Give a list of rows: \[\{"):
            as_examples(columns)    # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"the rows are Table\. Give a list of texts or objects, or a pandas\.DataFrame\."):
        as_examples(pa.table({"text": ["a"], "label": ["x"]}))


def test_of_a_conversation_without_a_text_the_last_question_is_the_text(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "who?"}]
    said.append({"role": "assistant", "content": "me"})
    (tmp_path / "rows.jsonl").write_bytes(jsonl_of(as_examples([{"messages": said}])) + json.dumps({"messages": said}).encode())
    assert read_examples(tmp_path / "rows.jsonl") == [Example("who?", extra={"messages": said})] * 2
    with pytest.raises(InvalidInput, match=r"has `messages` that no user.s question can be read from"):
        as_examples([{"messages": said[1:2]}])


def test_the_first_bad_example_is_named_by_position_or_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="row 2: a row has a 'text' that is empty"):
        as_examples(["a", ""])
    with pytest.raises(InvalidInput, match="the rows are a string"):
        as_examples("a")
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n\n{"label": "x"}\n')
    with pytest.raises(InvalidInput, match=r"r\.jsonl, line 3: the row has no 'text', only 'label'"):
        read_examples(tmp_path / "r.jsonl")


# ---- the edges of each format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "is not JSON (Expecting value, column 10)"),
        (b"plain words", "is not JSON (Expecting value, column 1)"),
        (b"[1]", "is a list, not an object with a text"),
        (b"null", "is null, not an object with a text"),
        (b"true", "is true or false, not an object with a text"),
        (b"1.5", "is a number, not an object with a text"),
        (b'{"text": "\xff"}', "is not UTF-8 (byte 11)"),
        (b'{"text": NaN}', "is not JSON (NaN is not a JSON number)"),
        (b'{"text": "a", "label": "x", "label": "y"}', "is not JSON ('label' is there twice)"),
        (b'{"text": "a", "meta": {"k": 1, "k": 1}}', "is not JSON ('k' is there twice)"),
        (b'{"text": "a", "x": -Infinity}', "is not JSON (-Infinity is not a JSON number)"),
    ],
)
def test_a_line_that_is_no_object_is_told_exactly(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert bad(tmp_path / "r.jsonl") == [(2, reason)]
    assert [number for number, _ in read_rows(tmp_path / "r.jsonl")] == [1, 2, 3]


def test_a_bottomless_or_absurd_line_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'{"text": ' + b"[" * 100_000 + b'\n{"text": 1' + b"0" * 5_000 + b'}\n{"text": "b"}\n')
    [(_, first), (_, second), (_, third)] = read_rows(tmp_path / "r.jsonl")
    assert isinstance(first, BadRow) and "recursion" in first.reason and len(first.raw) <= 200
    assert isinstance(second, BadRow) and "4300 digits" in second.reason
    assert third == {"text": "b"}


def test_a_line_over_the_limit_is_passed_over_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "LINE_BYTES_MAX", 1 << 20)
    (tmp_path / "r.jsonl").write_bytes(b'{"text": "' + b"x" * (3 << 20) + b'"}\n{"text": "after"}\n')
    assert bad(tmp_path / "r.jsonl") == [(1, "is longer than 1 MiB")]
    assert [row for _, row in read_rows(tmp_path / "r.jsonl")][1:] == [{"text": "after"}]
    (tmp_path / "r.csv").write_bytes(b"text\nshort\n" + b"x" * (3 << 20))
    with pytest.raises(UnreadableFile, match=r"r\.csv': line 3 is longer than 1 MiB\."):
        list(read_rows(tmp_path / "r.csv"))


def test_a_long_text_is_read_whole_from_every_format(tmp_path: Path) -> None:
    text = "é" * 100_000
    for name in ("r.jsonl", "r.csv", "r.tsv", "r.parquet"):
        [(_, row)] = read_rows(write(tmp_path / name, [{"text": text}]))
        assert row == {"text": text}, name


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_windows_newlines_are_no_part_of_the_rows(tmp_path: Path, mark: bytes, newline: bytes) -> None:
    (tmp_path / "r.csv").write_bytes(mark + newline.join([b"text,n", b'"a, b",1', b"", b"c,2"]))
    (tmp_path / "r.jsonl").write_bytes(mark + newline.join([b'{"text": "a, b", "n": "1"}', b"  ", b"", b'{"text": "c", "n": "2"}']))
    assert list(read_rows(tmp_path / "r.csv")) == [(2, {"text": "a, b", "n": "1"}), (4, {"text": "c", "n": "2"})]
    assert list(read_rows(tmp_path / "r.jsonl")) == [(1, {"text": "a, b", "n": "1"}), (4, {"text": "c", "n": "2"})]


def test_a_csv_row_is_numbered_by_the_physical_line_that_it_begins_on(tmp_path: Path) -> None:
    records = [b'"one\ntwo\n\nfour",1', b"five,2", b"", b'"six\nseven",3,too many', b"eight,4", b'"nine" more,5', b"ten,6", b'"never closed,7']
    (tmp_path / "r.csv").write_bytes(b"\n".join([b"text,n", *records, b""]))
    good = [(number, row["n"]) for number, row in read_rows(tmp_path / "r.csv") if not isinstance(row, BadRow)]
    assert good == [(2, "1"), (6, "2"), (10, "4"), (12, "6")]
    assert bad(tmp_path / "r.csv") == [
        (8, "has 3 values for 2 columns"),
        (11, "is not CSV (',' expected after '\"')"),
        (13, "is not CSV (unexpected end of data)"),
    ]


@pytest.mark.parametrize(
    ("content", "good", "lost"),
    [
        (b'"unterminated,1\nrow two,2\nrow three,3\n', ["row two", "row three"], [2]),
        (b'one,1\n"open,2\nthree,3\n"four, quoted",4\nfive,5\n', ["one", "three", "four, quoted", "five"], [3]),
        (b'"two\nlines" more,1\nfine,2\n', ["fine"], [2, 3]),
        (b'one,1\n"two\nlines",2\n"open,3\nfour,4', ["one", "two\nlines", "four"], [5]),
        (b'"open,1\n"open,2\n"open,3\nfour,4\n', ["four"], [2, 3, 4]),
    ],
)
def test_a_stray_quote_costs_the_line_that_it_stands_in_and_not_the_rest(tmp_path: Path, content: bytes, good: list[str], lost: list[int]) -> None:
    """Previously everything up to the next quote, or the end of the file, was one failed row."""
    path = tmp_path / "r.csv"
    path.write_bytes(b"text,n\n" + content)
    assert [row["text"] for _, row in read_rows(path) if not isinstance(row, BadRow)] == good
    assert [line for line, _ in bad(path)] == lost
    assert all("is not CSV" in reason for _, reason in bad(path))


def test_a_json_number_that_no_float_holds_is_told(tmp_path: Path) -> None:
    """Previously it became infinity, and null in what was written."""
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a", "n": 1e400}\n{"text": "b", "n": -1e308}\n')
    assert bad(path) == [(1, "is not JSON (1e400 is more than a number can hold)")]


def test_rows_that_are_no_rows_are_refused() -> None:
    for rows in (None, 3, {"text": "a"}):
        with pytest.raises(InvalidInput, match="the rows are"):
            as_examples(rows)    # type: ignore[arg-type]


def test_rows_that_merely_have_features_are_rows() -> None:
    class Rows(list[str]):
        features = ("text",)

    assert as_examples(Rows(["a"])) == [Example("a")]


def test_rows_of_a_dataset_have_the_names_of_its_classes() -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed")
    columns = {"text": ["a", "b", "c"], "label": [1, 0, -1], "id": [7, 8, 9]}
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]), id=datasets.Value("int64"))
    rows = datasets.Dataset.from_dict(columns, features=features)
    assert as_examples(rows) == [Example("a", "yes", 7), Example("b", "no", 8), Example("c", None, 9)]
    assert as_examples(rows.remove_columns("label")) == [Example("a", id=7), Example("b", id=8), Example("c", id=9)]
    with pytest.raises(InvalidInput, match=r"the rows are splits: train, test\. Give one of them"):
        as_examples(datasets.DatasetDict(train=rows, test=rows))


def test_parquet_of_a_dataset_has_the_names_of_its_classes(tmp_path: Path) -> None:
    """Previously its classes were learned as '0', '1', …."""
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]), n=datasets.Value("int64"))
    datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [1, 0, -1, None], "n": [0, 1, 1, 1]}, features=features).to_parquet(
        tmp_path / "r.parquet"
    )
    assert read_examples(tmp_path / "r.parquet") == [Example(text, label, extra={"n": n}) for text, label, n in
                                                     (("a", "yes", 0), ("b", "no", 1), ("c", None, 1), ("d", None, 1))]    # fmt: skip


def named_classes(names: object, labels: pa.Array) -> pa.Table:
    facts = {"info": {"features": {"text": {"_type": "Value"}, "label": {"names": names, "_type": "ClassLabel"}}}}
    return pa.table({"text": ["a", "b"], "label": labels}).replace_schema_metadata({"huggingface": json.dumps(facts)})


def test_classes_that_a_parquet_file_does_not_name_are_told_and_numbers_stay_numbers(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(named_classes(["no", "yes"], pa.array([1, 2])), path)
    assert bad(path) == [(2, "has the class 2 in 'label', and the file names 2")]
    numbers = [{"text": "a", "label": 1}, {"text": "b", "label": 2}]
    plain = pa.Table.from_pylist(numbers)
    for table in (plain, plain.replace_schema_metadata({"huggingface": "x"}), named_classes(None, pa.array([1, 2]))):
        pq.write_table(table, path)
        assert [row for _, row in read_rows(path)] == numbers
    pq.write_table(named_classes(["no", "yes"], pa.array(["no", "yes"])), path)    # names already
    assert [row["label"] for _, row in read_rows(path) if isinstance(row, dict)] == ["no", "yes"]


def test_blank_lines_before_the_header_do_not_hide_the_rows(tmp_path: Path) -> None:
    """Previously a CSV whose first line was blank was read as an empty file."""
    (tmp_path / "r.csv").write_bytes(b"\r\n\ntext,n\na,1\n")
    assert list(read_rows(tmp_path / "r.csv")) == [(4, {"text": "a", "n": "1"})]


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"what is my balance,balance\n", "has no column 'text'; its first line is 'what is my balance', 'balance'."),
        (b"id;text\n1;a\n", "has no column 'text'; its first line is 'id;text'."),
        (b"Text\na\n", "has no column 'text'; its first line is 'Text'."),
        (b"text,n,n\na,b,c\n", "has a column name twice; its first line is 'text', 'n', 'n'."),
    ],
)
def test_a_csv_without_a_header_for_texts_is_refused_in_these_words(tmp_path: Path, content: bytes, fact: str) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile) as caught:
        list(read_rows(path))
    assert str(caught.value) == f"{str(path)!r} {fact} The first line must name the columns, one of them 'text'."


@pytest.mark.parametrize("content", ["text,n\na,b\n".encode("utf-16"), b"text,\xff\na,b\n"])
def test_a_header_in_another_encoding_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(UnreadableFile, match=r"r\.csv': the first line is not UTF-8\. Save it as UTF-8 CSV\."):
        list(read_rows(tmp_path / "r.csv"))


def test_a_parquet_value_that_python_cannot_hold_fails_its_own_row(tmp_path: Path) -> None:
    texts = pa.array([b"fine", b"\xff", b"last"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "r.parquet")
    assert [row for _, row in read_rows(tmp_path / "r.parquet") if not isinstance(row, BadRow)] == [{"text": "fine"}, {"text": "last"}]
    assert bad(tmp_path / "r.parquet") == [(2, "is not UTF-8 (invalid start byte)")]
    pq.write_table(pa.table({"text": ["a", "b"], "at": pa.array([0, -(10**15)], pa.timestamp("s"))}), tmp_path / "t.parquet")
    [(line, reason)] = bad(tmp_path / "t.parquet")
    assert line == 2 and reason.startswith("cannot be read (")


def test_parquet_strings_are_read_in_any_of_their_types(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["a", "b"], kind)}), tmp_path / "r.parquet")
        assert [row for _, row in read_rows(tmp_path / "r.parquet")] == [{"text": "a"}, {"text": "b"}]


def test_a_parquet_file_with_a_name_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "r.parquet")
    with pytest.raises(UnreadableFile, match="has a column name twice: 'text', 'text'"):
        list(read_rows(tmp_path / "r.parquet"))


def test_a_file_that_this_process_may_not_open_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl", ROWS).chmod(0)

    def reads() -> bool:
        with pytest.raises(UnreadableFile, match=r"'r\.jsonl' cannot be opened \(Permission denied\)\. Check its permissions\."):
            read_rows("r.jsonl")
        return True

    assert as_nobody(tmp_path, reads)


def test_reading_tells_how_far_it_is(tmp_path: Path) -> None:
    reader = RowReader(write(tmp_path / "r.jsonl", [{"text": "x" * 1_000}] * 1_000))
    shares = [reader.share for _ in reader]
    assert shares == sorted(shares) and shares[0] is not None and shares[0] < 0.1 and shares[-1] == 1.0
    assert reader.share is None
