"""GenEval: 553 prompts, Mask2Former finds the objects, CLIP names their colours, the official rules decide.

Needs --detector (the converted official checkpoint) and --clip. --data takes a JSON lines file of prompts with GenEval
metadata in place of the official 553: rewritten prompts move scores by 6 to 8 points, so the report names the file's
sha256 and says whether the prompts are the official ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from apexflow.data.fingerprint import fingerprint
from apexflow.data.readers import lines_of, text_of
from apexflow.errors import UserError
from apexflow.evaluation.against import CLIP
from apexflow.evaluation.clip import Clip
from apexflow.evaluation.files import Unreadable, open_picture, read_ahead
from apexflow.evaluation.geneval import color, detector, prompt_set, scoring
from apexflow.evaluation.geneval.folders import GenEvalFolders
from apexflow.evaluation.suite import Picture, Row, needs

DETECTOR = "a folder with the official Mask2Former, made by `apexflow convert-detector`"


class GenEval(GenEvalFolders):
    """The official protocol; `loaded` once scoring began."""

    takes = ("data", "detector", "clip")
    loaded: tuple[detector.Mask2FormerDetector, color.ColorClassifier] | None = None

    def prompts(self) -> list[dict[str, Any]]:
        return prompt_set.prompts() if self.tools.data is None else _read_prompts(self.tools.data)

    def check(self) -> None:
        needs(self.tools.detector, "--detector", DETECTOR, Path.is_dir)
        needs(self.tools.clip, "--clip", CLIP, Path.is_dir)

    def load(self) -> tuple[detector.Mask2FormerDetector, color.ColorClassifier]:
        if self.loaded is None:
            self.check()
            assert self.tools.detector is not None and self.tools.clip is not None
            finder = detector.Mask2FormerDetector.load(self.tools.detector, self.tools.device)
            self.loaded = finder, color.ColorClassifier(Clip.load(self.tools.clip, self.tools.device))
        return self.loaded

    def settings(self) -> dict[str, Any]:
        finder, colors = self.load()
        return {
            "detector": finder.source,
            "detector_weights": fingerprint(finder.model),
            "clip_weights": fingerprint(colors.clip.model),
            "comparable": finder.source == "mmdet" and colors.clip.is_large,
        }

    def score(self, pictures: Sequence[Picture], work: Path) -> Iterator[Row]:
        finder, colors = self.load()
        for picture, read in read_ahead(pictures, _read):
            if isinstance(read, Unreadable):
                yield {"filename": picture.name, "error": str(read)}
            else:
                yield _row(picture, finder, colors, *read)

    def aggregate(self, rows: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
        official = {line for line in prompt_set.jsonl().splitlines()}
        sums = scoring.summarize(rows) | {"overall_se": scoring.overall_error(rows)}
        report = self.of_all_tasks(sums) | {"official_prompts": all(row["metadata"] in official for row in rows)}
        if not any(json.loads(row["details"]) for row in rows):
            report["warning"] = "the detector found nothing in any picture: check its weights and the pictures"
        return report


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in lines_of(path):
        try:
            row = json.loads(text_of(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"cannot read the GenEval prompts at {path}, line {number}: {error}") from None
        if fault := prompt_set.fault(row):
            raise UserError(f"{path} line {number} is not a GenEval prompt: {fault}")
        rows.append(row)
    return rows


def _read(picture: Picture) -> tuple[Image.Image, torch.Tensor, detector.Size]:
    """The slow work on the processor, done in reading threads while the network computes."""
    image = open_picture(picture.path)
    return image, *detector.preprocess(image)


def _row(
    picture: Picture,
    finder: detector.Mask2FormerDetector,
    colors: color.ColorClassifier,
    image: Image.Image,
    pixels: torch.Tensor,
    size: detector.Size,
) -> Row:
    """A row of the official results.jsonl: metadata and details are JSON in a string."""
    found, masks = finder.detect_prepared(pixels, size, (image.height, image.width))
    kept = scoring.kept_indices(found, picture.metadata)
    boxes = {name: found[name][rows] for name, rows in kept.items()}
    correct, reason = scoring.evaluate_image(boxes, picture.metadata, colors.color_of(image, masks, kept))
    return {
        "filename": picture.name,
        "tag": picture.metadata["tag"],
        "prompt": picture.metadata["prompt"],
        "correct": bool(correct),
        "reason": reason,
        "metadata": json.dumps(dict(picture.metadata)),
        "details": json.dumps({name: rows.tolist() for name, rows in boxes.items()}),
    }
