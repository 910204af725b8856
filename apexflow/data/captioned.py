"""Captioned pictures, whatever they are kept in: what a record is, which caption it gets, and which records are left out."""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from apexflow.data.pictures import open_upright
from apexflow.errors import UserError

# Where a caption is looked for: the .txt beside a picture first. input_prompt is ShareGPT-4o-Image's.
CAPTIONS = ("txt", "caption", "prompt", "text", "input_prompt")
Loaded = tuple[bytes | None, Mapping[str, Any]]  # a picture's bytes, None where it is not there, and fields of text


@dataclass(frozen=True)
class Sample:
    """One record, not read yet: `load` does that.

    key: decides which of several captions it gets. folder: where the file lies that its key begins with, if it does.
    pictured: whether it is meant to have a picture, as in all but a list of prompts.
    """

    key: str
    load: Callable[[], Loaded]
    folder: Path = Path()
    pictured: bool = True

    @property
    def name(self) -> str:
        """What it is called where it is skipped: files of one name in two folders have records of the same keys."""
        return str(self.folder / self.key)


@dataclass(frozen=True)
class Captioned:
    """One caption with its picture (RGB; None in a list of prompts); `key` names it in messages."""

    key: str
    caption: str
    image: Image.Image | None


@dataclass
class Skipped:
    """Records that could not be used, each with the reason, of how many; and files that broke off, of how many."""

    seen: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    files: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    def check(self, limit: float, source: Path) -> None:
        """UserError when nothing could be read, or when more than the share `limit` of records or files was skipped."""
        faults = [f"{name}: {reason}" for name, reason in (self.broken | self.reasons).items()]
        example = f"; first: {faults[0]}" if faults else ""
        if len(self.reasons) >= self.seen:
            mend = "fix or remove what is named" if faults else "add records"
            raise UserError(f"{source} holds no usable record ({self.seen} checked){example}; {mend}")
        for bad, total, what in ((len(self.broken), self.files, "files"), (len(self.reasons), self.seen, "records")):
            if bad > limit * total:
                raise UserError(
                    f"{bad} of {total} {what} of {source} cannot be used, more than the limit of {limit:g}{example}; fix or "
                    "remove them, or raise the skip limit"
                )


def read_sample(sample: Sample, captions: Sequence[str] = ()) -> Captioned | str:
    """The record, or why it cannot be used. `captions`: the fields that captions are taken from; see `pick_caption`."""
    record = read_caption(sample, captions)
    if isinstance(record, str):
        return record
    caption, picture = record
    if not sample.pictured:
        return Captioned(sample.key, caption, None)
    image = "picture missing" if picture is None else _decode(picture) if picture else "picture empty"
    return image if isinstance(image, str) else Captioned(sample.key, caption, image)


def read_caption(sample: Sample, captions: Sequence[str]) -> tuple[str, bytes | None] | str:
    """As `read_sample`, with the picture left in its bytes."""
    try:
        picture, fields = sample.load()
    except (OSError, ValueError, EOFError, RecursionError) as error:  # the last of JSON that is nested without end
        return f"unreadable ({error})"
    caption = pick_caption(fields, captions, sample.key)
    if caption is None:
        return "caption missing" + (f" (no field {' or '.join(sorted(set(captions)))})" if captions else "")
    return (caption, picture) if caption else "caption empty"


def pick_caption(fields: Mapping[str, Any], wanted: Sequence[str], key: str) -> str | None:
    """One of the captions in the `wanted` fields (by default the usual names), "" if all are empty, None without any.

    Where several are filled, the record's key decides between them, so that a set is always read alike; naming a field
    twice gives it twice the weight.
    """
    # Columns that end in _cn are FLUX-Reason-6M's Chinese twins.
    several = sorted(name for name in fields if name.startswith("caption") and not name.endswith("_cn"))
    names = list(wanted) or next(([name] for name in CAPTIONS if name in fields), several)
    found = [fields[name].strip() for name in names if isinstance(fields.get(name), str)]
    filled = [caption for caption in found if caption]
    if not filled:
        return "" if found else None
    chosen = filled[zlib.crc32(key.encode(errors="surrogatepass")) % len(filled)]  # file names need not be UTF-8
    return chosen.encode(errors="replace").decode()  # half a character, as JSON may hold, is none to a tokenizer


def _decode(picture: bytes) -> Image.Image | str:
    """In RGB, the first frame of an animated picture; or why not."""
    try:
        with warnings.catch_warnings():  # pillow is alarmed from half the size on that it refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return _plain(open_upright(io.BytesIO(picture)))
    except OutOfRange as error:
        return str(error)
    except Image.DecompressionBombError as error:
        return f"picture too large ({str(error).partition(',')[0]})"
    except MemoryError:
        raise
    except Exception:  # pillow raises many kinds, and one odd picture must not end a command
        return "corrupt picture"


class OutOfRange(Exception):
    """Pixels of a kind whose white is known, with values beyond it: nobody knows how bright they are meant."""


def _plain(image: Image.Image) -> Image.Image:
    """In eight bits of RGB. What lies under transparent pixels was never meant to be seen, so they become white. OutOfRange
    where the values of pixels are beyond what their kind has for white."""
    if image.mode.startswith("I"):  # grey of sixteen bits, which pillow would cut off at 255
        image = _in_eight_bits(image.convert("I"), 65535)
    elif image.mode == "F":  # which pillow would take for 0 to 255
        image = _in_eight_bits(image, 1)
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")  # a huge picture is held twice, not four times
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


def _in_eight_bits(image: Image.Image, white: int) -> Image.Image:
    """A grey picture whose values go from 0 to `white`; OutOfRange if they do not."""
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= white):  # so that NaN is refused too
        raise OutOfRange(f"pixels beyond 0 to {white}")
    return Image.fromarray(np.rint(np.multiply(values, 255 / white, dtype=np.float32)).astype(np.uint8))


def read_captioned(source: Path, skipped: Skipped, captions: Sequence[str] = ()) -> Iterator[Captioned]:
    """Every usable record of a set of any kind, in its own order; what is not usable goes to `skipped`.

    Raises UserError when the source is missing or of no known kind.
    """
    from apexflow.data.readers import recognise

    origin = recognise(source)
    skipped.files = len(origin.files) if origin.kind.many_to_a_file else 0
    for sample in origin.samples(skipped.broken):
        skipped.seen += 1
        record = read_sample(sample, captions)
        if isinstance(record, str):
            skipped.reasons[sample.name] = record
        else:
            yield record
