"""Captioned pictures on disk: webdataset tars or a folder of pictures with same-name .txt files. One format for all sets."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from apexflow.data.scenes import Scene, render
from apexflow.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Captioned:
    """One picture (RGB) with its caption; `key` names it in messages."""

    key: str
    image: Image.Image
    caption: str


@dataclass
class Skipped:
    """Records that could not be used, each with the reason, and how many were looked at."""

    seen: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def check(self, limit: float, source: Path) -> None:
        """UserError when nothing could be read, or when more than the share `limit` was skipped."""
        first = next(iter(self.reasons.items()), None)
        example = f"; first: {first[0]}: {first[1]}" if first else ""
        if len(self.reasons) >= self.seen:
            raise UserError(f"{source} holds no usable captioned picture ({self.seen} looked at){example}")
        if len(self.reasons) > limit * self.seen:
            raise UserError(
                f"{len(self.reasons)} of {self.seen} records of {source} cannot be used (more than {limit:.0%}){example}"
            )


def read_captioned(source: Path, skipped: Skipped) -> Iterator[Captioned]:
    """Every usable record of a folder or tar, in name order; what is not usable goes to `skipped`.

    Raises UserError when the source is missing, holds neither tars nor pictures, or a tar is truncated or no tar.
    """
    if not source.exists():
        raise UserError(
            f"data {str(source)!r} not found: give a folder of pictures with .txt captions, or webdataset .tar shards"
        )
    tars = [source] if source.suffix == ".tar" else sorted(source.glob("*.tar"))
    pictures = [] if tars else sorted(p for p in source.rglob("*") if p.suffix.lower() in PICTURES)
    if not tars and not pictures:
        raise UserError(
            f"data folder {source} is empty: it holds neither .tar shards nor pictures ({', '.join(PICTURES)})"
        )
    samples = (s for tar in tars for s in _tar_samples(tar)) if tars else (_file_sample(p) for p in pictures)
    for key, picture, caption in samples:
        skipped.seen += 1
        reason = _fault(picture, caption)
        image = None if reason else _decode(picture)
        if image is None:
            skipped.reasons[key] = reason or "corrupt picture"
        else:
            yield Captioned(key, image, (caption or "").strip())


def _fault(picture: bytes, caption: str | None) -> str:
    if caption is None:
        return "caption missing"
    if not caption.strip():
        return "caption empty"
    return "" if picture else "picture missing"


def _decode(picture: bytes) -> Image.Image | None:
    try:
        return Image.open(io.BytesIO(picture)).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None


def _file_sample(path: Path) -> tuple[str, bytes, str | None]:
    text = path.with_suffix(".txt")
    caption = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else None
    return str(path), path.read_bytes(), caption


def _tar_samples(path: Path) -> Iterator[tuple[str, bytes, str | None]]:
    """Consecutive members of one stem are one record, as webdataset has it."""
    current = ""
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                stem, suffix = os.path.splitext(member.name)
                if stem != current and parts:
                    yield _record(path, current, parts)
                    parts = {}
                current = stem
                parts[suffix.lower()] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"shard {path} is corrupt or truncated ({error}): write or fetch it again") from error
    if parts:
        yield _record(path, current, parts)


def _record(path: Path, stem: str, parts: dict[str, bytes]) -> tuple[str, bytes, str | None]:
    picture = next((parts[s] for s in PICTURES if s in parts), b"")
    caption = parts[".txt"].decode("utf-8", errors="replace") if ".txt" in parts else _json_caption(parts.get(".json"))
    return f"{path.name}:{stem}", picture, caption


def _json_caption(raw: bytes | None) -> str | None:
    try:
        record = json.loads(raw or b"null")
    except ValueError:
        return None
    named = [record.get(k) for k in ("caption", "prompt", "text")] if isinstance(record, dict) else []
    return next((value for value in named if isinstance(value, str)), None)


def write_scenes(scenes: Iterable[Scene], folder: Path, per_shard: int = 5000) -> int:
    """Write scenes as webdataset shards (.png, .txt, .json metadata), each shard appearing whole or not at all; the count."""
    folder.mkdir(parents=True, exist_ok=True)
    shard: list[Scene] = []
    written = 0
    for scene in scenes:
        shard.append(scene)
        if len(shard) == per_shard:
            written += _write_shard(shard, folder, written)
            shard = []
    return written + (_write_shard(shard, folder, written) if shard else 0)


def _write_shard(shard: list[Scene], folder: Path, start: int) -> int:
    path = folder / f"scenes-{start:07d}.tar"
    partial = path.with_suffix(".tar.partial")
    with tarfile.open(partial, "w") as tar:
        for index, scene in enumerate(shard, start):
            picture = io.BytesIO()
            render(scene.things).save(picture, "PNG")
            _add(tar, f"{index:07d}.png", picture.getvalue())
            _add(tar, f"{index:07d}.txt", scene.caption.encode())
            _add(tar, f"{index:07d}.json", json.dumps(scene.metadata).encode())
    os.replace(partial, path)
    return len(shard)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time or owner: the same scenes give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
