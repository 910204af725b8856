"""The kinds of sets that can be read: one table, and the recogniser that finds which kind a path is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from apexflow.data.captioned import Sample
from apexflow.data.pictures import PICTURES
from apexflow.errors import UserError, in_a_shell

TEXT = "utf-8-sig"  # some editors begin a file of UTF-8 with a mark


def text_of(raw: bytes) -> str:
    """A text in UTF-8. ValueError for bytes that are none: in another coding they would be read as rubbish."""
    if b"\0" in raw:  # UTF-16 passes for UTF-8 where it is plain
        raise ValueError("not UTF-8 text")
    try:
        return raw.decode(TEXT)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file that are not blank, with their numbers, in bytes for `text_of`. UserError if it cannot be read."""
    try:
        with path.open(encoding=TEXT, errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.encode(errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check the file and its permissions") from error


@dataclass(frozen=True)
class Kind:
    """One kind of set.

    claims: the files that make up the set if `path` is of this kind, in reading order, else none.
    samples: the records of those files, given the set's own folder; a file that cannot be read to its end is noted in the
    mapping, with the reason.
    """

    name: str
    claims: Callable[[Path], list[Path]]
    samples: Callable[[Path, list[Path], dict[str, str]], Iterator[Sample]]
    pictures: bool = True
    many_to_a_file: bool = True


@dataclass(frozen=True)
class Source:
    """A recognised set."""

    path: Path
    kind: Kind
    files: list[Path]

    def samples(self, broken: dict[str, str]) -> Iterator[Sample]:
        """Records in a fixed order; reading past one without loading it is cheap."""
        return self.kind.samples(self.home, self.files, broken)

    @property
    def home(self) -> Path:
        """The folder of the set."""
        return self.path if self.path.is_dir() else self.path.parent

    def identity(self) -> str:
        """A short hash of the names and sizes of the files: the same set elsewhere on the disk is the same set."""
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size if file.is_file() else "none"
            line = f"{file.relative_to(self.home).as_posix()}:{size}\n"
            digest.update(line.encode(errors="surrogatepass"))  # file names need not be UTF-8
        return digest.hexdigest()[:16]


def kinds() -> Mapping[str, Kind]:
    """The table: one line each."""
    from apexflow.data.readers import folders, parquet, prompts, sharegpt, tars

    return {
        "folder": Kind("pictures with same-name .txt", folders.claim_pairs, folders.pairs, many_to_a_file=False),
        "imagefolder": Kind("pictures with metadata.jsonl", folders.claim_metadata, folders.rows, many_to_a_file=False),
        "webdataset": Kind("webdataset .tar shards", tars.claim, tars.samples),
        "sharegpt": Kind("ShareGPT-4o-Image: text_to_image.json and tars", sharegpt.claim, sharegpt.samples),
        "parquet": Kind(".parquet with picture bytes", parquet.claim, parquet.samples),
        "prompts": Kind("prompts only, a .txt or .jsonl file", prompts.claim, prompts.samples, pictures=False),
    }


def recognise(path: Path) -> Source:
    """Which kind of set `path` is; UserError if it is missing, of no known kind, or could be read in two ways."""
    known = "; ".join(kind.name for kind in kinds().values())
    if not path.exists():
        raise UserError(f"data {str(path)!r} not found: give the path of a dataset of captioned pictures ({known})")
    if (path / "cache.json").is_file():
        raise UserError(f"{path} is a finished cache, not pictures: train on it with data.source={in_a_shell(path)}")
    found = [Source(path, kind, files) for kind in kinds().values() if (files := kind.claims(path))]
    if not found:
        if path.is_dir() and (bare := named(path, *PICTURES)):
            raise UserError(
                f"data {path} has pictures but no captions: put {bare[0].stem}.txt beside {bare[0].name} and so on for each "
                "picture, or metadata.jsonl into the folder"
            )
        empty = path.is_dir() and not any(path.iterdir())
        what = "is empty" if empty else "holds no data in a format that apexflow reads"
        raise UserError(f"data {path} {what}; formats: {known}")
    if len(found) > 1:
        ways = " or as ".join(source.kind.name for source in found)
        raise UserError(f"data {path} could be read as {ways}: keep one format per folder, or give the file itself")
    return found[0]


def read_within(home: Path, path: Path) -> bytes | None:
    """A file that a set's own text names, None where there is none. ValueError for one outside of the set's folder `home`: a
    set that others made must not reach for the user's files."""
    inside = Path(os.path.abspath(path))
    if not inside.is_relative_to(os.path.abspath(home)):
        raise ValueError("outside the dataset's folder")
    return inside.read_bytes() if inside.is_file() else None


def files_of(path: Path, *suffixes: str) -> list[Path]:
    """What `named` gives without folders; links to nothing are told by who reads them."""
    return [file for file in named(path, *suffixes) if file.is_file() or not file.exists()]


def named(path: Path, *suffixes: str) -> list[Path]:
    """`path` itself or what lies below it by a name with one of the suffixes, sorted. What is hidden is none."""
    candidates = [path] if path.is_file() else _below(path)
    return sorted(entry for entry in candidates if entry.suffix.lower() in suffixes)


def _below(folder: Path) -> Iterator[Path]:
    """What lies below a folder, links to further folders followed; a folder that is reached twice is read once."""
    seen: set[str] = set()
    for home, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(home)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(home, name) for name in [*folders, *names] if not name.startswith("."))
        seen.add(real)
