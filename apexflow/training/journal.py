"""What a run leaves behind while it goes: `metrics.jsonl` and tensorboard curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

from apexflow.errors import writing
from apexflow.files import write_text


class Journal:
    """One line of JSON a step. On resume, lines of steps that the checkpoint does not know are dropped.

    A `silent` one, for processes other than the first, writes nothing.
    """

    def __init__(self, folder: Path, step: int, silent: bool = False) -> None:
        self.silent = silent
        if silent:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        if self.path.is_file():
            kept = [line for line in self.path.read_text().splitlines(keepends=True) if _step(line) <= step]
            write_text(self.path, "".join(kept))
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if self.silent:
            return
        with writing(self.path):
            plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            self._file.write(json.dumps({"step": step} | plain) + "\n")
        for name, value in numbers.items():
            if name != "seconds":
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.silent:
            return
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, null as nan; a last line cut off by a crash is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    read = [json.loads(line) for line in lines if line.endswith("}")]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in read]


def last_step(folder: Path) -> int:
    """The last step that metrics.jsonl tells of, 0 where there is none."""
    path = folder / "metrics.jsonl"
    steps = [_step(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return max((int(step) for step in steps if step < float("inf")), default=0)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
