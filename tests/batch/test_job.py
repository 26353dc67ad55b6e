"""The batch job: rows in order, bad rows aside, and the same bytes whatever interrupts it."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from adapter_hub.batch import job as job_module
from adapter_hub.batch.files import JobFiles
from adapter_hub.batch.job import interrupted as facts_of
from adapter_hub.batch.job import merged, run_job
from adapter_hub.errors import CorruptVersion, HubError, InvalidInput, ModelChanged, NotRoutable, ReadOnlyRegistry, StorageFull, UnreadableFile
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


def test_bad_rows_go_aside_with_line_and_reason(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\nnot json\n{"text": ""}\n{"text": 5}\n{"id": 1}\n{"text": "\xfe"}\n{"text": "b"}\n')
    summary = run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=2)
    assert set(summary.to_json()) >= {"rows", "answered", "abstained", "failed", "adapters", "rows_per_s", "errors"}
    errors = read(tmp_path / "out.jsonl.errors.jsonl")
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["a", "b"]
    assert [error["line"] for error in errors] == [2, 3, 4, 5, 6] and summary.failed == 5 and summary.errors
    assert [error["reason"][:28] for error in errors][1:] == [
        "the row has a 'text' that is", "the row has a 'text' that is", "the row has no 'text', only ", "the row is not UTF-8 (byte 1",
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


def test_a_fault_in_the_place_of_an_answer_fails_that_row_and_any_other_error_there_stops_the_job(source: Path, tmp_path: Path) -> None:
    calls = []

    def partly(texts: Sequence[str]) -> list[dict[str, Any] | HubError]:
        calls.append(len(texts))
        return [error if len(text) == 5 else one for text, one in zip(texts, answer(texts), strict=True)]

    error: HubError = NotRoutable("its adapter was purged.")
    summary = run_job(source, tmp_path / "out.jsonl", partly, settings=SETTINGS)
    assert summary.failed == 6 and calls == [50] and {e["reason"] for e in read(tmp_path / "out.jsonl.errors.jsonl")} == {"its adapter was purged."}
    error = ModelChanged("another base.")
    with pytest.raises(ModelChanged):
        run_job(source, tmp_path / "other.jsonl", partly, settings=SETTINGS)


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
    # A name that one answer has and another lacks means the same in every row.
    assert merged({"text": "t", "output": "mine"}, {"label": None}) == {"text": "t", "input_output": "mine", "label": None}
    assert merged({"text": "t", "label": "l"}, {"output": "o"}) == {"text": "t", "target": "l", "output": "o"}


def test_no_field_of_the_input_is_lost_to_a_new_name() -> None:
    """Previously `score` took the place of a field that was called `input_score` already."""
    row = {"text": "t", "score": 1, "input_score": 2, "target": 3, "label": 4, "input_target": 5}
    assert merged(row, {"score": 6}) == {
        "text": "t", "input_input_score": 1, "input_score": 2, "input_input_target": 3, "target": 4, "input_target": 5, "score": 6,
    }


def test_a_text_of_a_hundred_thousand_characters_is_answered(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "é" * 100_000}) + "\n")
    for suffix in (".jsonl", ".csv", ".parquet"):
        assert run_job(tmp_path / "in.jsonl", tmp_path / f"out{suffix}", answer, settings=SETTINGS).answered == 1
    assert read(tmp_path / "out.jsonl")[0]["text"] == read(tmp_path / "out.parquet")[0]["text"] == "é" * 100_000


def test_half_a_surrogate_pair_fails_its_row_and_the_errors_stay_readable(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a\\ud800"}\n{"text": "b"}\n')
    assert run_job(tmp_path / "in.jsonl", tmp_path / "out.jsonl", answer, settings=SETTINGS).failed == 1
    [error] = read(tmp_path / "out.jsonl.errors.jsonl")
    assert error == {"line": 1, "reason": "the row has a 'text' that has half of a surrogate pair, which is not Unicode", "row": '{"text": "a?"}'}


def test_progress_is_told_after_each_chunk(source: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=20, progress=seen.append)
    assert [at.rows for at in seen] == [20, 40, 50] and seen[-1].share in (1.0, None)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept_unless_told_otherwise(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(InvalidInput, match=r"out\.jsonl' exists"):
        run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS)
    with pytest.raises(InvalidInput, match="exists, and does not answer line 1 of this input"):
        run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, resume=True)
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, overwrite=True).rows == 50


def test_overwriting_keeps_the_old_output_until_the_new_is_whole_and_no_old_errors(source: Path, tmp_path: Path) -> None:
    output, clean = tmp_path / "out.jsonl", source.read_text()
    source.write_text("not json\n" + clean)
    run_job(source, output, answer, settings=SETTINGS)
    old = output.read_bytes()
    assert JobFiles(output).errors.exists()
    source.write_text(clean.replace("t3", "t33"))

    def looks(texts: Sequence[str]) -> list[dict[str, Any]]:
        assert output.read_bytes() == old and JobFiles(output).errors.exists()
        return answer(texts)

    assert run_job(source, output, looks, settings=SETTINGS, overwrite=True).errors is None
    assert output.read_bytes() != old and sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


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


@pytest.mark.parametrize(
    ("resume", "overwrite", "message"),
    [
        (
            False,
            False,
            "a job for {output!r} was interrupted. Go on with resume=True (`--resume`), or begin again with overwrite=True (`--overwrite`).",
        ),
        (True, True, "resume and overwrite exclude each other. Choose one."),
    ],
)
def test_an_interrupted_job_says_what_can_be_done(source: Path, tmp_path: Path, resume: bool, overwrite: bool, message: str) -> None:
    output = tmp_path / "out.jsonl"
    interrupted(source, output)
    before = JobFiles(output).partial.read_bytes()
    with pytest.raises(InvalidInput) as caught:
        run_job(source, output, answer, settings=SETTINGS, chunk_rows=8, resume=resume, overwrite=overwrite)
    assert str(caught.value) == message.format(output=str(output)) and JobFiles(output).partial.read_bytes() == before


def test_an_edit_far_into_the_input_is_noticed(source: Path, tmp_path: Path) -> None:
    """Previously size and first MiB alone were compared."""
    source.write_text('{"text": "a"}\n' + f'{{"text": "{"x" * 40_000}"}}\n' * 40)
    interrupted(source, tmp_path / "out.jsonl")
    content = bytearray(source.read_bytes())
    content[-10] = ord("y")
    source.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"the interrupted job had another input: the file has changed\. Begin again"):
        run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=8, resume=True)


@pytest.mark.parametrize("damage", ["partial", "progress"])
def test_a_job_whose_files_were_tampered_with_is_not_resumed(source: Path, tmp_path: Path, damage: str) -> None:
    files = JobFiles(tmp_path / "out.jsonl")
    interrupted(source, files.output)
    (files.partial if damage == "partial" else files.progress).write_text("{")
    fact = "is shorter than the job's progress says" if damage == "partial" else "is not a job's progress"
    with pytest.raises(InvalidInput, match=fact):
        run_job(source, files.output, answer, settings=SETTINGS, chunk_rows=8, resume=True)


@pytest.mark.parametrize(("change", "fact"), [("input", "the file has changed"), ("settings", "the registry or an option has changed")])
def test_a_job_resumes_only_on_the_same_input_and_settings(source: Path, tmp_path: Path, change: str, fact: str) -> None:
    interrupted(source, tmp_path / "out.jsonl")
    if change == "input":
        source.write_text(source.read_text().replace("t3", "t9"))
    settings = SETTINGS if change == "input" else {"registry": "two"}
    with pytest.raises(InvalidInput, match=fact):
        run_job(source, tmp_path / "out.jsonl", answer, settings=settings, chunk_rows=8, resume=True)


def test_a_job_that_another_process_runs_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run_job(source, output, lambda texts: [os.write(tell, b"x"), time.sleep(60)] and [], settings=SETTINGS)
        finally:
            os._exit(1)
    assert os.read(told, 1) == b"x"
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(InvalidInput) as caught:
            run_job(source, output, answer, settings=SETTINGS, resume=resume, overwrite=overwrite)
        assert str(caught.value) == f"another process is writing {str(output)!r}. Wait for it, or choose another output."
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert run_job(source, output, answer, settings=SETTINGS, resume=True).rows == 50    # the lock died with its holder


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_to_resume_a_job_that_is_done_tells_what_it_did_and_does_nothing(source: Path, tmp_path: Path, suffix: str) -> None:
    """Previously it was an error, so a script could not simply run again."""
    source.write_text("not json\n" + source.read_text() + '{"text": ""}\n')
    output = tmp_path / f"out{suffix}"
    first = run_job(source, output, answer, settings=SETTINGS)
    before = output.read_bytes()
    again = run_job(source, output, lambda texts: pytest.fail("answered again"), settings=SETTINGS, resume=True)
    assert counts(again) == counts(first) and (again.output, again.errors) == (first.output, first.errors)
    assert output.read_bytes() == before and not JobFiles(output).progress.exists()


def test_an_output_of_another_input_is_not_taken_for_done(source: Path, tmp_path: Path) -> None:
    output, lines = tmp_path / "out.jsonl", source.read_text().splitlines(keepends=True)
    run_job(source, output, answer, settings=SETTINGS)
    for changed, fact in (
        ([*lines[:4], '{"text": "another"}\n', *lines[5:]], "does not answer line 5 of this input"),
        ([*lines, '{"text": "one more"}\n'], "does not answer line 51 of this input"),
        (lines[:-1], "has more rows than this input"),
    ):
        source.write_text("".join(changed))
        with pytest.raises(InvalidInput, match=fact):
            run_job(source, output, answer, settings=SETTINGS, resume=True)


def test_what_a_job_was_begun_with_is_told_until_it_is_done(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert facts_of(output) is None

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(source, output, answer, settings=SETTINGS, facts={"versions": ["a@1"]}, chunk_rows=8, progress=stop)
    assert facts_of(output) == {"versions": ["a@1"]}
    run_job(source, output, answer, settings=SETTINGS, chunk_rows=8, resume=True)
    assert facts_of(output) is None


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
        ("in.jsonl", "folder.jsonl", InvalidInput, "folder.jsonl' is a folder"),
        ("old.jsonl.errors.jsonl", "old.jsonl", InvalidInput, "is a file that this job would write"),
    ],
)
def test_an_impossible_job_is_refused(source: Path, tmp_path: Path, input: str, output: str, error: type[Exception], fact: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    shutil.copy(source, tmp_path / "old.jsonl.errors.jsonl")
    for overwrite in (False, True):
        with pytest.raises(error, match=fact):
            run_job(tmp_path / input, tmp_path / output, answer, settings=SETTINGS, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.jsonl", "in.jsonl", "old.jsonl.errors.jsonl"]


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


STEPS = ("answered", "half-made", "errors moved", "output moved", "partial removed", "progress removed")


def in_state(files: JobFiles, step: str, whole: JobFiles) -> None:
    """From "the last chunk is whole" to the folder's state after `step` of finishing, as a crash would leave it."""
    at = STEPS.index(step)
    files.output.with_name(files.output.name + ".lock").touch()    # goes last of all
    table = files.output.suffix != ".jsonl"
    if at >= 1 and table:
        files.finished.write_bytes(whole.output.read_bytes()[: 100 if at == 1 else None])
    if at >= 2:
        files.errors_partial.replace(files.errors) if files.errors_partial.stat().st_size else files.errors_partial.unlink()
    if at >= 3:
        (files.finished if table else files.partial).replace(files.output)
    if at >= 4:
        files.partial.unlink(missing_ok=True)
    if at >= 5:
        files.progress.unlink()


