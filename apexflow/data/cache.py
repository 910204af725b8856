"""Reading a cache: latents and text embeddings in shards, of which only the rows that are asked for come into memory."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from apexflow.backbones.text import rows_of
from apexflow.conditioning import Condition
from apexflow.data.files import Fields, read_record
from apexflow.data.order import batch_rows
from apexflow.errors import UserError, no_path

INDEX = "cache.json"
NULL = "null.safetensors"
AGAIN = "make it again as before (apexflow cache, or the run that it is in); only the missing part is made"
INDEX_FIELDS: Fields = {
    "made_by": dict,
    "rows": int,
    "pictures": bool,
    "latent_shapes": dict,
    "seen": int,
    "skipped": dict,
    "broken": dict,
    "null": (str, NoneType),
    "shards": list,
}
SHARD_FIELDS: Fields = {
    "rows": list,
    "buckets": list,
    "file": str,
    "bytes": int,
    "sha256": str,
    "seen": int,
    "skipped": dict,
}


@dataclass(frozen=True)
class Shard:
    """One open shard: `file` maps the tensors into memory, `starts` (n + 1,) says where each caption's tokens begin."""

    file: Any
    starts: Tensor | None
    buckets: list[tuple[str, int, int]]  # name, first row, end


class CachedSet:
    """A finished cache. Rows are numbered over all shards; within a shard they stand bucket by bucket.

    held_out: how many rows `batch_rows` never gives, the last of each bucket in proportion; at most a quarter of all.
    """

    def __init__(self, folder: Path, held_out: int = 0) -> None:
        """Read the index and see that every file is there, and every shard whole in size; UserError names the one that is not."""
        self.folder = folder
        self.index = read_index(folder)
        try:
            self._shards: list[dict[str, Any]] = self.index["shards"]
            sizes = {folder / entry["file"]: entry["bytes"] for entry in self._shards}
            self._ends = list(accumulate(sum(count for _, count in entry["buckets"]) for entry in self._shards))
            self.buckets = self._find_buckets()
            self._held_out = min(held_out, len(self) // 4)
            self._bucket_ends = {n: list(accumulate(c for _, c in spans)) for n, spans in self.buckets.items()}
            self._shapes = {name: self.index["latent_shapes"][name] for name in self.buckets}
            self.has_text = bool(self.index["made_by"]["text"])  # embeddings are kept, not captions alone
            self.size = int(self.index["made_by"]["size"])  # the side of a square picture, in pixels
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"cache {folder} is damaged ({INDEX} lacks {error}): delete {INDEX} and {AGAIN}") from error
        if self.has_text and not (folder / NULL).is_file():
            raise UserError(f"cache {folder} is damaged ({NULL} is missing): {AGAIN}")
        for path, size in sizes.items():
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"cache {folder} is damaged ({path.name} is missing or truncated): {AGAIN}")
        self._open = lru_cache(maxsize=256)(self._open_shard)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def trained(self) -> int:
        """How many rows there are to train on: all but what is held out."""
        return sum(map(self.count, self.buckets))

    @property
    def has_pictures(self) -> bool:
        """Whether latents are kept; a list of prompts has none."""
        return bool(self.index["pictures"])

    def batch_rows(self, step: int, rows: Sequence[int], batch: int, seed: int) -> list[int]:
        """The rows of this set that stand at `rows` of a step's global batch: all of one bucket, so of one shape."""
        names = list(self.buckets)
        bucket, positions = batch_rows([self.count(name) for name in names], step, rows, batch, seed)
        return [self.row_of(names[bucket], position) for position in positions]

    def count(self, bucket: str) -> int:
        """How many rows a bucket has to train on; none where the set has no such bucket."""
        held = self._bucket_ends[bucket][-1] if bucket in self._bucket_ends else 0
        return held - held * self._held_out // max(len(self), 1)

    def held_out_rows(self) -> list[int]:
        """The rows that are not trained on."""
        return [
            self.row_of(bucket, position)
            for bucket, ends in self._bucket_ends.items()
            for position in range(self.count(bucket), ends[-1])
        ]

    def row_of(self, bucket: str, position: int) -> int:
        """The row that stands at a position of a bucket."""
        ends = self._bucket_ends[bucket]
        span = bisect_right(ends, position)
        first, count = self.buckets[bucket][span]
        return first + position - (ends[span] - count)

    def spread(self, most: int) -> list[int]:
        """Rows from all over the set, at equal distances: `most` of them, or all if it has fewer."""
        count = min(most, len(self))
        return [index * len(self) // count for index in range(count)]

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Latents (B, C, h, w) in float32 of rows of one bucket; zeros for a list of prompts, which has no pictures."""
        if not self.has_pictures:
            number, local = self._locate(rows[0])
            name, _ = self._bucket(self._open(number), local)
            return torch.zeros(len(rows), *self._shapes[name])
        return torch.stack([self._latent(row) for row in rows]).float()

    def condition(self, rows: Sequence[int]) -> Condition:
        """Embeddings of some captions in float32, padded to the longest of them; without a mask where none is padded."""
        if not self.has_text:
            raise ValueError("this set was cached without text embeddings")
        parts = [self._text(row) for row in rows]
        return padded([embeds for embeds, _ in parts], [pooled for _, pooled in parts if pooled is not None])

    def null(self) -> Condition | None:
        """The condition of the empty prompt, (1, L, D); None when only captions are kept."""
        if not self.has_text:
            return None
        with _opened(self.folder / NULL) as file:
            pooled = [file.get_tensor("pooled")[0]] if "pooled" in file.keys() else []  # noqa: SIM118 no mapping
            return padded([file.get_tensor("embeds")], pooled)

    def captions(self, rows: Iterable[int]) -> list[str]:
        """The captions of some rows."""
        places = [self._locate(row) for row in rows]
        return [self._captions(shard)[local] for shard, local in places]

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = bisect_right(self._ends, row)
        return shard, row - (self._ends[shard - 1] if shard else 0)

    def _latent(self, row: int) -> Tensor:
        number, local = self._locate(row)
        shard = self._open(number)
        name, first = self._bucket(shard, local)
        return shard.file.get_slice(f"latents.{name}")[local - first]

    @staticmethod
    def _bucket(shard: Shard, local: int) -> tuple[str, int]:
        """The bucket of a shard's row, and where in the shard it begins."""
        return next((name, first) for name, first, end in shard.buckets if local < end)

    def _text(self, row: int) -> tuple[Tensor, Tensor | None]:
        number, local = self._locate(row)
        shard = self._open(number)
        assert shard.starts is not None
        start, end = int(shard.starts[local]), int(shard.starts[local + 1])
        pooled = shard.file.get_slice("pooled")[local] if "pooled" in shard.file.keys() else None  # noqa: SIM118 no mapping
        return shard.file.get_slice("embeds")[start:end], pooled

    def _open_shard(self, number: int) -> Shard:
        entry = self._shards[number]
        file = _opened(self.folder / entry["file"])
        ends = list(accumulate(count for _, count in entry["buckets"]))
        buckets = [(name, end - count, end) for (name, count), end in zip(entry["buckets"], ends, strict=True)]
        return Shard(file, file.get_tensor("starts") if self.has_text else None, buckets)

    @lru_cache(maxsize=8)  # noqa: B019 sets live as long as a run
    def _captions(self, number: int) -> list[str]:
        return [caption for _, caption in read_sidecar(self.folder, number)["rows"]]

    def _find_buckets(self) -> dict[str, list[tuple[int, int]]]:
        """By name, the runs (first row, count) that a bucket has over the shards."""
        found: dict[str, list[tuple[int, int]]] = {}
        row = 0
        for entry in self._shards:
            for name, count in entry["buckets"]:
                found.setdefault(name, []).append((row, count))
                row += count
        return dict(sorted(found.items()))


def spans_of(conditions: Iterable[Condition]) -> list[Tensor]:
    """The valid tokens (L, D) of each row of some conditions, in order."""
    return [row for c in conditions for row in rows_of(c.embeds, c.mask)]


def padded(spans: list[Tensor], pooled: list[Tensor]) -> Condition:
    """One condition of the tokens (L, D) of several captions, in float32, and what is pooled of each, where something is."""
    lengths = {len(span) for span in spans}
    mask = None
    if len(lengths) > 1:
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(span)) for span in spans], batch_first=True)
    embeds = nn.utils.rnn.pad_sequence([span.float() for span in spans], batch_first=True)
    return Condition(embeds, mask, torch.stack(pooled).float() if pooled else None)


