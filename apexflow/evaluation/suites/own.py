"""The user's own captioned pictures: FID against them, the CLIP score and diversity. Any set that can be trained on.

Needs --data (the set), and --inception for FID, --clip for the CLIP score or both; without them only diversity is taken, where
a prompt has several pictures. --reference names other reference pictures, or mu and sigma in one file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from apexflow.data.captioned import Sample, Skipped, read_sample
from apexflow.data.readers import Source, recognise
from apexflow.errors import UserError
from apexflow.evaluation.against import AgainstPictures, Reference
from apexflow.evaluation.files import Unreadable, read_ahead
from apexflow.evaluation.suite import Drawing, Prompt, needs


@dataclass(frozen=True)
class Record:
    """One usable record: its caption, and a hash of its pixels (None in a list of prompts)."""

    sample: Sample
    caption: str
    pixels: str | None


class Own(AgainstPictures):
    """NNNNN.png, counted from 0 in the order of the set, or NNNNN-0.png and so on where a prompt has several."""

    pictures_a_prompt = 1
    measures_diversity = True
    needs_scorer = False
    mend = "put intact pictures there, or give --reference"
    most: int | None = None  # records to look at: one more than a limit, so that it is seen whether it leaves any out

    @cached_property
    def root(self) -> Path:
        return needs(self.tools.data, "--data", "a dataset of captioned pictures")

    @cached_property
    def source(self) -> Source:
        return recognise(self.root)

    def check(self) -> None:
        super().check()
        if self.tools.inception is not None and self.tools.reference is None and not self.source.kind.pictures:
            raise UserError(
                f"{self.root} holds only prompts, and FID needs pictures: give --reference, or other --data"
            )

    def choose(self, limit: int | None) -> tuple[list[Prompt], bool]:
        self.most = limit and limit + 1
        return super().choose(limit)

    def prompts(self) -> list[dict[str, Any]]:
        return [{"id": f"{index:05d}", "prompt": record.caption} for index, record in enumerate(self.records)]

    def name_of(self, prompt: Prompt) -> str:
        return f"{prompt.metadata['id']}.png"

    def files(self, prompt: Prompt) -> list[Drawing]:
        if self.per_prompt == 1:
            return super().files(prompt)
        first, stem = prompt.index * self.per_prompt, prompt.metadata["id"]
        return [Drawing(f"{stem}-{copy}.png", prompt.text, (first + copy,)) for copy in range(self.per_prompt)]

    def own_pictures(self) -> list[Reference]:
        return [_reference(self.records[prompt.index], prompt.index) for prompt in self.asked]

    def aggregate(self, rows: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
        report = super().aggregate(rows, work)
        faults = self.skipped.broken | self.skipped.reasons
        told = [report["warning"]] if "warning" in report else []
        for name, reason in list(faults.items())[:1]:
            told.append(
                f"{len(faults)} of {self.skipped.seen} records left out of {self.root} (first: {name}: {reason})"
            )
        return report | ({"left_out": faults} if faults else {}) | ({"warning": "; ".join(told)} if told else {})

    @property
    def records(self) -> list[Record]:
        return self._looked_at[0]

    @property
    def skipped(self) -> Skipped:
        return self._looked_at[1]

    @property
    def _looked_at(self) -> tuple[list[Record], Skipped]:
        key = ("records", self.most)
        if key not in self.tools.known:
            self.tools.known[key] = self._look()
        return self.tools.known[key]

    def _look(self) -> tuple[list[Record], Skipped]:
        """The usable records up to the most that are looked at, and what was left out. UserError where there is none."""
        found: list[Record] = []
        skipped = Skipped(files=len(self.source.files))
        for sample, record in read_ahead(self.source.samples(skipped.broken), _look_at):
            skipped.seen += 1
            if isinstance(record, Unreadable):
                skipped.reasons[sample.name] = str(record)
                continue
            found.append(record)
            if len(found) == self.most:
                break
        skipped.check(1.0, self.root)
        return found, skipped


def _look_at(sample: Sample) -> Record:
    """Raises Unreadable for a record that cannot be used, whose picture may be what cannot be read."""
    record = read_sample(sample)
    if isinstance(record, str):
        raise Unreadable(record)
    if record.image is None:
        return Record(sample, record.caption, None)
    digest = hashlib.sha256(f"{record.image.size}".encode() + record.image.tobytes())
    return Record(sample, record.caption, digest.hexdigest())


def _picture(sample: Sample) -> Image.Image:
    record = read_sample(sample)
    if isinstance(record, str) or record.image is None:
        raise Unreadable(record if isinstance(record, str) else "no picture")
    return record.image


def _reference(record: Record, index: int) -> Reference:
    key = f"{index}@{record.pixels}"
    return Reference(record.sample.name, key, str(record.pixels), partial(_picture, record.sample))
