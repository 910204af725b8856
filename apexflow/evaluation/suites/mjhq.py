"""MJHQ-30K: FID against Playground's pictures and the CLIP score, in Sana's protocol.

Needs --data (the folder with meta_data.json, and the reference pictures below it), --inception for FID and --clip for
the CLIP score. --reference names other reference pictures, or mu and sigma in one file. --protocol is sana, clean or
torch-fidelity; their numbers, and those of two picture sizes (--fid-size), do not compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

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
from apexflow.files import read_json
from apexflow.progress import Progress

META = "meta_data.json"


class Mjhq(OneFileEach):
    """One JPEG a prompt, named after its id, in the order of meta_data.json."""

    pictures_a_prompt = 1
    allowed = (1,)
    takes = ("data", "clip", "inception", "reference", "protocol", "fid_size")
    spread_limit = False
    asked: Sequence[Prompt] = ()
    size: int | None = None  # at which FID looks at the pictures, known once they are found

    @property
    def protocol(self) -> str:
        return self.tools.protocol or PROTOCOLS[0]

    @cached_property
    def root(self) -> Path:
        data = needs(self.tools.data, "--data", f"the MJHQ-30K folder with {META}")
        return data if data.is_dir() else data.parent

    @cached_property
    def network(self) -> Inception | None:
        return None if self.tools.inception is None else Inception.load(self.tools.inception, self.tools.device)

    @cached_property
    def clip(self) -> Clip | None:
        return None if self.tools.clip is None else Clip.load(self.tools.clip, self.tools.device)

    def check(self) -> None:
        given = [name for name in ("protocol", "fid_size", "reference") if getattr(self.tools, name) is not None]
        if given and self.tools.inception is None:
            raise UserError(f"--{given[0].replace('_', '-')} is about FID: name --inception too, or leave it out")
        if self.protocol not in PROTOCOLS:
            raise UserError(f"--protocol {self.protocol!r} is unknown: FID has {', '.join(PROTOCOLS)}")
        if self.tools.fid_size is not None and self.protocol != PROTOCOLS[0]:
            raise UserError(
                f"--fid-size cannot apply to --protocol {self.protocol}, which resizes to 299: leave it out"
            )
        if self.tools.inception is None and self.tools.clip is None:
            raise UserError("--inception (for FID), --clip (for the CLIP score) or both are needed")
        if self.tools.inception is not None:
            needs(self.tools.inception, "--inception", "the FID Inception as a safetensors file")
            needs(self.tools.reference or self.root, "--reference", "reference pictures, or a file with mu and sigma")
        if self.tools.clip is not None:
            needs(self.tools.clip, "--clip", "a folder with openai/clip-vit-large-patch14", Path.is_dir)

    def prompts(self) -> list[dict[str, Any]]:
        meta = read_json(self.root / META, "the MJHQ-30K prompts", object)
        try:
            return [{"id": name, "category": data["category"], "prompt": data["prompt"]} for name, data in meta.items()]
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{self.root / META} does not hold {{id: {{category, prompt}}}}: fetch it again") from None

    def name_of(self, prompt: Prompt) -> str:
        return f"{prompt.metadata['id']}.jpg"

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
        by_path = {picture.path: picture for picture in pictures}
        features: dict[str, torch.Tensor] = {}
        batch: list[tuple[Picture, Image.Image]] = []
        for path, image, feature in extract(self.network, list(by_path), self.protocol, self.size or 0):
            picture = by_path[path]
            if isinstance(image, Unreadable):
                rows.append({"filename": picture.name, "error": str(image)})
                continue
            if feature is not None:
                features[picture_key(path, picture.name)] = feature
            batch.append((picture, image))
            if len(batch) == BATCH:
                rows += self._rows(batch)
                batch = []
        store.add(features)
        return rows + self._rows(batch)

    def _rows(self, batch: Sequence[tuple[Picture, Image.Image]]) -> list[Row]:
        scores: list[float | None] = [None] * len(batch)
        if self.clip is not None and batch:
            texts = [picture.metadata["prompt"] for picture, _ in batch]
            scores = [*self.clip.score([image for _, image in batch], texts).tolist()]
        return [
            {"filename": picture.name}
            | {key: picture.metadata[key] for key in ("id", "category", "prompt")}
            | {"clip": score}
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
                    "beside it, and they are looked at again"
                )
            *reference, reference_count = self._reference(self.network, work)
            fid = fid_from_statistics(mean, covariance, *reference)
            size = f", {self.size} px" if self.protocol == "sana" else ""
            report["tasks"][f"fid ({self.protocol}{size}, {count} pictures)"] = fid
            report |= {"fid": fid, "reference": str(self.reference.resolve()), "reference_pictures": reference_count}
        if self.clip is not None:
            report["clip"] = sum(row["clip"] for row in rows) / len(rows)
            report["tasks"]["clip"] = report["clip"]
        return report

    def _reference(self, network: Inception, work: Path) -> tuple[Array, Array, int | None]:
        """Mean, covariance and number of the reference pictures: a file's, or made once from pictures."""
        if self.reference.is_file():
            return *read_statistics(self.reference), None
        paths = self.reference_pictures
        store, keys = FeatureStore(work / "reference"), {picture_key(path, str(path)): path for path in paths}
        known = store.keys()
        todo = [path for key, path in keys.items() if key not in known]
        with Progress("reference pictures", len(paths), len(paths) - len(todo)) as progress:
            for part in groups(todo, CHUNK):
                self._add_reference(network, part, store)
                progress.advance(len(part))
        return statistics(store, keys)

    @property
    def reference(self) -> Path:
        """A file with mu and sigma, or a folder of pictures."""
        return self.tools.reference or self.root

    @cached_property
    def reference_pictures(self) -> list[Path]:
        return self._own_reference() if self.tools.reference is None else _pictures(self.reference)

    def _reference_sha256(self) -> str:
        """Of the file, or of the names and sizes of the pictures."""
        if self.reference.is_file():
            return hashlib.sha256(self.reference.read_bytes()).hexdigest()
        digest = hashlib.sha256()
        for path in self.reference_pictures:
            digest.update(f"{path.relative_to(self.reference).as_posix()}:{path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def _own_reference(self) -> list[Path]:
        """MJHQ's own pictures of the prompts: <category>/<id>.jpg somewhere below the folder."""
        wanted = {(prompt.metadata["category"], prompt.metadata["id"]) for prompt in self.asked}
        paths = {(path.parent.name, path.stem): path for path in _pictures(self.root)}
        lacking = sorted(wanted - paths.keys())
        if lacking:
            raise UserError(
                f"{len(lacking)} of {len(wanted)} reference pictures are not below {self.root} (such as "
                f"{'/'.join(lacking[0])}.jpg): unzip mjhq30k_imgs.zip there, or name --reference"
            )
        return [path for key, path in sorted(paths.items()) if key in wanted]

    def _add_reference(self, network: Inception, paths: Sequence[Path], store: FeatureStore) -> None:
        done: dict[str, torch.Tensor] = {}
        for path, image, feature in extract(network, paths, self.protocol, self.size or 0):
            if feature is None:
                raise UserError(f"the reference picture {path} cannot be used ({image}): fetch it again")
            done[picture_key(path, str(path))] = feature
        store.add(done)


def _pictures(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise UserError(f"no reference picture below {folder}: unzip mjhq30k_imgs.zip there, or name --reference")
    return paths


def _side(pictures: Sequence[Picture]) -> int | None:
    """The shortest side of the first picture that can be read."""
    for picture in pictures:
        try:
            return min(open_picture(picture.path).size)
        except Unreadable:
            continue
    return None
