"""The command line called in this process, and what its mistakes look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Run = Callable[..., tuple[int, str, str]]  # arguments -> exit code, output, errors


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2 and one line that holds every word."""
    code, _, errors = result
    assert code == 2, errors
    line = errors.strip().splitlines()[-1]
    assert line.startswith("apexflow: error: ") and "Traceback" not in errors
    assert all(word in line for word in words), line


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def generate(run: Run, model: Path | str, *more: object) -> tuple[int, str, str]:
    return run("generate", "a star", "--model", model, "--steps", 1, "--force", *more)
