"""The batch job: every row of a file answered into another, in order, with constant memory, and resumable after a crash.

It knows rows and an `answer` function, nothing of models. Chunk boundaries follow from the position in the input alone, so a job
that was killed and resumed writes the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from adapter_hub.batch.files import JobFiles, finish, line_of, write_durably
from adapter_hub.chat import Conversation, input_of
from adapter_hub.errors import CorruptVersion, HubError, InvalidInput, NotRoutable, OutOfMemory, UnreadableFile, storage_error
from adapter_hub.examples import BadRow, RowReader, format_of, read_rows
from adapter_hub.registry.artifacts import sync_folder

JSON = Any
Answer = Callable[[Sequence[str | Conversation]], Sequence[Mapping[str, JSON] | HubError]]    # a row's fault may stand in its place
CHUNK_ROWS = 1024    # the more rows are sorted by length together, the less they are padded
WRITING_CHUNK_ROWS = 256    # of a model that writes: what a kill loses is minutes there
BEGIN_AGAIN = "Begin again with overwrite=True (`--overwrite`)."

# What an answer may hold. An input's field of such a name is renamed in every row, whichever adapter answers it: a column means one thing.
ANSWER_NAMES = frozenset({"adapter", "reason", "score", "margin", "label", "output", "truncated"})

# Faults of single rows: an input that cannot be read or is too much for memory, or an adapter whose files are damaged or purged.
# Anything else stops the job.
ROW_FAULTS = (InvalidInput, CorruptVersion, NotRoutable, OutOfMemory)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is."""

    rows: int              # of the input, good and bad
    failed: int
    share: float | None    # of the input's bytes, 0-1; None where not known
    seconds: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job did, the part before a resume included."""

    rows: int                       # of the input, good and bad
    answered: int
    abstained: int                  # answered by the base model
    failed: int                     # in `errors`, with line number and reason
    adapters: Mapping[str, int]     # rows by version, most first
    seconds: float                  # of this process
    rows_per_s: float               # of this process
    output: str
    errors: str | None              # None without a failed row

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "adapters": dict(self.adapters), "seconds": round(self.seconds, 3), "rows_per_s": round(self.rows_per_s, 1)}


@dataclass(slots=True)
class _State:
    """What survives a crash: how far input, output and errors had come when the last chunk was whole."""

    settings: str
    input: str
    rows: int = 0
    output_bytes: int = 0
    errors_bytes: int = 0
    failed: int = 0
    abstained: int = 0
    adapters: dict[str, int] = field(default_factory=dict)
    facts: dict[str, JSON] = field(default_factory=dict)    # the caller's, to go on with

    def save(self, path: Path) -> None:
        write_durably(path, (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> _State:
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InvalidInput(f"{path} is not a job's progress ({error}).", hint=BEGIN_AGAIN) from error


def interrupted(output: str | Path) -> dict[str, JSON] | None:
    """The facts that an interrupted job for this output was begun with; None where there is no such job. Raises InvalidInput."""
    path = JobFiles(Path(output)).progress
    return _State.load(path).facts if path.exists() else None


def run_job(
    input: str | Path,
    output: str | Path,
    answer: Answer,
    *,
    settings: Mapping[str, JSON],
    facts: Mapping[str, JSON] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    chunk_rows: int = CHUNK_ROWS,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Answer every row of `input` into `output`; the suffixes say the formats (JSONL, CSV, TSV, Parquet).

    A row out is the row in plus what `answer` gives for its `text`, or for its `messages` where it has no text. An input's `label` is
    kept as `target`, any other field whose name the answer needs as `input_<name>`. Bad rows go to OUTPUT.errors.jsonl. `settings` is
    everything the answers depend on; `facts` is kept for `interrupted` to tell. To resume a job that is done tells what it did, and
    does nothing.
    Raises UnreadableFile, InvalidInput (output exists, or the job cannot be resumed with this input and settings), RegistryError.
    """
    source, files = Path(input), JobFiles(Path(output))
    format_of(files.output)
    if files.output.suffix.lower() == ".gz":
        raise InvalidInput(f"{str(output)!r}: packed output is not written.", hint="Leave .gz out, and pack it afterwards.")
    if not files.output.parent.is_dir():
        raise InvalidInput(f"there is no folder {str(files.output.parent)!r}.", hint="Make it first.")
    if files.output.is_dir():
        raise InvalidInput(f"the output {str(output)!r} is a folder.", hint="Name a file in it.")
    reader = RowReader(source)
    for path in files.written:
        if path.exists() and path.samefile(source):
            what = "input and output are one file" if path == files.output else f"the input {str(input)!r} is a file that this job would write"
            raise InvalidInput(f"{what}.", hint="Choose another output.")
    settings = {**settings, "chunk_rows": chunk_rows}
    fresh = _State(hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest(), _identity(source), facts=dict(facts or {}))
    with files.locked():
        if resume and not overwrite and files.output.exists() and not files.progress.exists():
            return _done(reader, files)
        try:
            state = _begin(files, fresh, resume, overwrite)
            started, rows_before = time.perf_counter(), state.rows
            if not files.in_place:    # else the crash came after the last rename
                _answer_all(reader, files, answer, state, chunk_rows, started, progress)
            finish(files)
        except OSError as error:
            raise storage_error(error, files.output) from error
    return _summary(state, files, time.perf_counter() - started, state.rows - rows_before)