@pytest.mark.parametrize("bad_rows", [True, False])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("step", STEPS)
def test_a_crash_after_any_step_of_finishing_is_made_good(tmp_path: Path, step: str, suffix: str, bad_rows: bool) -> None:
    source, folder = tmp_path / "in.jsonl", tmp_path / "crashed"
    batch_kill.write_input(source, 200)
    if not bad_rows:
        source.write_text("".join(line for line in source.open() if "txt" not in line and "poison" not in line))
    folder.mkdir()
    whole, files = JobFiles(tmp_path / f"out{suffix}"), JobFiles(folder / f"out{suffix}")

    def keep(at: Any) -> None:
        for path in (whole.partial, whole.errors_partial, whole.progress):
            shutil.copy(path, folder / path.name)

    def run(output: Path, resume: bool = False, progress: Any = None) -> Any:
        return run_job(source, output, batch_kill.answer, settings=SETTINGS, chunk_rows=64, resume=resume, progress=progress)

    expected = run(whole.output, progress=keep)
    in_state(files, step, whole)
    found = run(files.output, resume=True)
    assert files.output.read_bytes() == whole.output.read_bytes()
    assert files.errors.exists() == whole.errors.exists() == bad_rows
    if bad_rows:
        assert files.errors.read_bytes() == whole.errors.read_bytes()
    assert {path.name for path in folder.iterdir()} == {files.output.name, *([files.errors.name] if bad_rows else [])}
    assert counts(found) == counts(expected)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_resumed_job_reports_the_counts_of_the_whole(tmp_path: Path, suffix: str) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / f"out{suffix}"
    batch_kill.write_input(source, 1_200)
    expected = run_job(source, tmp_path / f"whole{suffix}", batch_kill.answer, settings=SETTINGS, chunk_rows=64)
    assert expected.failed == 13 + 2 and expected.abstained > 100 and len(expected.adapters) == 3

    def stops(at: Any) -> None:
        if at.rows % 192 == 0:
            raise KeyboardInterrupt

    summary = None
    for _ in range(20):
        try:
            summary = run_job(source, output, batch_kill.answer, settings=SETTINGS, chunk_rows=64, resume=True, progress=stops)
            break
        except KeyboardInterrupt:
            assert not output.exists()
    assert summary is not None and counts(summary) == counts(expected)
    assert output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def counts(summary: Any) -> dict[str, Any]:
    return {key: value for key, value in summary.to_json().items() if key in ("rows", "answered", "abstained", "failed", "adapters")}


