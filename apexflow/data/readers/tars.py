"""webdataset shards: consecutive members of one name are one record (a picture with .txt or .json)."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apexflow.data.captioned import Loaded, Sample
from apexflow.data.pictures import PICTURES
from apexflow.data.readers import files_of, text_of

# The list beside ShareGPT-4o-Image's tars; its twin, text_and_image_to_image.json, is for editing.
MANIFEST = "text_to_image.json"


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie, so that they can be read after the walk has gone on; no offset where it has none."""

    path: Path
    name: str
    offset: int | None
    size: int

    def read(self) -> bytes:
        if self.offset is None:
            raise OSError(f"{self.name} is not a regular file")
        with self.path.open("rb") as file:
            if self.size > os.fstat(file.fileno()).st_size:  # else that much memory would be asked for
                raise OSError(f"{self.name} says that it is larger than its tar")
            file.seek(self.offset)
            return file.read(self.size)


def claim(path: Path) -> list[Path]:
    """The tars of a folder, unless a manifest beside them says that they are ShareGPT-4o-Image's."""
    return [] if (path / MANIFEST).is_file() else files_of(path, ".tar")


def samples(home: Path, files: list[Path], broken: dict[str, str]) -> Iterator[Sample]:
    """The record at which a tar breaks off is lost with the rest of it: nobody knows what it lacks."""
    for path in files:
        current, parts = "", dict[str, Member]()
        for member in members(path, broken):
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != current and parts:
                yield _sample(path, current, parts)
                parts = {}
            current = key
            parts["." + suffix.lower()] = member
        if parts and str(path) not in broken:
            yield _sample(path, current, parts)


def members(path: Path, broken: dict[str, str]) -> Iterator[Member]:
    """The files of a tar that are not hidden, up to where it breaks off, which is noted in `broken`."""
    held: dict[str, Member] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                name = entry.name.removeprefix("./")
                plain = entry.isfile() and not entry.issparse()  # of a sparse one not all of its bytes are there
                member = Member(path, name, entry.offset_data if plain else None, entry.size)
                if entry.islnk():  # to a file that stands before it
                    member = replace(held.get(entry.linkname.removeprefix("./"), member), name=name)
                held[name] = member
                if not entry.isdir() and not name.rpartition("/")[2].startswith("."):
                    yield member
            # tarfile takes a header that is cut or damaged for the end; a whole tar ends with blocks of zeros.
            if Member(path, "", tar.offset, tarfile.BLOCKSIZE).read() != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:  # the last two of odd numbers
        broken[str(path)] = f"corrupt or truncated ({error})"


def _sample(path: Path, key: str, parts: dict[str, Member]) -> Sample:
    def load() -> Loaded:
        picture = next((parts[suffix].read() for suffix in PICTURES if suffix in parts), None)
        fields = json_fields(parts[".json"].read()) if ".json" in parts else {}
        text = {"txt": text_of(parts[".txt"].read())} if ".txt" in parts else {}
        return picture, fields | text

    return Sample(f"{path.name}:{key}", load, path.parent)


def json_fields(raw: bytes) -> dict[str, Any]:
    """A JSON object, or nothing."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
