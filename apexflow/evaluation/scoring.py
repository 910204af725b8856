"""The second stage of an evaluation: pictures in a folder, whoever drew them, to rows of scores; resumable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from apexflow.errors import UserError
from apexflow.evaluation.files import read_rows, stamp, write_rows
from apexflow.evaluation.suite import Found, Picture, Row, Suite
from apexflow.progress import Progress

RESULTS = "results.jsonl"


@dataclass
class Scored:
    """rows of the pictures that have a score, in the folder's order; failed {name: why there is none}."""

    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)


def score(suite: Suite, found: Found, work: Path, title: str) -> Scored:
    """Score what has no row in `work/results.jsonl` yet; each row is on disk before the next picture is looked at."""
    origins = {picture.name: _origin(picture) for picture in found.pictures}
    done = {row["filename"]: row for row in read_rows(work / RESULTS) if _is_of(row, origins.get(row["filename"]))}
    write_rows(work / RESULTS, list(done.values()))  # without half a line of a killed run, nor rows of other pictures
    todo = [picture for picture in found.pictures if picture.name not in done]
    failed: dict[str, str] = {}
    with (
        (work / RESULTS).open("a", encoding="utf-8") as file,
        Progress(f"{title}: scoring", len(found.pictures), len(done)) as progress,
    ):
        for row in suite.score(todo, work) if todo else ():
            if "error" in row:
                failed[row["filename"]] = row["error"]
            else:
                done[row["filename"]] = _append(file, row | origins[row["filename"]])
            progress.advance()
    rows = [done[picture.name] for picture in found.pictures if picture.name in done]
    write_rows(work / RESULTS, rows)
    if not rows:
        why = f", such as {next(iter(failed.items()))}" if failed else ""
        raise UserError(f"no picture could be scored: {len(found.missing)} missing, {len(failed)} failed{why}")
    return Scored(rows, failed)


def _origin(picture: Picture) -> dict[str, str]:
    """What a row was made from: a picture that is written again, or asked for otherwise, gets another row.

    How it was scored is in scoring.json, and a folder holds one way only.
    """
    asked = hashlib.sha256(json.dumps(dict(picture.metadata), sort_keys=True).encode()).hexdigest()
    return {"stamp": stamp(picture.path), "asked": asked[:16]}


def _is_of(row: Row, origin: dict[str, str] | None) -> bool:
    return origin is not None and all(row.get(key) == value for key, value in origin.items())


def _append(file: IO[str], row: Row) -> Row:
    file.write(f"{json.dumps(row)}\n")
    file.flush()
    return row
