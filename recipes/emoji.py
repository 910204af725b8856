"""Real pictures: a colour-emoji font, drawn and captioned by its Unicode names, from glyphs to one-step pictures in one command.

    python recipes/emoji.py [--minutes 30] [--output runs/emoji] [--font FILE]

Draws the glyphs of Debian's fonts-noto-color-emoji (`apt-get install fonts-noto-color-emoji`) into webdataset shards; builds a
miniature SANA whose vocabulary is the words of the names and fits its autoencoder; caches latents and text embeddings; trains the
miniature on them by flow matching; tunes it by APEX, on the same cache, to answer in one network evaluation; and draws some
glyphs beside both models' pictures of their names (`sheet.png`). The same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from apexflow.data.shards import Record, write_shard
from apexflow.errors import Stopped, UserError, writing
from apexflow.generator import load
from apexflow.reporting.pictures import labelled_sheet
from apexflow.training.config import Data, Optimizer, Preview, Recipe
from apexflow.training.loop import train

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
TAR = "emoji.tar"
STRIKE = 109  # the one size that the font's bitmaps have
SIDE = 128
SHOWN = (
    "tiger face",
    "umbrella",
    "heavy black heart",
    "green apple",
    "large blue square",
    "octopus",
    "crescent moon",
    "soccer ball",
)
CODE_POINTS = (range(0xA9, 0xAF), range(0x203C, 0x3300), range(0x1F000, 0x1FB00))


def glyphs(font: Path) -> Iterator[Record]:
    """Every single code point that has a name and a picture: key, picture on white, caption, code point."""
    if not font.is_file():
        raise UserError(f"font {font} not found: apt-get install fonts-noto-color-emoji, or name one with --font")
    if not features.check("freetype2"):
        raise UserError("this pillow draws no fonts (no FreeType): install a pillow wheel from PyPI")
    try:
        face = ImageFont.truetype(str(font), STRIKE)
    except OSError as error:
        raise UserError(f"font {font} has no colour bitmaps of size {STRIKE} ({error}): take NotoColorEmoji") from error
    for code in (code for codes in CODE_POINTS for code in codes):
        name = unicodedata.name(chr(code), "").lower()
        picture = draw(face, chr(code)) if name else None
        if picture is not None:
            yield f"{code:05x}", picture, name, {"code_point": f"U+{code:04X}"}


def draw(face: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """The glyph in the middle of a white square, or None where the font has none."""
    canvas = Image.new("RGBA", (2 * SIDE, 2 * SIDE))
    ImageDraw.Draw(canvas).text((SIDE // 2, SIDE // 2), character, font=face, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    glyph = canvas.crop(box)
    scale = (SIDE - 12) / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(glyph, ((SIDE - glyph.width) // 2, (SIDE - glyph.height) // 2), glyph)
    return square


def recipes(output: Path, minutes: float, autoencoder_steps: int) -> tuple[Recipe, Recipe]:
    """The teacher, trained from nothing, and the student, tuned from it on the teacher's cache."""
    teacher = Recipe(
        output=str(output / "teacher"),
        method="flow_matching",
        model="miniature",
        data=Data(source=str(output / "pictures"), cache=str(output / "cache")),
        optimizer=Optimizer(learning_rate=1.5e-3, warmup=100),
        preview=Preview(every=200, steps=20, guidance=2.0),
        steps=1_000_000,
        minutes=0.75 * minutes,
        caption_dropout=0.1,
        checkpoint_every=100,
        autoencoder_steps=autoencoder_steps,
        sampling_steps=50,
        sampling_guidance=2.0,
    )
    student = Recipe(
        output=str(output / "student"),
        model=str(output / "teacher" / "model"),
        objective={"path_weight": 0.0, "share": 1.0},  # as the shipped student
        data=Data(source=str(output / "cache")),
        optimizer=Optimizer(learning_rate=3e-4, warmup=20),
        preview=Preview(every=50),
        steps=1_000_000,
        minutes=0.25 * minutes,
        ema_decay=0.98,
        sampling_steps=1,
        sampling_guidance=1.0,
    )
    return teacher, student


def run(output: Path, minutes: float, autoencoder_steps: int, font: Path) -> None:
    """Draw, train, tune; finished parts are left as they are, so the command goes on where it stopped."""
    pictures = output / "pictures"
    if not (pictures / TAR).is_file():
        records = list(glyphs(font))
        pictures.mkdir(parents=True, exist_ok=True)
        write_shard(pictures / TAR, records)
        print(f"{pictures}: {len(records)} glyphs")
    for recipe in recipes(output, minutes, autoencoder_steps):
        if not (Path(recipe.output) / "report.html").is_file():
            train(recipe, resume=Path(recipe.output).exists())
        print(f"{recipe.output}/model, {recipe.output}/report.html")
    print(look(output))


def look(output: Path) -> Path:
    """A sheet of some names: the font's glyph, the teacher's picture and the student's, both from the same noise."""
    with tarfile.open(output / "pictures" / TAR) as tar:
        files = {name: tar.extractfile(f"{ord(unicodedata.lookup(name)):05x}.png") for name in SHOWN}
        columns = [[Image.open(file).convert("RGB") for file in files.values() if file is not None]]
    columns += [load(str(output / role / "model")).generate(SHOWN, None, seed=0) for role in ("teacher", "student")]
    rows = {name: [column[index].resize((96, 96)) for column in columns] for index, name in enumerate(SHOWN)}
    path = output / "sheet.png"
    with writing(path):
        labelled_sheet(rows, ["font", "teacher", "student"]).save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--minutes", type=float, default=30.0, help="training, after the autoencoder is fitted")
    parser.add_argument("--autoencoder-steps", type=int, default=2000, help="fitted first, before the minutes count")
    parser.add_argument("--font", type=Path, default=FONT)
    given = parser.parse_args()
    try:
        run(given.output, given.minutes, given.autoencoder_steps, given.font)
    except UserError as error:
        print(f"emoji: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt):
        print("emoji: stopped; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