def sidecar(number: int) -> str:
    """The JSON beside a shard: its captions, checksum and what was skipped. It is written last, so it vouches for the shard."""
    return f"shard-{number:06d}.json"


def is_cache(folder: Path) -> bool:
    """Whether a folder holds a finished cache."""
    return (folder / INDEX).is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """What a finished cache says of itself; UserError if it cannot be read."""
    return _read_json(folder / INDEX, INDEX_FIELDS)


def read_sidecar(folder: Path, number: int) -> dict[str, Any]:
    """What a shard says of itself; UserError if it cannot be read."""
    return _read_json(folder / sidecar(number), SHARD_FIELDS)


def check_made_by(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """UserError if a cache was made by another model, from other data or with other settings than `expected`."""
    differs = [key for key, value in expected.items() if found.get(key) != value]
    # Where one has embeddings and the other none, their encoder is no question.
    of_model = ("autoencoder",) if "text" in differs else ("autoencoder", "text encoder")
    by_model = [key for key in of_model if key in differs]
    if by_model:
        raise UserError(
            f"cache {folder} was made with another model's {' and '.join(by_model)}: use that model, or make a cache for "
            "this one in another folder (apexflow cache)"
        )
    if differs:
        plain = [key for key in differs if key not in ("text encoder", "source")]
        settings = ", ".join(f"{key} {found.get(key)!r} instead of {expected[key]!r}" for key in plain)
        # A set is known by a hash, which tells nobody that a picture was added to it.
        told = ["from other files than the dataset has now, by names and sizes"] if "source" in differs else []
        told += [f"with other settings ({settings})"] if settings else []
        raise UserError(f"cache {folder} was made {', and '.join(told)}: delete the folder or choose another")


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a finished cache against its checksums; UserError names the first shard that differs."""
    if not is_cache(folder):
        raise UserError(f"no finished cache at {folder}: give the folder of one, or finish it with apexflow cache")
    cached = CachedSet(folder)
    shards = cached.index["shards"]
    if not all("captions" in entry for entry in shards):
        raise UserError(f"cache {folder} is an older one without checksums of its captions: delete {INDEX} and {AGAIN}")
    files = [(entry["file"], entry.get("sha256")) for entry in shards]
    files += [(sidecar(number), entry["captions"]) for number, entry in enumerate(shards)]
    files += [(NULL, cached.index["null"])] if cached.has_text else []
    for name, expected in files:
        if not (folder / name).is_file() or checksum(folder / name) != expected:
            raise UserError(f"cache {folder} is damaged ({name} differs from its checksum): {_mend(folder / name)}")
    return {"cache": str(folder), "shards": len(shards), "rows": len(cached)}


def checksum(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mend(path: Path) -> str:
    """What is to be done about a file of a cache that cannot be used."""
    return f"delete {path.name} and {AGAIN}" if path.exists() else AGAIN


def _opened(path: Path) -> Any:
    try:
        with path.open("rb"):  # safetensors takes a file that we may not read for one that is not there
            return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(_fault(path, error)) from error


def _read_json(path: Path, fields: Fields) -> dict[str, Any]:
    try:
        return read_record(path, fields)
    except (OSError, ValueError) as error:
        raise UserError(_fault(path, error)) from error


def _fault(path: Path, error: Exception) -> str:
    """Why a file of a cache cannot be used, and what to do: what we may not read is not damaged."""
    return no_path(error) or f"cache {path.parent} is damaged ({path.name}: {error}): {_mend(path)}"