def in_child(act: Callable[[], bool]) -> bool:
    """Whether `act` is true in a process of its own, whose limits and rights it may change."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if act() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fails_for_want_of_room(source: Path, output: Path, bytes_max: int) -> bool:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, resource.RLIM_INFINITY))
    try:
        run_job(source, output, answer, settings=SETTINGS, chunk_rows=8)
    except StorageFull as error:
        return f"no space left to write {output}" in str(error)
    return False


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_full_disk_is_said_and_the_job_resumes_when_there_is_room(source: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    assert in_child(lambda: fails_for_want_of_room(source, output, 2_500))
    run_job(source, output, answer, settings=SETTINGS, chunk_rows=8, resume=True)
    run_job(source, tmp_path / f"whole{suffix}", answer, settings=SETTINGS, chunk_rows=8)
    assert output.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_a_disk_that_fills_while_the_table_is_made_is_said_as_well(source: Path, tmp_path: Path) -> None:
    source.write_text('{"text": "a"}\n' * 3)
    assert in_child(lambda: fails_for_want_of_room(source, tmp_path / "out.parquet", 1_000))    # the rows take 200 bytes, the table 2,000
    assert JobFiles(tmp_path / "out.parquet").progress.exists()
    assert run_job(source, tmp_path / "out.parquet", answer, settings=SETTINGS, chunk_rows=8, resume=True).rows == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.parquet"]


def test_a_folder_without_write_permission_is_refused(source: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    source.chmod(0o444)

    def refused() -> bool:
        os.chdir(tmp_path)    # the folders above may be closed to others
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(ReadOnlyRegistry, match=r"out\.jsonl\.lock is not writable by this process"):
            run_job("in.jsonl", "out.jsonl", answer, settings=SETTINGS)
        return True

    assert in_child(refused)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks = []
    for rows in (2 * job_module.CHUNK_ROWS, 12 * job_module.CHUNK_ROWS):
        batch_kill.write_input(tmp_path / f"{rows}.jsonl", rows)
        tracemalloc.start()
        run_job(tmp_path / f"{rows}.jsonl", tmp_path / f"{rows}.csv", answer, settings=SETTINGS)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000, peaks


def test_the_chunk_size_is_part_of_what_a_resumed_job_must_share(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out.jsonl")
    with pytest.raises(InvalidInput, match="another settings"):
        run_job(source, tmp_path / "out.jsonl", answer, settings=SETTINGS, chunk_rows=job_module.CHUNK_ROWS, resume=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_every_rename_is_durable_before_anything_is_removed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """After a power failure a folder may have any of the renames and removals since its last fsync."""
    done: list[str] = []
    fsync, unlink, replace = os.fsync, Path.unlink, Path.replace

    def note(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            if what != "fsync" or stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                done.append(what)
            return call(*arguments, **options)

        return noted

    monkeypatch.setattr(os, "fsync", note("fsync", fsync))
    monkeypatch.setattr(Path, "unlink", note("unlink", unlink))
    monkeypatch.setattr(Path, "replace", note("rename", replace))
    with source.open("a") as rows:
        rows.write('{"text": ""}\n')    # so that there is a file of errors as well
    run_job(source, tmp_path / f"out{suffix}", answer, settings=SETTINGS)
    assert done.count("rename") >= 4
    assert ("rename", "unlink") not in set(pairwise(done))
