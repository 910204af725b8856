"""GenEval's folder layout, written and read: NNNNN/metadata.jsonl and NNNNN/samples/NNNN.png, NNNNN being the prompt's line.

Source: GenEval (djghosh13/geneval af4902f, MIT), generation and evaluation scripts, restated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apexflow.evaluation.suite import Drawing, Found, Picture, Prompt, Suite

SAMPLE = re.compile(r"^\d+\.png")  # matched from the start, as officially


class GenEvalFolders(Suite):
    """A suite whose pictures lie as GenEval's do."""

    tasks: tuple[str, ...] = ()  # of the prompts whose pictures were looked for

    def notes(self, prompts: Sequence[Prompt]) -> dict[str, str]:
        return {f"{prompt.index:05d}/metadata.jsonl": json.dumps(dict(prompt.metadata)) for prompt in prompts}

    def drawings(self, prompts: Sequence[Prompt]) -> list[Drawing]:
        return [
            Drawing(f"{p.index:05d}/samples/{copy:04d}.png", p.text, (p.index * self.per_prompt + copy,))
            for p in prompts
            for copy in range(self.per_prompt)
        ]

    def find(self, folder: Path, prompts: Sequence[Prompt]) -> Found:
        self.tasks = tuple(dict.fromkeys(prompt.metadata["tag"] for prompt in prompts))
        found = Found()
        waiting = {prompt.index: prompt for prompt in prompts}
        for place in sorted(path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()):
            metadata = _read_metadata(place)
            prompt = None if metadata is None else _match(int(place.name), metadata, waiting)
            if metadata is None or prompt is None:
                found.extra.append(place.name)
                continue
            del waiting[prompt.index]
            samples = sorted((p for p in (place / "samples").glob("*") if SAMPLE.match(p.name)), key=_number)
            names = [path.relative_to(folder).as_posix() for path in samples]
            taken = list(zip(names, samples, strict=True))[: self.per_prompt]
            found.pictures += [Picture(name, path, metadata) for name, path in taken]
            found.extra += names[self.per_prompt :]
            found.missing += [f"{place.name}/samples/{name}" for name in _lacking(samples, self.per_prompt)]
        found.missing += [drawing.path for drawing in self.drawings(list(waiting.values()))]
        return found

    def of_all_tasks(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """A task without a scored picture has no mean, and a mean over the others would be no overall."""
        lacking = [task for task in self.tasks if task not in report["tasks"]]
        without = {key: None for key in ("overall", "overall_se", "strict") if key in report and lacking}
        every = {key: report[key] | dict.fromkeys(lacking) for key in ("tasks", "strict_tasks") if key in report}
        return dict(report) | without | every


def _number(sample: Path) -> tuple[int, str]:
    return int(sample.name.partition(".")[0]), sample.name


def _lacking(samples: Sequence[Path], wanted: int) -> list[str]:
    """The names that fill the holes in the numbering, with as many digits as the others have."""
    there = {_number(sample)[0] for sample in samples}
    digits = len(samples[0].name.partition(".")[0]) if samples else 4
    low, high = min(there, default=0), max(there, default=0)
    free = sorted(set(range(wanted)) - there, key=lambda number: (not low < number < high, number))
    return [f"{number:0{digits}d}.png" for number in free[: max(wanted - len(samples), 0)]]


def _read_metadata(place: Path) -> dict[str, Any] | None:
    try:
        metadata = json.loads((place / "metadata.jsonl").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return metadata if isinstance(metadata, dict) and {"tag", "prompt"} <= metadata.keys() else None


def _match(number: int, metadata: Mapping[str, Any], waiting: Mapping[int, Prompt]) -> Prompt | None:
    """The prompt that a folder belongs to: that of its number, or one that asks for the same. The wording may differ."""
    if number in waiting and _asks(waiting[number].metadata) == _asks(metadata):
        return waiting[number]
    return next((prompt for prompt in waiting.values() if _asks(prompt.metadata) == _asks(metadata)), None)


def _asks(metadata: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return metadata["tag"], metadata.get("include", []), metadata.get("exclude", [])
