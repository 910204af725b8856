"""Pictures, texts and folders as other programs write them."""

from __future__ import annotations

import io
import math
import os
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from command_line import Run
from little_sets import COLORS, folder, picture, sharegpt, tar
from PIL import Image, features
from PIL.JpegImagePlugin import JpegImageFile

from apexflow.data.cache import CachedSet
from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.pictures import to_bytes
from apexflow.evaluation.files import Unreadable, open_picture


def test_pictures_of_every_depth_look_as_they_do_elsewhere(tmp_path: Path) -> None:
    grey = np.array([[0, 128 * 257, 65535]], np.uint16)
    seen = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    seen.putpixel((0, 0), (0, 0, 0, 0))
    first, second = Image.new("RGB", (1, 1), "red"), Image.new("RGB", (1, 1), "blue")
    Image.fromarray(grey).save(tmp_path / "0-sixteen.png")
    seen.save(tmp_path / "1-clear.png")
    seen.quantize().save(tmp_path / "2-palette.png")
    first.save(tmp_path / "3-moving.webp", save_all=True, append_images=[second], lossless=True)
    first.convert("CMYK").save(tmp_path / "4-ink.jpg")
    for path in sorted(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text("a star")
    seen_as = [np.array(record.image).tolist()[0] for record in read_captioned(tmp_path, Skipped())]
    white, red = [255, 255, 255], [255, 0, 0]
    assert seen_as[:4] == [[[0] * 3, [128] * 3, white], [white, red], [white, red], [red]]
    assert max(abs(a - b) for a, b in zip(seen_as[4][0], red, strict=True)) < 8


def test_floats_are_scaled_and_what_has_no_known_white_is_left_out(tmp_path: Path) -> None:
    rows = {"good": [0, 0.5, 1], "bytes": [0, 128, 255], "odd": [0, 0.5, math.nan], "below": [-1, 0, 1]}
    for name, values in rows.items():
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / f"{name}.tif")
    Image.fromarray(np.array([[0, 1, 2**30]], np.int32)).save(tmp_path / "wide.tif")
    for path in sorted(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text("a star")
    skipped = Skipped()
    (record,) = read_captioned(tmp_path, skipped)
    assert np.array(record.image).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    reasons = {Path(name).stem: reason for name, reason in skipped.reasons.items()}
    assert reasons == dict.fromkeys(["below", "bytes", "odd"], "pixels beyond 0 to 1") | {
        "wide": "pixels beyond 0 to 65535"
    }


@pytest.mark.parametrize("ending", ["gif", "bmp", "tif", "TIFF"])
def test_every_format_that_is_read_is_found_by_its_name(ending: str, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(picture, Image.registered_extensions()[f".{ending.lower()}"])
    files = {f"0.{ending}": picture.getvalue(), "0.txt": b"a star"}
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in files.items():
            (tmp_path / "folder" / name).write_bytes(content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for source in (tmp_path / "folder", tmp_path / "0.tar"):
        assert [record.image.getpixel((0, 0)) for record in read_captioned(source, Skipped())] == [(255, 0, 0)]


def test_a_picture_that_is_too_large_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # pillow refuses twice as many
    Image.new("1", (101, 1)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a wall")
    skipped = Skipped()
    assert not list(read_captioned(tmp_path, skipped))
    assert "picture too large (" in skipped.reasons[str(tmp_path / "0.png")]


def test_a_large_picture_is_read_without_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    Image.new("1", (99, 1)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a wall")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_captioned(tmp_path, Skipped()))) == 1


@pytest.mark.parametrize("error", [TypeError, RuntimeError, NotImplementedError, AttributeError, IndexError])
def test_a_picture_at_which_pillow_stumbles_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    path = folder(tmp_path / "set")

    def stumble(*_: object) -> None:
        raise error

    monkeypatch.setattr(JpegImageFile, "load", stumble)
    skipped = Skipped()
    assert not list(read_captioned(path, skipped)) and set(skipped.reasons.values()) == {"corrupt picture"}
    with pytest.raises(Unreadable):
        open_picture(path / "0.jpg")
    monkeypatch.setattr(JpegImageFile, "load", lambda _: [0] * sys.maxsize)
    for read in (lambda: list(read_captioned(path, Skipped())), lambda: open_picture(path / "0.jpg")):
        with pytest.raises(MemoryError):
            read()


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pillow starts Ghostscript for EPS, whatever the file is called."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "0.png", "EPS")
    (tmp_path / "0.txt").write_text("red")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    skipped = Skipped()
    assert not list(read_captioned(tmp_path, skipped)) and list(skipped.reasons.values()) == ["corrupt picture"]
    with pytest.raises(Unreadable):
        open_picture(tmp_path / "0.png")


def test_every_usual_format_is_read(tmp_path: Path) -> None:
    for form in ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else [])):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{form}.png", form)
        (tmp_path / f"{form}.txt").write_text("red")
    skipped = Skipped()
    assert len(list(read_captioned(tmp_path, skipped))) >= 7 and not skipped.reasons


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    for index, mode in enumerate(("RGBA", "LA")):
        Image.new("RGBA", (1, 1), (0, 0, 0, 51)).convert(mode).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("grey")
    for record in read_captioned(tmp_path, Skipped()):
        assert record.image is not None and record.image.getpixel((0, 0)) == (204, 204, 204)


def test_file_names_need_not_be_utf_8(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    odd, bad = (os.fsdecode(name) for name in (b"a-\xff", b"b-\xfe"))
    path, content = tmp_path / "pairs", {f"{odd}.png": picture("red"), f"{bad}.png": b"no picture"}
    content |= {f"{name}.json": b'{"caption_a": "red", "caption_b": "red"}' for name in (odd, bad)}
    path.mkdir()
    for name in (odd, bad):
        (path / f"{name}.png").write_bytes(content[f"{name}.png"])
        (path / f"{name}.txt").write_text("red")
    shard = tar(tmp_path / f"{odd}.tar", dict(sorted(content.items())))
    for index, source in enumerate((path, shard)):
        command = ("cache", source, "-o", tmp_path / str(index), "--model", tiny_model, "--skip-limit", 0.5)
        code, out, errors = run(*command)
        assert code == 0 and "1 rows; skipped 1 of 2" in out and "b-\\udcfe" in out, errors
        assert run(*command)[0] == run("cache", tmp_path / str(index), "--verify")[0] == 0
        assert CachedSet(tmp_path / str(index)).captions([0]) == ["red"]


def test_half_a_character_in_a_caption_is_replaced(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a red \\ud800 star"\n"\\ud83d\\ude00 a ring"\n')
    assert [record.caption for record in read_captioned(path, Skipped())] == [
        "a red ? star",
        "\N{GRINNING FACE} a ring",
    ]
    assert run("cache", path, "-o", tmp_path / "cache", "--model", tiny_model)[0] == 0
    assert run("synthesize", path, "-o", tmp_path / "drawn", "--model", tiny_model, "--steps", 1)[0] == 0


def test_of_a_line_of_pixels_no_more_than_the_crop_is_resized() -> None:
    line = Image.new("RGB", (30_000, 1), "red")
    line.paste("blue", (14_990, 0, 15_010, 1))
    pixels = to_bytes(line, (512, 512))  # the line would be 15 million pixels wide
    assert pixels.shape == (3, 512, 512) and pixels.flatten(1).float().mean(1).tolist() == [0, 0, 255]


def test_an_odd_crop_keeps_the_middle() -> None:
    ramp = Image.fromarray(np.arange(33, dtype=np.uint8)[None].repeat(8, 0)).convert("RGB")
    assert to_bytes(ramp, (8, 8))[0, 0].tolist() == list(range(12, 20))
    assert abs(to_bytes(ramp, (4, 4)).float().mean() - 16) < 0.5


def test_the_mark_that_some_editors_write_first_is_no_part_of_a_text(tmp_path: Path) -> None:
    mark = "\ufeff"
    for name in ("pairs", "rows", "list"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture("red"))
    (tmp_path / "pairs" / "0.txt").write_text(mark + "red\r\n")
    (tmp_path / "rows" / "metadata.jsonl").write_text(mark + '{"file_name": "0.png", "text": "red"}')
    (tmp_path / "list" / "text_to_image.json").write_text(mark + '[{"output_image": "0.png", "input_prompt": "red"}]')
    (tmp_path / "prompts.txt").write_text(mark + "red\r\n")
    (tmp_path / "prompts.jsonl").write_text(mark + '"red"')
    shard = tar(tmp_path / "0.tar", {"0.png": picture("red"), "0.txt": (mark + "red").encode()})
    for path in (*(p for p in tmp_path.iterdir() if p.is_dir()), *tmp_path.glob("prompts.*"), shard):
        assert [record.caption for record in read_captioned(path, Skipped())] == ["red"], path


def test_linked_folders_are_read_once_and_hidden_files_not_at_all(tmp_path: Path) -> None:
    elsewhere = folder(tmp_path / "elsewhere")
    path = tmp_path / "set"
    path.mkdir()
    (path / "a").symlink_to(elsewhere)
    (path / "b").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(path)
    (elsewhere / "._0.jpg").write_bytes(b"what a file system notes beside 0.jpg")
    skipped = Skipped()
    assert [record.key for record in read_captioned(path, skipped)] == [str(path / "a" / f"{n}.jpg") for n in range(4)]
    assert not skipped.reasons


def test_shared_pictures_are_found_unpacked_and_in_tars_of_the_folder_itself(tmp_path: Path) -> None:
    """As `tar -x` leaves ShareGPT-4o-Image, and as `tar -c .` would pack it again."""
    path = sharegpt(tmp_path / "set")
    for part in path.glob("*.tar"):
        with tarfile.open(part) as file:
            file.extractall(path, filter="data")
        part.unlink()
    assert [record.caption for record in read_captioned(path, Skipped())] == list(COLORS)
    members = {f"./{file.relative_to(path)}": file.read_bytes() for file in path.rglob("*.png")}
    (path / "image").rename(tmp_path / "gone")
    tar(path / "again.tar", members | {"./image/._0.png": b"note"})
    assert [record.caption for record in read_captioned(path, Skipped())] == list(COLORS)


@pytest.mark.parametrize("coding", ["utf-16", "latin-1"])
def test_text_that_is_not_utf_8_is_counted_not_guessed(coding: str, tmp_path: Path) -> None:
    caption = "a café\na red star\n"
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "pairs"
    prompts.write_bytes(caption.encode(coding))
    folder.mkdir()
    (folder / "a.png").write_bytes(picture("red"))
    (folder / "a.txt").write_bytes(caption.encode(coding))
    pack = tar(tmp_path / "set.tar", {name: (folder / name).read_bytes() for name in ("a.png", "a.txt")})
    for source, good in ((prompts, ["a red star"] * (coding == "latin-1")), (folder, []), (pack, [])):
        skipped = Skipped()
        assert [record.caption for record in read_captioned(source, skipped)] == good
        assert all("not UTF-8 text" in reason for reason in skipped.reasons.values())
        assert len(skipped.reasons) == skipped.seen - len(good) > 0
