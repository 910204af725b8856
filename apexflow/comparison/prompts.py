"""What a comparison draws: mini-GenEval's prompts where the data are scenes, else captions of the data that no run trains on."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import numpy as np

from apexflow.data.cache import CachedSet
from apexflow.data.captioned import read_caption
from apexflow.data.hub import located
from apexflow.data.readers import recognise
from apexflow.data.scenes import vocabulary
from apexflow.errors import UserError
from apexflow.evaluation.files import write_rows
from apexflow.training.config import Data
from apexflow.training.prepare import finished_cache

HELD_OUT = 500  # about as many as mini-GenEval has prompts
LOOKED_AT = 64  # captions that tell what the data are
ORDER_SEED = 13
LEAST = 8  # pictures, of which two are held out


def shows_scenes(data: Data) -> bool:
    """Whether one set is of scenes, which mini-GenEval's detector knows: by where it comes from, or the words of its captions."""
    cached = finished_cache(data)
    if cached is None and data.drawn:
        return True
    captions = _of_cache(CachedSet(cached)) if cached else _of_source(data)
    words = {word for caption in captions for word in re.findall(r"\w+", caption.lower())}
    return bool(words) and words <= set(vocabulary())  # captions without a word, such as emoji, are of no scene


def _of_cache(data: CachedSet) -> list[str]:
    return data.captions(data.spread(LOOKED_AT))


def _of_source(data: Data) -> list[str]:
    """The first captions, whatever cannot be read left out; the cache tells of that."""
    samples = islice(recognise(located(str(data.source))).samples({}), LOOKED_AT)
    found = [read_caption(sample, data.captions) for sample in samples]
    return [record[0] for record in found if not isinstance(record, str)]


def held_out_prompts(cache: Path, held_out: int, output: Path) -> Path:
    """A file with the captions of a cache's held-out rows in a fixed, shuffled order, each once; written once. UserError where
    they are fewer than two."""
    path = output / "prompts.jsonl"
    if not path.is_file():
        data = CachedSet(cache, held_out)
        rows = np.random.default_rng(ORDER_SEED).permutation(data.held_out_rows())
        captions = list(dict.fromkeys(data.captions(rows.tolist())))
        if len(captions) < 2:
            raise UserError(
                f"{cache} has {len(data)} pictures and holds out {len(rows)}, with {len(captions)} different captions, and a "
                f"comparison draws two or more: give {LEAST} pictures or more, with different captions, and leave "
                "data.held_out at two or more"
            )
        write_rows(path, captions)
    return path
