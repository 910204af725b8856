"""Drawing a captioned set from a model (the paper trains on pictures of its teacher): prompts to webdataset shards.

Every picture comes from its own seed (the set's, and the number of its prompt), and a shard appears whole or not at all. So a set
goes on after any kill, several processes may share the work, and the result is the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from apexflow.backbones.storage import stored_kind
from apexflow.data.captioned import Sample, Skipped, read_caption
from apexflow.data.files import others_in, read_record, write_record
from apexflow.data.fingerprint import fingerprint
from apexflow.data.readers import Source, recognise
from apexflow.data.readers.tars import members
from apexflow.data.shards import Record, groups, write_shard
from apexflow.data.workers import Share
from apexflow.errors import UserError, quoted
from apexflow.files import drop_partial
from apexflow.generator import NOT_FINITE, Generator, pictures_at_once, sides
from apexflow.locking import made_once
from apexflow.progress import Progress

SHARD = 64  # pictures: what a kill can cost
CLAIM = "synthesis.json"
PLAIN = {"kappa": 0.0, "rho": 0.0, "order": 1}  # how every set was sampled before a model had a sampler of its own


@dataclass(frozen=True)
class Synthesis:
    """How pictures are drawn. None: the model's own.

    skip_limit: share of records without a usable prompt, and of pictures that are not finite, that is borne.
    """

    steps: int | None = None
    guidance: float | None = None
    kappa: float | None = None
    rho: float | None = None
    order: int | None = None
    seed: int = 0
    size: int | tuple[int, int] | None = None  # one side, or height and width
    captions: tuple[str, ...] = ()
    skip_limit: float = 0.05


@dataclass(frozen=True)
class Wish:
    """A picture to draw: its number in the set, its prompt, and what the record is called that the prompt came from."""

    index: int
    prompt: str
    record: str


@dataclass
class Lost:
    """Pictures that this call drew, and how many of them are not finite and left out."""

    drawn: int = 0
    lost: int = 0

    def check(self, limit: float) -> None:
        """UserError when none, or less than is borne, came out."""
        if self.lost and (self.lost == self.drawn or self.lost > limit * self.drawn):
            raise UserError(
                f"{self.lost} of {self.drawn} pictures are not finite, more than the share {limit:g}: {NOT_FINITE}; draw with "
                "less guidance or from another model, or raise the skip limit"
            )


def synthesize(
    prompts: Path, folder: Path, generator: Generator, settings: Synthesis, share: Share | None = None
) -> dict[str, Any]:
    """Draw this process's share of a set into `folder`, going on where an earlier call stopped; a summary.

    prompts: a list of prompts, or any set with captions. Pictures that are not finite are left out and listed. Raises
    UserError for a folder that holds something else, too many unusable records or pictures, or steps and sizes that the
    model cannot take.
    """
    share = share or Share()
    origin = recognise(prompts)
    size = settings.size or generator.backbone.default_size
    settings = replace(settings, steps=len(generator.times(settings.steps)) - 1, size=size)
    generator.backbone.latent_shape(sides(size))
    wanted = made_by(origin, generator, settings)
    skipped = look_through(origin, settings)
    claim(folder, wanted)
    shards, lost = dict[Path, list[Wish]](), Lost()
    with Progress(f"drawing {prompts.name}", skipped.seen) as progress:
        for number, window in enumerate(groups(origin.samples({}), SHARD)):
            chosen = usable(window, number * SHARD, settings.captions, Skipped())
            path = folder / f"pictures-{number:06d}.tar"
            if chosen:
                shards[path] = chosen
            if number % share.world == share.rank and chosen:
                draw = partial(_draw, path, generator, chosen, settings, lost)
                made_once(path, path.is_file, draw)  # processes that were started with other shares may meet here
            progress.advance(len(window))
    share.wait_for("drawn by all processes", list(shards), Path.is_file)
    there = {path: _left_out(path, chosen) for path, chosen in shards.items() if path.is_file()}
    if len(there) == len(shards):
        drop_partial(folder)
    left_out = [wish for wishes in there.values() for wish in wishes]
    return {
        "folder": str(folder),
        "pictures": sum(len(shards[path]) for path in there) - len(left_out),
        "complete": len(there) == len(shards),
        "skipped": skipped.broken | skipped.reasons | {wish.record: "the picture is not finite" for wish in left_out},
        "steps": settings.steps,
    }


def _left_out(path: Path, chosen: Sequence[Wish]) -> list[Wish]:
    """What a shard holds no picture of, since it was not finite."""
    held = {member.name.partition(".")[0] for member in members(path, {})}
    return [wish for wish in chosen if _name(wish) not in held]


def look_through(origin: Source, settings: Synthesis) -> Skipped:
    """What of a set has no usable prompt; UserError if that is too much. Reading is cheap beside drawing, so it comes first."""
    skipped = Skipped(files=len(origin.files) if origin.kind.many_to_a_file else 0)
    for window in groups(origin.samples(skipped.broken), SHARD):
        usable(window, 0, settings.captions, skipped)
    skipped.check(settings.skip_limit, origin.path)
    return skipped


def usable(window: Sequence[Sample], first: int, captions: Sequence[str], skipped: Skipped) -> list[Wish]:
    """The prompts of a window with their numbers; what has none goes to `skipped`."""
    chosen = []
    for index, sample in enumerate(window, first):
        skipped.seen += 1
        record = read_caption(sample, captions)
        if isinstance(record, str):
            skipped.reasons[sample.name] = record
        else:
            chosen.append(Wish(index, record[0], sample.name))
    return chosen


def _draw(path: Path, generator: Generator, chosen: Sequence[Wish], settings: Synthesis, lost: Lost) -> None:
    """Write a shard of the pictures that are finite; UserError where too many are not, before any of them is written."""
    records: list[Record] = []
    size = settings.size or generator.backbone.default_size
    generator.encode_ahead([wish.prompt for wish in chosen])
    for group in groups(chosen, pictures_at_once(size)):
        texts = [wish.prompt for wish in group]
        for prompt in generator.backbone.unknown_words(texts):
            warnings.warn(f"the model knows no word of {quoted(prompt)}: the picture will not follow it", stacklevel=2)
        seeds = [(settings.seed, wish.index) for wish in group]
        pictures = generator.generate_seeded(texts, seeds, settings.steps, size, **_sampler(generator, settings))
        for wish, picture, finite in zip(group, pictures, generator.finite, strict=True):
            facts = {"prompt": wish.prompt, "index": wish.index, "seed": settings.seed, "steps": settings.steps}
            if finite:
                records.append((_name(wish), picture, wish.prompt, facts))
    lost.drawn += len(chosen)
    lost.lost += len(chosen) - len(records)
    lost.check(settings.skip_limit)
    write_shard(path, records)


def _name(wish: Wish) -> str:
    return f"{wish.index:07d}"


def made_by(origin: Source, generator: Generator, settings: Synthesis) -> dict[str, Any]:
    """Everything that a picture of the set depends on; steps and size are given by now."""
    model = fingerprint(generator.backbone.transformer)
    said = {key: value for key, value in asdict(settings).items() if key != "skip_limit"}  # which no picture depends on
    said |= {key: list(value) for key, value in said.items() if isinstance(value, tuple)}  # as a file says it
    said |= {"prompts": origin.identity(), "model": model} | _sampler(generator, settings)
    return said | {"storage": stored_kind(generator.backbone.transformer)}


def _sampler(generator: Generator, settings: Synthesis) -> dict[str, Any]:
    return generator.sampler(settings.guidance, settings.kappa, settings.rho, settings.order)


def claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Take a folder for one set; UserError if it holds another one, or anything else."""
    marker = folder / CLAIM
    others = others_in(folder, marker)
    if not others:  # nothing was drawn under an earlier claim
        write_record(marker, wanted)
        return
    if not marker.is_file():  # looked for after the listing: a process beside this one writes its claim first
        raise UserError(f"output {folder} exists and holds no set that synthesize drew: choose another folder")
    try:
        found = PLAIN | read_record(marker, {})
    except (OSError, ValueError) as error:
        raise UserError(f"{marker} cannot be read ({error}): choose another folder") from error
    differs = [f"{key} {found.get(key)!r}" for key in wanted if found.get(key) != wanted[key]]
    if differs:
        raise UserError(f"{folder} holds a set drawn otherwise ({', '.join(differs)}): choose another folder")
