"""The emoji example: its glyphs are drawn where the font is, its error names the package where it is not, and the run trains."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from unicodedata import lookup

import pytest
from PIL import Image

from apexflow.backbones import load_backbone
from apexflow.backbones.miniature import build_miniature
from apexflow.data.shards import write_shard
from apexflow.errors import Stopped
from apexflow.training.config import Preview, Recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "emoji.py"


@pytest.fixture(scope="module")
def emoji() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emoji_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_or_foreign_font_is_one_clear_error(
    emoji: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.ttf").write_bytes(b"no font")
    for font, words in (
        (tmp_path / "none.ttf", "apt-get install fonts-noto-color-emoji"),
        (tmp_path / "text.ttf", "109"),
    ):
        monkeypatch.setattr(sys, "argv", ["emoji.py", "--output", str(tmp_path / "run"), "--font", str(font)])
        with pytest.raises(SystemExit) as stop:
            emoji.main()
        errors = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(errors) == 1 and str(font) in errors[0] and words in errors[0]
    assert not (tmp_path / "run").exists()


def test_glyphs_are_centred_on_white_and_captioned_by_name(
    emoji: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Canvas:
        def __init__(self, image: Image.Image) -> None:
            self.image = image

        def text(self, place: tuple[int, int], character: str, **_: object) -> None:
            if character in "\N{VOLCANO}\N{TIGER}":
                self.image.paste((200, 10, 10, 255), (*place, place[0] + 40, place[1] + 20))

    font = tmp_path / "font.ttf"
    font.touch()
    monkeypatch.setattr(emoji.ImageFont, "truetype", lambda path, size: (path, size))
    monkeypatch.setattr(emoji.ImageDraw, "Draw", Canvas)
    found = list(emoji.glyphs(font))
    assert [(key, caption) for key, _, caption, _ in found] == [("1f30b", "volcano"), ("1f405", "tiger")]
    picture = found[0][1]
    assert picture.size == (128, 128) and picture.getpixel((64, 64)) == (200, 10, 10)
    assert picture.getpixel((64, 5)) == (255, 255, 255) == picture.getpixel((2, 64))


def test_an_interruption_says_that_the_same_command_goes_on(
    emoji: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(emoji, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["emoji.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        emoji.main()
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err


def test_the_run_trains_on_one_cache_goes_on_after_a_kill_and_ends_in_a_sheet(
    emoji: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(build_miniature, width=32, depth=1)
    monkeypatch.setattr("apexflow.backbones.miniature.build_miniature", small)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    square = Image.new("RGB", (128, 128), "red")
    names = {f"{ord(lookup(name)):05x}": name for name in emoji.SHOWN}
    write_shard(pictures / "emoji.tar", [(key, square, name, {}) for key, name in names.items()])
    short = {"batch": 2, "minutes": 1e-6, "autoencoder_steps": 2, "sampling_steps": 1}  # a step, then the time is up
    plain = emoji.recipes

    def hastened(*given: object) -> list[Recipe]:
        return [replace(recipe, **short, preview=Preview(count=2, steps=1)) for recipe in plain(*given)]

    monkeypatch.setattr(emoji, "recipes", hastened)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("apexflow.training.loop.training_step", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        emoji.run(tmp_path, 1.0, 2, tmp_path / "no-font-now.ttf")
    emoji.run(tmp_path, 1.0, 2, tmp_path / "no-font-now.ttf")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 96 * len(names) and sheet.getpixel((sheet.width - 250, 64)) == (255, 0, 0)
    for role in ("teacher", "student"):
        assert (tmp_path / role / "previews" / "step-0000001.png").is_file()  # the end of a run is always drawn
    tokenizer = load_backbone(str(tmp_path / "student" / "model")).tokenizer
    ids = tokenizer("large blue umbrella", add_special_tokens=False).input_ids
    assert len(set(ids)) == 3 and tokenizer.unk_token_id not in ids
    assert not (tmp_path / "student" / "cache").exists()