def _begin(files: JobFiles, fresh: _State, resume: bool, overwrite: bool) -> _State:
    """The state to go on from, with the partial files cut back to it. Nothing is removed that was not asked for."""
    if resume and overwrite:
        raise InvalidInput("resume and overwrite exclude each other.", hint="Choose one.")
    started = files.progress.exists()
    if files.output.exists() and not overwrite and not (resume and started):
        raise InvalidInput(f"{str(files.output)!r} exists.", hint="Choose another output, or pass overwrite=True (`--overwrite`).")
    if started and not resume and not overwrite:
        raise InvalidInput(
            f"a job for {str(files.output)!r} was interrupted.",
            hint="Go on with resume=True (`--resume`), or begin again with overwrite=True (`--overwrite`).",
        )
    state = fresh
    if resume and started:
        state = _State.load(files.progress)
        for what, ours, theirs in (("input", fresh.input, state.input), ("settings", fresh.settings, state.settings)):
            if ours != theirs:
                why = "the file has changed" if what == "input" else "the registry or an option has changed"
                raise InvalidInput(f"the interrupted job had another {what}: {why}.", hint=BEGIN_AGAIN)
        if files.in_place:
            return state
        if state.errors_bytes and not files.errors_partial.exists() and files.errors.exists():
            files.errors.replace(files.errors_partial)    # the crash came while finishing
            sync_folder(files.errors.parent)
    for path, size in ((files.partial, state.output_bytes), (files.errors_partial, state.errors_bytes)):
        with path.open("ab") as file:
            if file.tell() < size:
                raise InvalidInput(f"{path} is shorter than the job's progress says.", hint=BEGIN_AGAIN)
            file.truncate(size)
    state.save(files.progress)
    return state


def _done(reader: RowReader, files: JobFiles) -> Summary:
    """What a job did whose output is whole, read from its files. Raises InvalidInput where they do not answer this input, row by row."""
    started = time.perf_counter()
    failed = {row["line"] for _, row in read_rows(files.errors) if isinstance(row, dict)} if files.errors.exists() else set()
    answered, counts = (row for _, row in read_rows(files.output)), Counter[str | None]()
    for line, row in reader:
        if line in failed:
            continue
        answer = next(answered, None)
        if isinstance(row, BadRow) or not isinstance(answer, dict) or _asked(answer) != _asked(row):
            raise InvalidInput(f"{str(files.output)!r} exists, and does not answer line {line} of this input.", hint=BEGIN_AGAIN)
        counts[answer.get("adapter") or None] += 1
    if next(answered, None) is not None:
        raise InvalidInput(f"{str(files.output)!r} exists, and has more rows than this input.", hint=BEGIN_AGAIN)
    adapters = {name: count for name, count in counts.items() if name is not None}
    state = _State("", "", counts.total() + len(failed), failed=len(failed), abstained=counts[None], adapters=adapters)
    return _summary(state, files, time.perf_counter() - started, 0)


def _asked(row: Mapping[str, JSON]) -> str | Conversation | None:
    try:
        return input_of(row)
    except InvalidInput:
        return None


