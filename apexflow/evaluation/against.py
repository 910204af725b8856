"""What the suites of real pictures share: FID against reference pictures, and the CLIP score, in Sana's protocol.

--protocol is sana, clean or torch-fidelity; their numbers, and those of two picture sizes (--fid-size), do not compare.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from apexflow.data.cache import checksum
from apexflow.data.fingerprint import fingerprint
from apexflow.data.pictures import PICTURES
from apexflow.data.shards import groups
from apexflow.errors import UserError
from apexflow.evaluation.clip import Clip
from apexflow.evaluation.features import (
    BATCH,
    CHUNK,
    FeatureStore,
    extract,
    picture_key,
    read_statistics,
    statistics,
)
from apexflow.evaluation.fid import Array, fid_from_statistics
from apexflow.evaluation.files import Unreadable, open_picture
from apexflow.evaluation.inception import PROTOCOLS, Inception
from apexflow.evaluation.suite import Found, OneFileEach, Picture, Prompt, Row, needs
from apexflow.progress import Progress

CLIP = "a folder with openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Reference:
    """A true picture. key: of its features, another once the picture changes. identity: its line in the sha256 of all."""

    name: str
    key: str
    identity: str
    read: Callable[[], Image.Image]  # raises Unreadable

    @classmethod
    def of_file(cls, path: Path, folder: Path) -> Reference:
        identity = f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}"
        return cls(str(path), picture_key(path, str(path)), identity, partial(open_picture, path))


class AgainstPictures(OneFileEach):
    """A suite whose prompts have true pictures. Needs --data, and --inception (for FID), --clip or both."""

    takes = ("data", "clip", "inception", "reference", "protocol", "fid_size")
    spread_limit = False
    needs_scorer = True
    mend = "give --reference"  # what to do where reference pictures lack or cannot be read
    asked: Sequence[Prompt] = ()
    size: int | None = None  # at which FID looks at the pictures, known once they are found

    @property
    @abstractmethod
    def root(self) -> Path:
        """What --data names."""

    @abstractmethod
    def own_pictures(self) -> Sequence[Reference]:
        """The true pictures of what was asked, which are the reference where no other is named."""

    @property
    def protocol(self) -> str:
        return self.tools.protocol or PROTOCOLS[0]

    @cached_property
    def network(self) -> Inception | None:
        return None if self.tools.inception is None else Inception.load(self.tools.inception, self.tools.device)

    @cached_property
    def clip(self) -> Clip | None:
        return None if self.tools.clip is None else Clip.load(self.tools.clip, self.tools.device)

    def check(self) -> None:
        given = [name for name in ("protocol", "fid_size", "reference") if getattr(self.tools, name) is not None]
        if given and self.tools.inception is None:
            raise UserError(f"--{given[0].replace('_', '-')} is for FID: give --inception too, or leave it out")
        if self.protocol not in PROTOCOLS:
            raise UserError(f"--protocol {self.protocol!r} is unknown: FID has {', '.join(PROTOCOLS)}")
        if self.tools.fid_size is not None and self.protocol != PROTOCOLS[0]:
            raise UserError(
                f"--fid-size cannot be used with --protocol {self.protocol}, which resizes to 299: leave it out"
            )
        if self.tools.inception is None and self.tools.clip is None and self.needs_scorer:
            raise UserError("--inception (for FID), --clip (for the CLIP score) or both are needed")
        if self.tools.inception is not None:
            needs(self.tools.inception, "--inception", "the FID Inception as a safetensors file")
            needs(self.tools.reference or self.root, "--reference", "reference pictures, or a file with mu and sigma")
            if self.statistics_file is not None:
                read_statistics(self.statistics_file)
            elif self.tools.reference is not None:
                pictures_below(self.tools.reference, self.mend)
        if self.tools.clip is not None:
            needs(self.tools.clip, "--clip", CLIP, Path.is_dir)

    def choose(self, limit: int | None) -> tuple[list[Prompt], bool]:
        prompts, whole = super().choose(limit)
        if self.tools.inception is not None and len(prompts) < 2:
            raise UserError(
                f"FID needs at least two pictures, and {self.root} gives {len(prompts)}: raise --limit, add pictures, or "
                "leave --inception out"
            )
        return prompts, whole

    def find(self, folder: Path, prompts: Sequence[Prompt]) -> Found:
        found = super().find(folder, prompts)
        self.asked, self.size = prompts, self.tools.fid_size or _side(found.pictures)
        return found

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {} if self.clip is None else {"clip_weights": fingerprint(self.clip.model)}
        if self.network is not None:
            found |= {"protocol": self.protocol, "fid_size": self.size if self.protocol == PROTOCOLS[0] else None}
            found |= {"inception_weights": self.network.fingerprint(), "reference_sha256": self._reference_sha256()}
        return found

    def score(self, pictures: Sequence[Picture], work: Path) -> Iterator[Row]:
        store = FeatureStore(work / "features")
        for part in groups(pictures, CHUNK):
            yield from self._chunk(part, store)

    def _chunk(self, pictures: Sequence[Picture], store: FeatureStore) -> list[Row]:
        """The rows of some pictures, once their features are on disk."""
        rows: list[Row] = []
        features: dict[str, torch.Tensor] = {}
        opened = partial(extract, self.network, pictures, lambda picture: open_picture(picture.path))
        for part in groups(opened(self.protocol, self.size or 0), BATCH):
            for picture, image, feature in part:
                if isinstance(image, Unreadable):
                    rows.append({"filename": picture.name, "error": str(image)})
                elif feature is not None:
                    features[picture_key(picture.path, picture.name)] = feature
            rows += self._rows([(picture, image) for picture, image, _ in part if not isinstance(image, Unreadable)])
        store.add(features)
        return rows

    def _rows(self, batch: Sequence[tuple[Picture, Image.Image]]) -> list[Row]:
        scores: list[float | None] = [None] * len(batch)
        if self.clip is not None and batch:
            texts = [picture.metadata["prompt"] for picture, _ in batch]
            scores = [*self.clip.score([image for _, image in batch], texts).tolist()]
        return [
            {"filename": picture.name} | dict(picture.metadata) | {"clip": score}
            for (picture, _), score in zip(batch, scores, strict=True)
        ]

    def aggregate(self, rows: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
        report: dict[str, Any] = {"tasks": {}, "overall": None}
        if self.network is not None:
            keys = [f"{row['filename']}@{row['stamp']}" for row in rows]
            mean, covariance, count = statistics(FeatureStore(work / "features"), keys)
            if count != len(rows):
                raise UserError(
                    f"{work / 'features'} lacks {len(rows) - count} of {len(rows)} pictures: delete results.jsonl "
                    "beside it to compute them again"
                )
            key = ("reference", self.protocol, self.size, self._reference_sha256())
            if key not in self.tools.known:
                self.tools.known[key] = self._reference(self.network, work)
            *reference, reference_count = self.tools.known[key]
            fid = fid_from_statistics(mean, covariance, *reference)
            size = f", {self.size} px" if self.protocol == "sana" else ""
            report["tasks"][f"fid ({self.protocol}{size}, {count} pictures)"] = fid
            report |= {"fid": fid, "reference": str(self.reference.resolve()), "reference_pictures": reference_count}
            fewest = min(count, reference_count or count)
            if fewest < len(mean):
                report["warning"] = (
                    f"FID of {fewest:,} pictures is far too high, and comparable only at equal counts: use at least "
                    f"{len(mean):,}, the number of features"
                )
        if self.clip is not None:
            report["clip"] = sum(row["clip"] for row in rows) / len(rows)
            report["tasks"]["clip"] = report["clip"]
        return report

    def _reference(self, network: Inception, work: Path) -> tuple[Array, Array, int | None]:
        """Mean, covariance and number of the reference pictures: a file's, or made once from pictures."""
        if self.statistics_file is not None:
            return *read_statistics(self.statistics_file), None
        pictures, store = self.reference_pictures, FeatureStore(work / "reference")
        known = store.keys()
        todo = [one for one in pictures if one.key not in known]
        with Progress("reference pictures", len(pictures), len(pictures) - len(todo)) as progress:
            for part in groups(todo, CHUNK):
                self._add_reference(network, part, store)
                progress.advance(len(part))
        return statistics(store, [one.key for one in pictures])

    @property
    def reference(self) -> Path:
        """A file with mu and sigma, or a folder of pictures, unless the prompts' own are the reference."""
        return self.tools.reference or self.root

    @property
    def statistics_file(self) -> Path | None:
        named = self.tools.reference
        return named if named is not None and named.is_file() else None

    @cached_property
    def reference_pictures(self) -> Sequence[Reference]:
        if self.tools.reference is None:
            return self.own_pictures()
        return [Reference.of_file(path, self.reference) for path in pictures_below(self.reference, self.mend)]

    def _reference_sha256(self) -> str:
        """Of the file, or of what tells the pictures from others."""
        if self.statistics_file is not None:
            return checksum(self.statistics_file)
        return hashlib.sha256("".join(f"{one.identity}\n" for one in self.reference_pictures).encode()).hexdigest()

    def _add_reference(self, network: Inception, pictures: Sequence[Reference], store: FeatureStore) -> None:
        done: dict[str, torch.Tensor] = {}
        for one, image, feature in extract(network, pictures, lambda one: one.read(), self.protocol, self.size or 0):
            if feature is None:
                raise UserError(f"the reference picture {one.name} cannot be used ({image}): {self.mend}")
            done[one.key] = feature
        store.add(done)


def pictures_below(folder: Path, mend: str) -> list[Path]:
    """The picture files of a folder of references; UserError, with the mend, where there is none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise UserError(f"no reference pictures in {folder}: {mend}")
    return paths


def _side(pictures: Sequence[Picture]) -> int | None:
    """The shortest side of the first picture that can be read."""
    for picture in pictures:
        try:
            return min(open_picture(picture.path).size)
        except Unreadable:
            continue
    return None
