"""mini-GenEval as a suite: GenEval's tasks, rules and folders on scenes, with a programmatic detector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apexflow.evaluation import mini_geneval
from apexflow.evaluation.files import Unreadable, open_picture, read_ahead
from apexflow.evaluation.geneval.folders import GenEvalFolders
from apexflow.evaluation.suite import Picture, Row


class MiniGenEval(GenEvalFolders):
    """Needs nothing: the detector knows what the scenes are drawn with. Never comparable to GenEval."""

    measures_diversity = True

    def prompts(self) -> list[dict[str, Any]]:
        return mini_geneval.prompts()

    def score(self, pictures: Sequence[Picture], work: Path) -> Iterator[Row]:
        for picture, image in read_ahead(pictures, lambda picture: open_picture(picture.path)):
            if isinstance(image, Unreadable):
                yield {"filename": picture.name, "error": str(image)}
            else:
                yield {"filename": picture.name} | mini_geneval.score_picture(image, picture.metadata)

    def aggregate(self, rows: Sequence[Mapping[str, Any]], work: Path) -> dict[str, Any]:
        return self.of_all_tasks(mini_geneval.aggregate(rows))


class MiniGenEvalHeldOut(MiniGenEval):
    """The held-out pairs of shape and colour."""

    def prompts(self) -> list[dict[str, Any]]:
        return mini_geneval.held_out_prompts()