def _summary(state: _State, files: JobFiles, seconds: float, rows_now: int) -> Summary:
    return Summary(
        rows=state.rows,
        answered=state.rows - state.failed,
        abstained=state.abstained,
        failed=state.failed,
        adapters=dict(sorted(state.adapters.items(), key=lambda item: (-item[1], item[0]))),
        seconds=seconds,
        rows_per_s=rows_now / max(seconds, 1e-9),
        output=str(files.output),
        errors=str(files.errors) if state.failed else None,
    )


def _answer_all(
    reader: RowReader, files: JobFiles, answer: Answer, state: _State, chunk_rows: int, started: float, progress: Callable[[Progress], None] | None
) -> None:
    rows = iter(reader)
    if sum(1 for _ in itertools.islice(rows, state.rows)) < state.rows:
        raise UnreadableFile(f"{str(reader.path)!r} has fewer rows than were answered before.", hint=BEGIN_AGAIN)
    with files.partial.open("ab") as out, files.errors_partial.open("ab") as bad:
        for chunk in _chunks(rows, chunk_rows):
            _answer_chunk(chunk, answer, state, out, bad)
            for file in (out, bad):
                file.flush()
                os.fsync(file.fileno())
            state.rows += len(chunk)
            state.output_bytes, state.errors_bytes = out.tell(), bad.tell()
            state.save(files.progress)
            if progress:
                progress(Progress(state.rows, state.failed, reader.share, time.perf_counter() - started))


def _answer_chunk(chunk: Sequence[tuple[int, Any]], answer: Answer, state: _State, out: IO[bytes], bad: IO[bytes]) -> None:
    faults: dict[int, str] = {}
    good: list[tuple[int, str | Conversation]] = []
    for line, row in chunk:
        try:
            if isinstance(row, BadRow):
                faults[line] = f"the row {row.reason}"
            else:
                good.append((line, input_of(row)))
        except InvalidInput as error:
            faults[line] = error.fact.removesuffix(".")
    answers = dict(_answered(good, answer))
    counts = Counter(state.adapters)
    for line, row in chunk:
        answered = answers.get(line)
        if answered is None or isinstance(answered, HubError):
            reason = faults[line] if answered is None else str(answered)
            raw = row.raw if isinstance(row, BadRow) else json.dumps(row, ensure_ascii=False, default=str)[:200]
            bad.write(line_of({"line": line, "reason": reason, "row": raw}))
            state.failed += 1
            continue
        out.write(line_of(merged(row, answered)))
        if answered.get("adapter") is None:
            state.abstained += 1
        else:
            counts[answered["adapter"]] += 1
    state.adapters = dict(counts)


def _answered(rows: Sequence[tuple[int, str | Conversation]], answer: Answer) -> Iterator[tuple[int, Mapping[str, JSON] | HubError]]:
    """(line, answer or the error of that row). A fault in the midst is found by halving, so that it fails its own row only."""
    if not rows:
        return
    try:
        found = answer([asked for _, asked in rows])
    except ROW_FAULTS as error:
        if len(rows) == 1:
            yield rows[0][0], error
            return
        middle = len(rows) // 2
        yield from _answered(rows[:middle], answer)
        yield from _answered(rows[middle:], answer)
        return
    for (line, _), one in zip(rows, found, strict=True):
        if isinstance(one, HubError) and not isinstance(one, ROW_FAULTS):
            raise one
        yield line, one


def merged(row: Mapping[str, JSON], answer: Mapping[str, JSON]) -> dict[str, JSON]:
    """The input's fields in their order, then the answer's. The answer's names win: the input's are kept under another."""
    taken = {*ANSWER_NAMES, *answer, *(["target"] if "label" in row else [])}
    kept = {"target" if key == "label" else _renamed(key, row) if key in taken else key: value for key, value in row.items()}
    return kept | dict(answer)


def _renamed(key: str, row: Mapping[str, JSON]) -> str:
    name = f"input_{key}"
    while name in row:
        name = f"input_{name}"
    return name


def _chunks(rows: Iterator[tuple[int, Any]], size: int) -> Iterator[list[tuple[int, Any]]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _identity(path: Path) -> str:
    """The input's digest. All of it is read, which costs nothing beside answering it: an edit anywhere makes it another input."""
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise UnreadableFile(f"{str(path)!r} cannot be read to its end ({error}).", hint="Copy the file again.") from error
