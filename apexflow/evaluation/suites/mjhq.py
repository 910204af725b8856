"""MJHQ-30K: FID against Playground's pictures and the CLIP score, in Sana's protocol.

Needs --data (the folder with meta_data.json, and the reference pictures below it), --inception for FID and --clip for
the CLIP score. --reference names other reference pictures, or mu and sigma in one file.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from apexflow.errors import UserError
from apexflow.evaluation.against import AgainstPictures, Reference, pictures_below
from apexflow.evaluation.suite import Prompt, needs
from apexflow.files import read_json

META = "meta_data.json"


class Mjhq(AgainstPictures):
    """One JPEG a prompt, named after its id, in the order of meta_data.json."""

    pictures_a_prompt = 1
    allowed = (1,)
    mend = "unzip mjhq30k_imgs.zip there, or give --reference"

    @cached_property
    def root(self) -> Path:
        data = needs(self.tools.data, "--data", f"the MJHQ-30K folder with {META}")
        return data if data.is_dir() else data.parent

    def prompts(self) -> list[dict[str, Any]]:
        meta = read_json(self.root / META, "the MJHQ-30K prompts", object)
        try:
            return [{"id": name, "category": data["category"], "prompt": data["prompt"]} for name, data in meta.items()]
        except (AttributeError, KeyError, TypeError):
            raise UserError(
                f"{self.root / META} does not hold {{id: {{category, prompt}}}}: download it again"
            ) from None

    def name_of(self, prompt: Prompt) -> str:
        return f"{prompt.metadata['id']}.jpg"

    def own_pictures(self) -> list[Reference]:
        """<category>/<id>.jpg somewhere below the folder."""
        wanted = {(prompt.metadata["category"], prompt.metadata["id"]) for prompt in self.asked}
        paths = {(path.parent.name, path.stem): path for path in pictures_below(self.root, self.mend)}
        lacking = sorted(wanted - paths.keys())
        if lacking:
            raise UserError(
                f"{len(lacking)} of {len(wanted)} reference pictures are not in {self.root} (such as "
                f"{'/'.join(lacking[0])}.jpg): {self.mend}"
            )
        return [Reference.of_file(path, self.root) for key, path in sorted(paths.items()) if key in wanted]
