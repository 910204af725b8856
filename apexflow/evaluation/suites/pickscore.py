"""PickScore: which picture of a prompt people would choose, by a CLIP-H that was tuned on such choices. For any prompts.

Needs --data (a .txt or .jsonl file of prompts) and --clip (a folder with yuvalkirstain/PickScore_v1). Means compare only
over the same prompts, whose sha256 the report holds.

Source: Kirstain et al. 2023, Pick-a-Pic: logit_scale.exp() times the cosine of picture and prompt, as the CLIP score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image

from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.fingerprint import fingerprint
from apexflow.data.shards import groups
from apexflow.errors import UserError
from apexflow.evaluation.clip import Clip
from apexflow.evaluation.files import Unreadable, open_picture, read_ahead
from apexflow.evaluation.suite import OneFileEach, Picture, Prompt, Row, needs

BATCH = 16
FOLDER = "a folder with yuvalkirstain/PickScore_v1"


class PickScore(OneFileEach):
    """One picture a prompt, NNNNN.png, counted from 0 in the order of the file."""

    pictures_a_prompt = 1
    allowed = (1,)
    takes = ("data", "clip")

    @cached_property
    def clip(self) -> Clip:
        return Clip.load(needs(self.tools.clip, "--clip", FOLDER, Path.is_dir), self.tools.device, "gelu")

    def check(self) -> None:
        needs(self.tools.clip, "--clip", FOLDER, Path.is_dir)

    def prompts(self) -> list[dict[str, Any]]:
        skipped = Skipped()
        path = needs(self.tools.data, "--data", "a .txt or .jsonl file of prompts")
        found = [{"prompt": record.caption} for record in read_captioned(path, skipped)]
        for name, reason in (skipped.broken | skipped.reasons).items():
            raise UserError(f"{name}: {reason}: fix or remove it, since pictures are numbered as the prompts are")
        return found

    def name_of(self, prompt: Prompt) -> str:
        return f"{prompt.index:05d}.png"

    def settings(self) -> dict[str, Any]:
        return {"clip_weights": fingerprint(self.clip.model)}

    def score(self, pictures: Sequence[Picture], work: Path) -> Iterator[Row]:
        for part in groups(read_ahead(pictures, lambda picture: open_picture(picture.path)), BATCH):
            for picture, image in part:
                if isinstance(image, Unreadable):
                    yield {"filename": picture.name, "error": str(image)}
            if whole := [(picture, image) for picture, image in part if not isinstance(image, Unreadable)]:
                yield from self._rows(whole)

    def _rows(self, batch: Sequence[tuple[Picture, Image.Image]]) -> list[Row]:
        prompts = [picture.metadata["prompt"] for picture, _ in batch]
        scores = self.clip.score([image for _, image in batch], prompts).tolist()
        return [
            {"filename": picture.name, "prompt": prompt, "pickscore": score}
            for (picture, _), prompt, score in zip(batch, prompts, scores, strict=True)
        ]

    def aggregate(self, rows: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
        scores = [row["pickscore"] for row in rows]
        error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
        return {"tasks": {"pickscore": mean(scores)}, "overall": mean(scores), "overall_se": error}
