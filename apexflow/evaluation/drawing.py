"""The first stage of an evaluation: prompts to picture files, each from its own seed, shared out over processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from apexflow.data.pictures import to_tensor
from apexflow.data.shards import groups
from apexflow.data.workers import Share
from apexflow.evaluation.files import Unreadable, is_whole, open_picture, save_picture
from apexflow.evaluation.suite import Drawing, EvaluationSettings, Prompt, Suite
from apexflow.files import write_json, write_text
from apexflow.generator import AHEAD, MAX_BATCH, Generator, picture_grid, pictures_at_once
from apexflow.progress import Progress

EVALUATIONS = "evaluations.json"  # network calls a picture, counted while drawing


def draw(
    generator: Generator,
    settings: EvaluationSettings,
    suite: Suite,
    prompts: Sequence[Prompt],
    folder: Path,
    title: str,
    share: Share | None = None,
) -> None:
    """Draw what this process's share lacks into `folder/pictures`, in the suite's official layout."""
    share = share or Share()
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, text in suite.notes(prompts).items():
        if not (pictures / name).is_file():
            (pictures / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(pictures / name, text)
    mine = suite.drawings(prompts)[share.rank :: share.world]
    todo = [drawing for drawing in mine if not is_whole(pictures / drawing.path)]
    size = settings.size or generator.backbone.default_size
    with Progress(f"{title}: generating", len(mine), len(mine) - len(todo)) as progress:
        for window in groups(todo, AHEAD):
            generator.encode_ahead([drawing.text for drawing in window])
            # Drawings that fill a batch; one with more samples than that is drawn in several.
            for group in groups(window, max(1, pictures_at_once(size) // len(window[0].samples))):
                for drawing, samples in _draw_group(generator, settings, group, size):
                    if not (folder / EVALUATIONS).is_file():
                        write_json(folder / EVALUATIONS, generator.evaluations)
                    sheet = picture_grid(samples, min(len(samples), 2), gap=0)  # as official grids lie
                    save_picture(sheet, pictures / drawing.path)
                progress.advance(len(group))


def pending(suite: Suite, prompts: Sequence[Prompt], folder: Path) -> int:
    """How many of the suite's pictures are still to be drawn, by whichever process."""
    return sum(not is_whole(folder / "pictures" / drawing.path) for drawing in suite.drawings(prompts))


def _draw_group(
    generator: Generator, settings: EvaluationSettings, group: Sequence[Drawing], size: int
) -> Iterator[tuple[Drawing, list[Image.Image]]]:
    samples = generator.generate_seeded(
        [drawing.text for drawing in group for _ in drawing.samples],
        [(settings.seed, sample) for drawing in group for sample in drawing.samples],
        settings.steps,
        size=size,
        guidance=settings.guidance,
        kappa=settings.kappa,
        rho=settings.rho,
        order=settings.order,
    )
    for drawing in group:
        count = len(drawing.samples)
        yield drawing, samples[:count]
        samples = samples[count:]


def _readable(paths: Sequence[Path]) -> list[Image.Image]:
    """The pictures of a prompt, or none if one of them cannot be read."""
    try:
        return [open_picture(path) for path in paths]
    except Unreadable:
        return []


@torch.no_grad()
def features(generator: Generator, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures as the model's own autoencoder sees them, (B, features): where the distance between seeds is measured."""
    size = (pictures[0].height, pictures[0].width)
    parts = []
    for group in groups(pictures, pictures_at_once(max(size))):
        images = torch.stack([to_tensor(picture, size) for picture in group]).to(generator.backbone.device)
        parts.append(generator.backbone.encode_images(images).flatten(1).cpu())
    return torch.cat(parts)


def diversity(generator: Generator, folder: Path, drawings: Sequence[Drawing], per_prompt: int) -> float | None:
    """Mean distance between pictures of one prompt under different seeds, per feature; None with one picture a prompt.

    A prompt with an unreadable picture, which the scoring reports, has no part in it.
    """
    if per_prompt < 2:
        return None
    distances: list[float] = []
    paths = [folder / "pictures" / drawing.path for drawing in drawings]
    for prompts in groups(groups(paths, per_prompt), max(1, MAX_BATCH // per_prompt)):
        pictures = [picture for prompt in prompts for picture in _readable(prompt)]
        for group in features(generator, pictures).split(per_prompt) if pictures else ():
            distances.append(float(torch.pdist(group).mean()) / group.shape[1] ** 0.5)
    return sum(distances) / len(distances) if distances else None
