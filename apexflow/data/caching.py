"""Making a cache: captioned pictures to shards of latents and text embeddings, so that no encoder runs while training.

A shard holds what one window of consecutive records gave, and is whole once its JSON stands beside it. So a cache goes on after
any kill, several processes may share the work, and the result is the same, byte for byte.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from apexflow.backbones import Backbone
from apexflow.conditioning import Condition
from apexflow.data.buckets import Size, bucket_sizes, nearest
from apexflow.data.cache import (
    INDEX,
    NULL,
    SHARD_FIELDS,
    check_made_by,
    checksum,
    is_cache,
    read_index,
    read_sidecar,
    sidecar,
    spans_of,
)
from apexflow.data.captioned import Captioned, Sample, Skipped, read_sample
from apexflow.data.files import others_in, read_record, write_record, write_tensors
from apexflow.data.fingerprint import autoencoder_fingerprint, text_fingerprint
from apexflow.data.pictures import centred, to_bytes
from apexflow.data.readers import Source, recognise
from apexflow.data.shards import groups
from apexflow.data.workers import Share
from apexflow.errors import UserError
from apexflow.files import drop_partial
from apexflow.locking import alone_in, made_once
from apexflow.progress import Progress

WINDOW = 512  # records a shard
PIXELS = 2**22  # encoded at once: 16 pictures of 512 x 512
PROMPTS = 64  # encoded at once
CLAIM = "made-by.json"


@dataclass(frozen=True)
class CacheSettings:
    """size: side in pixels (None: the model's own). buckets: keep aspect ratios, else crop to the square in the middle.

    text: keep embeddings, else captions alone (for a run that trains the text encoder). captions: see `pick_caption`.
    """

    size: int | None = None
    buckets: bool = False
    text: bool = True
    captions: tuple[str, ...] = ()
    skip_limit: float = 0.05


def make_cache(
    source: Path,
    backbone: Backbone,
    model: Path,
    folder: Path,
    settings: CacheSettings,
    share: Share | None = None,
) -> bool:
    """Cache this process's share of a set in `folder`, going on where an earlier call stopped; whether all of it is finished.

    model: the folder that `backbone` was loaded from. Raises UserError for unreadable data, too many unusable records, or
    when the folder holds a cache that was made otherwise.
    """
    share = share or Share()
    origin = recognise(source)
    job = Job(origin, backbone, folder, settings, share)
    made_by = job.made_by(model)
    if is_cache(folder):
        check_made_by(folder, read_index(folder)["made_by"], made_by)
        if job.is_whole():
            return True
    claim(folder, made_by)
    broken: dict[str, str] = {}
    # Cheap beside encoding, and the share that is borne is one of all records.
    seen = sum(1 for _ in origin.samples(broken))
    total = Skipped(seen, {}, len(origin.files) if origin.kind.many_to_a_file else 0, broken)
    job.check(total, [])
    with Progress(f"caching {source.name}", seen) as progress, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, window in enumerate(groups(origin.samples({}), WINDOW)):
            if number % share.world == share.rank:
                make = partial(job.make_shard, number, window, pool.map)
                made_once(folder / sidecar(number), partial(job.has_shard, number), make)
                total.reasons |= read_sidecar(folder, number)["skipped"]
                job.check(total, range(share.rank, number + 1, share.world))
            progress.advance(len(window))
    numbers = range(-(-seen // WINDOW))
    share.wait_for("cached by all processes", numbers, job.has_shard)
    with alone_in(folder, "finishing", wait=True):  # processes that end together would delete each other's files
        return job.finish(numbers, total, made_by)


def picture_sizes(backbone: Backbone, settings: CacheSettings) -> list[Size]:
    """The sizes that pictures are cropped to; UserError for one that the model cannot take."""
    side = settings.size or backbone.default_size
    backbone.latent_shape((side, side))
    return bucket_sizes(backbone, side) if settings.buckets else [(side, side)]


@dataclass
class Window:
    """What the records of one shard gave: latents and texts by bucket, in order, and what was skipped."""

    latents: dict[str, list[Tensor]] = field(default_factory=dict)
    texts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # key, caption
    skipped: Skipped = field(default_factory=Skipped)


@dataclass
class Job:
    """One set on its way into one folder."""

    origin: Source
    backbone: Backbone
    folder: Path
    settings: CacheSettings
    share: Share

    def __post_init__(self) -> None:
        self.sizes = picture_sizes(self.backbone, self.settings)

    def made_by(self, model: Path) -> dict[str, Any]:
        """Everything that a row of the cache depends on."""
        return {
            "source": self.origin.identity(),
            "size": self.settings.size or self.backbone.default_size,
            "buckets": self.settings.buckets,
            "captions": list(self.settings.captions),
            "text": self.settings.text,
            "autoencoder": autoencoder_fingerprint(model),
            "text encoder": text_fingerprint(model, self.backbone.settings) if self.settings.text else None,
        }

    def has_shard(self, number: int) -> bool:
        """Whether a shard is whole: its JSON, which is written last, names its size."""
        beside = self.folder / sidecar(number)
        tensors = beside.with_suffix(".safetensors")
        try:
            return tensors.stat().st_size == read_record(beside, SHARD_FIELDS)["bytes"]
        except (OSError, ValueError):
            return False

    def is_whole(self) -> bool:
        """Whether a cache that has an index still has all its files."""
        null = self.folder / NULL
        shards = read_index(self.folder)["shards"]
        return all(self.has_shard(n) for n in range(len(shards))) and (null.is_file() or not self.settings.text)

    def encode(self, window: list[Sample], apply: Callable[..., Iterator[Any]]) -> Window:
        """Decode, crop and encode the records of a window; `apply` is a map, which may run in several threads."""
        result, waiting = Window(), dict[Size, list[Tensor]]()
        for group in groups(window, 64):
            for sample, record in zip(group, apply(self._prepare, group), strict=True):
                result.skipped.seen += 1
                if isinstance(record, str):
                    result.skipped.reasons[sample.name] = record
                    continue
                caption, size, pixels = record
                result.texts.setdefault(_name(size), []).append((sample.key, caption))
                if pixels is not None:
                    waiting.setdefault(size, []).append(pixels)
                    if len(waiting[size]) * size[0] * size[1] >= min(PIXELS, 64 * size[0] * size[1]):
                        self._flush(result, size, waiting.pop(size))
        for size, pictures in waiting.items():
            self._flush(result, size, pictures)
        return result

    def _prepare(self, sample: Sample) -> str | tuple[str, Size, Tensor | None]:
        record: Captioned | str = read_sample(sample, self.settings.captions)
        if isinstance(record, str):
            return record
        if record.image is None:
            # A prompt alone has no shape of its own: prompts take turns, by what does not change where a cache goes on.
            return record.caption, self.sizes[crc32(sample.key.encode(errors="surrogatepass")) % len(self.sizes)], None
        size = nearest(self.sizes, record.image.height, record.image.width)
        return record.caption, size, to_bytes(record.image, size)

    @torch.no_grad()
    def _flush(self, result: Window, size: Size, pictures: list[Tensor]) -> None:
        latents = self.backbone.encode_images(centred(torch.stack(pictures)))
        result.latents.setdefault(_name(size), []).append(latents.half().cpu())

    def make_shard(self, number: int, samples: list[Sample], apply: Callable[..., Iterator[Any]]) -> None:
        """Encode a window; write the tensors, then the JSON that vouches for them. `apply` is as `encode` takes it."""
        window = self.encode(samples, apply)
        names = sorted(window.texts)
        rows = [row for name in names for row in window.texts[name]]
        tensors = {f"latents.{name}": torch.cat(parts) for name, parts in window.latents.items()}
        if self.settings.text and rows:
            tensors |= self._embed([caption for _, caption in rows])
        path = self.folder / sidecar(number)
        tensor_path = path.with_suffix(".safetensors")
        write_tensors(tensor_path, tensors)
        record = {
            "rows": rows,
            "buckets": [(name, len(window.texts[name])) for name in names],
            "file": tensor_path.name,
            "bytes": tensor_path.stat().st_size,
            "sha256": checksum(tensor_path),
            "seen": window.skipped.seen,
            "skipped": window.skipped.reasons,
        }
        write_record(path, record)

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        conditions = [self.backbone.encode_prompts(group).to("cpu") for group in groups(captions, PROMPTS)]
        return flatten(conditions)

    def check(self, skipped: Skipped, numbers: Sequence[int]) -> None:
        """UserError when too much of the set was skipped; those of the shards `numbers` that skipped are then forgotten, so
        that mended data are read anew."""
        try:
            skipped.check(self.settings.skip_limit, self.origin.path)
        except UserError:
            for number in numbers:
                path = self.folder / sidecar(number)
                if not self.has_shard(number) or read_sidecar(self.folder, number)["skipped"]:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".safetensors").unlink(missing_ok=True)
            # Where other processes may be at work, the folder stays theirs.
            if self.share.world == 1 and not any(self.folder.glob("shard-*.json")):
                shutil.rmtree(self.folder)
            raise

    def finish(self, numbers: Sequence[int], counted: Skipped, made_by: dict[str, Any]) -> bool:
        """Check what was skipped and write the index over all shards, once every one of them is there."""
        if not all(self.has_shard(number) for number in numbers):
            return False
        shards = [read_sidecar(self.folder, number) for number in numbers]
        total = replace(
            counted, reasons={name: reason for shard in shards for name, reason in shard["skipped"].items()}
        )
        self.check(total, numbers)
        null = None
        if self.settings.text:
            write_tensors(self.folder / NULL, {k: v for k, v in self._embed([""]).items() if k != "starts"})
            null = checksum(self.folder / NULL)
        record = {
            "made_by": made_by,
            "made_from": str(self.origin.path),
            "rows": sum(len(shard["rows"]) for shard in shards),
            "pictures": self.origin.kind.pictures,
            "latent_shapes": {_name(size): self.backbone.latent_shape(size) for size in self.sizes},
            "seen": total.seen,
            "skipped": total.reasons,
            "broken": total.broken,
            "null": null,
            "shards": [
                {key: shard[key] for key in ("file", "bytes", "sha256", "buckets")}
                | {"captions": checksum(self.folder / sidecar(number))}
                for number, shard in zip(numbers, shards, strict=True)
            ],
        }
        write_record(self.folder / INDEX, record)  # last: its presence says that the rest is whole
        drop_partial(self.folder)
        return True


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def flatten(conditions: list[Condition]) -> dict[str, Tensor]:
    """`embeds`: the valid tokens of all captions end to end; `starts`: where each caption begins; `pooled` where there is one."""
    spans = spans_of(conditions)
    starts = torch.tensor([0, *[len(span) for span in spans]]).cumsum(0)
    pooled = [c.pooled for c in conditions if c.pooled is not None]
    return {"embeds": torch.cat(spans), "starts": starts} | ({"pooled": torch.cat(pooled)} if pooled else {})


def claim(folder: Path, made_by: dict[str, Any]) -> None:
    """Take a folder for one cache; UserError if it holds another one, or anything else."""
    marker = folder / CLAIM
    others = others_in(folder, marker)
    # Looked for after the listing: a process beside this one writes its claim before anything else.
    if marker.is_file():
        try:
            found = read_record(marker, {})
        except (OSError, ValueError) as error:
            raise UserError(f"{marker} cannot be read ({error}): delete {folder} or choose another folder") from error
        check_made_by(folder, found, made_by)
    elif others:
        raise UserError(f"output {folder} exists and is not a cache: choose another folder")
    else:
        write_record(marker, made_by)
