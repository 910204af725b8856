"""The emoji example: its glyphs are drawn where the font is, its error names the package where it is not, and the run trains."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from PIL import Image

from apexflow.backbones import load_backbone
from apexflow.backbones.miniature import build_miniature
from apexflow.data.shards import write_shard
from apexflow.training.config import load_recipe
from apexflow.training.loop import train

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


def test_both_runs_train_on_one_cache(emoji: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(build_miniature, width=32, depth=1)
    monkeypatch.setattr("apexflow.backbones.miniature.build_miniature", small)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    square = Image.new("RGB", (128, 128), "red")
    write_shard(pictures / "emoji.tar", [(str(i), square, f"thing number {i}", {}) for i in range(6)])
    short = {"steps": 1, "batch": 2, "minutes": None, "autoencoder_steps": 2, "preview": {"count": 2}}
    for index, recipe in enumerate(emoji.recipes(tmp_path, 1.0, 2)):
        file = tmp_path / f"{index}.yaml"
        file.write_text(yaml.safe_dump(recipe.to_dict() | short))
        model = train(load_recipe(file, []))
    tokenizer = load_backbone(str(model)).tokenizer
    ids = tokenizer("thing number 3", add_special_tokens=False).input_ids
    assert len(set(ids)) == 3 and tokenizer.unk_token_id not in ids
    assert not (tmp_path / "student" / "cache").exists()
