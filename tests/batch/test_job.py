"""The batch job: rows in order, bad rows aside, and the same bytes whatever interrupts it."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from adapter_hub.batch import job as job_module
from adapter_hub.batch.files import JobFiles
from adapter_hub.batch.job import merged, run_job
from adapter_hub.errors import CorruptVersion, InvalidInput, ModelChanged, StorageFull, UnreadableFile
from tests.soak import batch_kill

ROOT = Path(__file__).parents[2]
SETTINGS = {"registry": "one"}


def answer(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"adapter": "a@1" if len(text) % 2 else None, "score": len(text) / 8, "label": text[:1]} for text in texts]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"id": i, "text": "x" * (1 + i % 9), "label": f"t{i}", "note": None if i % 2 else "é"} for i in range(50)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]
    if path.suffix == ".csv":
        return list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_come_out_in_order_with_their_fields_and_the_answer(source: Path, tmp_path: Path) -> None:
    summary = run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=7)
    out = read(tmp_path / "out.jsonl")
    assert [row["id"] for row in out] == list(range(50))
    assert list(out[3]) == ["id", "text", "target", "note", "adapter", "score", "label"] and out[3]["target"] == "t3" and out[3]["label"] == "x"
    assert (summary.rows, summary.answered, summary.failed, summary.errors) == (50, 50, 0, None)
    assert summary.abstained + sum(summary.adapters.values()) == 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("out", [".jsonl", ".csv", ".parquet", ".tsv"])
@pytest.mark.parametrize("into", [".jsonl", ".csv", ".parquet"])
def test_all_formats_carry_the_same_rows(source: Path, tmp_path: Path, into: str, out: str) -> None:
    run_job(source, tmp_path / f"mid{into}", lambda texts: [{} for _ in texts], settings=SETTINGS)
    run_job(tmp_path / f"mid{into}", tmp_path / f"out{out}", answer, settings=SETTINGS)
    if out == ".tsv":
        (tmp_path / "out.tsv").rename(tmp_path / "out.csv")
        text = (tmp_path / "out.csv").read_text().replace("\t", ",")
        (tmp_path / "out.csv").write_text(text)
    rows = read(tmp_path / f"out{'.csv' if out == '.tsv' else out}")
    assert [row["text"] for row in rows] == ["x" * (1 + i % 9) for i in range(50)]
    assert [float(row["score"]) for row in rows] == [(1 + i % 9) / 8 for i in range(50)]
    if out == ".parquet":
        assert {str(field.type) for field in pq.read_schema(tmp_path / "out.parquet")} <= {"string", "int64", "double"}


def test_bad_rows_go_aside_with_line_and_reason(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\nnot json\n{"text": ""}\n{"text": 5}\n{"id": 1}\n{"text": "\xfe"}\n{"text": "b"}\n')
    summary = run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=2)
    errors = read(tmp_path / "out.jsonl.errors.jsonl")
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["a", "b"]
    assert [error["line"] for error in errors] == [2, 3, 4, 5, 6] and summary.failed == 5 and summary.errors
    assert [error["reason"][:28] for error in errors][1:] == [
        "the row has an empty 'text'", "the row has a 'text' that is", "the row has no 'text', only ", "the row is not UTF-8 (byte 1",
    ]
    assert errors[1]["row"] == '{"text": ""}'


def test_a_row_that_the_answer_refuses_fails_alone(source: Path, tmp_path: Path) -> None:
    def picky(texts: Sequence[str]) -> list[dict[str, Any]]:
        if "xxxxx" in texts:
            raise CorruptVersion("its adapter is damaged.", hint="Restore it.")
        return answer(texts)

    summary = run_job(source, tmp_path / "out.jsonl", picky, settings=SETTINGS)
    assert summary.failed == 6 and {e["reason"] for e in read(tmp_path / "out.jsonl.errors.jsonl")} == {"its adapter is damaged. Restore it."}
    assert len(read(tmp_path / "out.jsonl")) == 44


def test_any_other_failure_stops_the_job_and_resuming_completes_it(source: Path, tmp_path: Path) -> None:
    calls = []

    def fails_once(texts: Sequence[str]) -> list[dict[str, Any]]:
        calls.append(len(texts))
        if len(calls) == 4:
            raise ModelChanged("another base.")
        return answer(texts)

    with pytest.raises(ModelChanged):
        run_job(source, tmp_path / "out.jsonl", fails_once, settings=SETTINGS, chunk_rows=8)
    assert not (tmp_path / "out.jsonl").exists()
    summary = run_job(source, tmp_path / "out.jsonl", fails_once, settings=SETTINGS, chunk_rows=8, resume=True)
    run_job(source, tmp_path / "whole.jsonl", answer, settings=SETTINGS, chunk_rows=8)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert summary.rows == 50 and sum(summary.adapters.values()) + summary.abstained == 50 and calls.count(8) == 7


def test_names_that_the_answer_needs_are_kept_under_another(tmp_path: Path) -> None:
    row = {"text": "t", "label": "l", "adapter": "mine", "score": 1, "target": "other", "free": 2}
    assert merged(row, {"adapter": "a@1", "score": 0.5, "label": "x"}) == {
        "text": "t", "target": "l", "input_adapter": "mine", "input_score": 1, "input_target": "other", "free": 2,
        "adapter": "a@1", "score": 0.5, "label": "x",
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_an_empty_input_gives_an_empty_output(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"")
    summary = run_job(tmp_path / "in.jsonl", tmp_path / f"out{suffix}", answer, settings=SETTINGS)
    assert summary.rows == 0 and (tmp_path / f"out{suffix}").exists()
    if suffix == ".parquet":
        assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


def test_a_value_that_json_does_not_know_becomes_text_or_null(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa

    table = pa.table({"text": ["a"], "day": [datetime.date(2026, 1, 2)], "nan": [float("nan")], "list": [[1, 2]]})
    pq.write_table(table, tmp_path / "in.parquet")
    run_job(tmp_path / "in.parquet", tmp_path / "out.csv", answer, settings=SETTINGS)
    [row] = read(tmp_path / "out.csv")
    assert (row["day"], row["nan"], row["list"]) == ("2026-01-02", "", "[1, 2]")


def test_progress_is_told_after_each_chunk(source: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=20, progress=seen.append)
    assert [at.rows for at in seen] == [20, 40, 50] and seen[-1].share in (1.0, None)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept_unless_told_otherwise(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(InvalidInput, match=r"out\.jsonl' exists"):
        run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS)
    with pytest.raises(InvalidInput, match="It is complete"):
        run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, resume=True)
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, overwrite=True).rows == 50


def interrupted(source: Path, output: Path) -> None:
    def stops(texts: Sequence[str]) -> list[dict[str, Any]]:
        if output.with_name(output.name + ".progress.json").read_text().find('"rows": 0') < 0:
            raise KeyboardInterrupt
        return answer(texts)

    with pytest.raises(KeyboardInterrupt):
        run_job(source, output, stops, settings=SETTINGS, chunk_rows=8)


def test_an_interrupted_job_is_not_begun_again_by_accident(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out.jsonl")
    with pytest.raises(InvalidInput, match="was interrupted"):
        run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=8)
    assert run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=8, overwrite=True).rows == 50


@pytest.mark.parametrize(("change", "fact"), [("input", "the file has changed"), ("settings", "the registry or an option has changed")])
def test_a_job_resumes_only_on_the_same_input_and_settings(source: Path, tmp_path: Path, change: str, fact: str) -> None:
    interrupted(source, tmp_path / "out.jsonl")
    if change == "input":
        source.write_text(source.read_text().replace("t3", "t9"))
    settings = SETTINGS if change == "input" else {"registry": "two"}
    with pytest.raises(InvalidInput, match=fact):
        run_job(source, tmp_path / "out.jsonl", answer, settings=settings, chunk_rows=8, resume=True)


def test_two_jobs_cannot_write_one_output(source: Path, tmp_path: Path) -> None:
    def meddles(texts: Sequence[str]) -> list[dict[str, Any]]:
        with pytest.raises(InvalidInput, match="another process is writing"):
            run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, overwrite=True)
        return answer(texts)

    assert run_job(source, tmp_path / "out.jsonl", meddles, settings=SETTINGS).answered == 50


@pytest.mark.parametrize(
    ("input", "output", "error", "fact"),
    [
        ("in.jsonl", "in.jsonl", InvalidInput, "input and output are one file"),
        ("none.jsonl", "out.jsonl", UnreadableFile, "there is no file"),
        ("in.jsonl", "nowhere/out.jsonl", InvalidInput, "there is no folder"),
        ("in.jsonl", "out.xlsx", UnreadableFile, "ends with none of"),
        ("in.jsonl", "out.jsonl.gz", InvalidInput, "packed output is not written"),
    ],
)
def test_an_impossible_job_is_refused(source: Path, tmp_path: Path, input: str, output: str, error: type[Exception], fact: str) -> None:
    with pytest.raises(error, match=fact):
        run_job(tmp_path / input, tmp_path / output, answer, settings=SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


# ---- crashes --------------------------------------------------------------------------------------------------------


def test_a_job_killed_at_random_moments_and_resumed_writes_the_same_bytes() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.soak.batch_kill", "--kills", "6"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["faults"] == [] and result["jobs_killed"] == 6


@pytest.mark.soak
@pytest.mark.skipif("ADAPTER_HUB_SOAK" not in os.environ, reason="only under `make soak`")
def test_the_same_after_two_hundred_kills() -> None:
    result = batch_kill.run(200, seed=0)
    print(json.dumps(result))
    assert result["faults"] == []


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_crash_between_the_last_renames_is_made_good(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.csv"
    batch_kill.write_input(source, 300)

    def run(out: Path, resume: bool = False) -> Any:
        return run_job(source, out, batch_kill.answer, settings=SETTINGS, chunk_rows=64, resume=resume)

    run(tmp_path / "whole.csv")
    calls = []
    plain = Path.replace

    def dies(self: Path, target: Any) -> Path:
        if self.name.startswith("out.csv.") and not self.name.endswith(".tmp"):
            calls.append(self.name)
            if len(calls) == step:
                raise KeyboardInterrupt
        return plain(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        if step <= 2:
            with pytest.raises(KeyboardInterrupt):
                run(output)
        else:
            patch.setattr(JobFiles, "partial", property(lambda self: (_ for _ in ()).throw(KeyboardInterrupt) if output.exists() else self._beside(".partial")))
            with pytest.raises(KeyboardInterrupt):
                run(output)
    run(output, resume=True)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert (tmp_path / "out.csv.errors.jsonl").read_bytes() == (tmp_path / "whole.csv.errors.jsonl").read_bytes()


def test_a_full_disk_is_said_and_the_job_resumes_when_there_is_room(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_500, resource.RLIM_INFINITY))
            run_job(source, output, answer, settings=SETTINGS, chunk_rows=8)
        except StorageFull as error:
            code = 0 if "no space left" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    run_job(source, output, answer, settings=SETTINGS, chunk_rows=8, resume=True)
    run_job(source, tmp_path / "whole.jsonl", answer, settings=SETTINGS, chunk_rows=8)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_chunk_size_is_part_of_what_a_resumed_job_must_share(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out.jsonl")
    with pytest.raises(InvalidInput, match="another settings"):
        run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=job_module.CHUNK_ROWS, resume=True)
