"""Progress on standard error: a live bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

# A path may hold brackets; a line that is wrapped cannot be searched for.
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
Item = TypeVar("Item")
LINE_EVERY = 15.0  # seconds between lines where there is no terminal


class Progress:
    """A counted task with a note beside it (losses, say). `total` None means the end is not known.

    Nothing is shown while `console.quiet`, as in all processes of a run but the first.
    """

    def __init__(self, title: str, total: int | None = None, done: int = 0) -> None:
        self.title, self.total, self.done, self.note, self._told = title, total, done, "", done
        self._bar: Bar | None = None
        self._started, self._first, self._printed = time.monotonic(), done, time.monotonic()

    def __enter__(self) -> Progress:
        if console.is_terminal and not console.quiet:
            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            ]
            self._bar = Bar(*columns, TextColumn("{task.fields[note]}", markup=False), console=console)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, note="")
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note)
        elif time.monotonic() - self._printed > LINE_EVERY:
            self._print()

    def _print(self) -> None:
        if console.quiet:
            return
        self._printed, self._told = time.monotonic(), self.done
        rate = (self.done - self._first) / max(self._printed - self._started, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate > 0 else ""
        of = f"/{self.total}" if self.total else ""
        print(f"{self.title}: {self.done}{of}, {rate:.2f}/s{left}  {self.note}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif time.monotonic() - self._started > LINE_EVERY and self.done != self._told:
            self._print()


def counted(title: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """The items, shown as they are taken."""
    with Progress(title, total) as progress:
        for item in items:
            progress.advance()
            yield item
