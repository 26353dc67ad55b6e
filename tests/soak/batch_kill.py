"""Kill a batch job at random moments, resume it, and compare its output with an uninterrupted run's, byte for byte.

    python -m tests.soak.batch_kill --kills 50

The job's answers are cheap and depend on the text alone. The last line is JSON; exit code 1 where a byte differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapter_hub.batch.files import JobFiles
from adapter_hub.batch.job import run_job
from adapter_hub.errors import InvalidInput

FORMATS = (".jsonl", ".csv", ".parquet")
ROWS = 3_000
COUNTS = ("rows", "answered", "abstained", "failed", "adapters")


def answer(texts: Sequence[str]) -> list[dict[str, Any]]:
    if any("poison" in text for text in texts):
        raise InvalidInput("a poisoned text.")
    time.sleep(0.0005 * len(texts) / 16)
    found = [zlib.crc32(text.encode()) for text in texts]
    return [{"adapter": f"a{n % 3}@1" if n % 4 else None, "score": n % 1000 / 1000, "label": f"l{n % 7}"} for n in found]


def write_input(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            row = {"text": f"text {i} ünï", "label": f"t{i % 5}", "n": i} if i % 97 else {"txt": "no text"}
            file.write(json.dumps(row | ({"text": "poison"} if i % 501 == 250 else {})) + "\n")


def job(source: Path, output: Path, resume: bool) -> dict[str, Any]:
    return run_job(source, output, answer, settings={"v": 1}, chunk_rows=64, resume=resume).to_json()


def killed_and_resumed(
    source: Path, output: Path, kills: int, seconds_max: float, luck: random.Random, expected: Mapping[str, Any]
) -> int:
    """Run the job with up to `kills` kills, then to its end, which must report `expected`. Returns how many hit a running job."""
    hits = 0
    for _ in range(kills):
        if output.exists():
            break
        child = os.fork()
        if child == 0:
            code = 1
            try:
                job(source, output, resume=True)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        files = JobFiles(output)
        if luck.random() < 0.3:
            # The last steps are short: wait for them, to be sure that some kills fall between the renames.
            deadline = time.perf_counter() + 2 * seconds_max
            while not (files.finished.exists() or files.errors.exists()) and time.perf_counter() < deadline:
                time.sleep(0.0005)
            time.sleep(luck.uniform(0, seconds_max / 20))
        else:
            time.sleep(luck.uniform(0, seconds_max))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code > 0:
            raise RuntimeError(f"the job for {output} failed by itself; its trace is above")
        hits += code < 0
    # Also where the output is whole: the kill may have come before the lock was removed, and whoever saw it resumes.
    counts = {key: value for key, value in job(source, output, resume=True).items() if key in COUNTS}
    if counts != expected:
        raise RuntimeError(f"the counts of {output} are {counts}, not {expected}")
    return hits


def run(kills: int, seed: int) -> dict[str, Any]:
    luck, hits, faults = random.Random(seed), 0, []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = root / "in.jsonl"
        write_input(source, ROWS)
        whole, expected, seconds = {}, {}, 0.0
        for suffix in FORMATS:
            begun = time.perf_counter()
            done = job(source, root / f"whole{suffix}", resume=False)
            expected = {key: done[key] for key in COUNTS}
            seconds = max(seconds, time.perf_counter() - begun)
            whole[suffix] = [(root / f"whole{suffix}{end}").read_bytes() for end in ("", ".errors.jsonl")]
        round_ = 0
        while hits < kills:
            suffix = FORMATS[round_ % len(FORMATS)]
            output = root / f"{round_}{suffix}"
            try:
                hits += killed_and_resumed(source, output, min(4, kills - hits), seconds, luck, expected)
            except RuntimeError as error:
                faults.append(f"round {round_}: {error}")
                break
            found = [Path(f"{output}{end}").read_bytes() for end in ("", ".errors.jsonl")]
            left = sorted(p.name for p in root.glob(f"{round_}{suffix}.*") if not p.name.endswith(".errors.jsonl"))
            if found != whole[suffix] or left:
                faults.append(f"round {round_}{suffix}: {'bytes differ' if found != whole[suffix] else left}")
            round_ += 1
    return {"jobs_killed": hits, "rounds": round_, "faults": faults, "seed": seed, "seconds": round(time.perf_counter() - started, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    result = run(arguments.kills, seed)
    print(json.dumps(result))
    return bool(result["faults"])


if __name__ == "__main__":
    sys.exit(main())
