"""What a run leaves behind: `metrics.jsonl` and tensorboard curves while it goes, and the names of what stands beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from apexflow.errors import UserError, writing
from apexflow.files import write_text

METRICS = "metrics.jsonl"
SOURCES = "data.json"  # what it was trained on
COST = "cost.json"  # what it has cost, once it has ended


class Journal:
    """One line of JSON a step. On resume, lines of steps that the checkpoint does not know are dropped.

    A `silent` one, for processes other than the first, writes nothing. UserError where something else lies in its place.
    """

    def __init__(self, folder: Path, step: int, silent: bool = False) -> None:
        self.silent = silent
        if silent:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / METRICS
        if lines := _lines(self.path):
            write_text(self.path, "".join(line for line in lines if _step(line) <= step))
        board = folder / "tensorboard"
        with writing(board):
            board.mkdir(parents=True, exist_ok=True)
            self._board = SummaryWriter(str(board), purge_step=step + 1)
        with writing(self.path):
            self._file = self.path.open("a", buffering=1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if self.silent:
            return
        with writing(self.path):
            plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            self._file.write(json.dumps({"step": step} | plain) + "\n")
        self.show(step, {name: value for name, value in numbers.items() if name != "seconds"})

    def show(self, step: int, numbers: dict[str, float]) -> None:
        """Tensorboard alone."""
        if self.silent:
            return
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.silent:
            return
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, null as nan; a last line cut off by a crash is left out.

    UserError for a file that is no text, ValueError for a line that is no JSON.
    """
    read = [json.loads(line) for line in _lines(folder / METRICS) if line.rstrip().endswith("}")]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in read]


def last_step(folder: Path) -> int:
    """The last step that metrics.jsonl tells of, 0 where there is none."""
    steps = [_step(line) for line in _lines(folder / METRICS)]
    return max((int(step) for step in steps if math.isfinite(step)), default=0)


def _lines(path: Path) -> list[str]:
    """The lines of a text file with their ends, none where there is no such file."""
    try:
        return path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): repair it or move it away") from error


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
