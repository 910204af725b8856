"""Every kind of set that is read: recognised by its path alone, and read whole."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
from little_sets import COLORS, WRITERS, folder, parquet, picture, tar
from PIL import ExifTags, Image

from apexflow.data.captioned import Skipped, pick_caption, read_captioned
from apexflow.data.readers import kinds, recognise
from apexflow.errors import UserError


def test_every_kind_has_a_case() -> None:
    assert set(WRITERS) == set(kinds())


@pytest.mark.parametrize("kind", WRITERS)
def test_a_set_is_recognised_and_read_whole(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path / "set")
    source = recognise(path)
    assert source.kind == kinds()[kind]
    skipped = Skipped()
    records = list(read_captioned(path, skipped))
    assert [r.caption for r in records] == list(COLORS)
    assert set(skipped.reasons.values()) <= {"caption missing"}  # the webdataset case has a picture without a caption
    if kind == "prompts":
        assert all(r.image is None for r in records)
        return
    for record in records:
        assert record.image is not None and record.image.size == (20, 10)
        reference = Image.new("RGB", (1, 1), record.caption).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(record.image.getpixel((5, 5)), reference, strict=True)) < 12


@pytest.mark.parametrize("kind", WRITERS)
def test_identity_follows_content_not_place(kind: str, tmp_path: Path) -> None:
    first = recognise(WRITERS[kind](tmp_path / "set"))
    (tmp_path / "elsewhere").mkdir()
    moved = recognise(first.path.rename(tmp_path / "elsewhere" / first.path.name))
    assert first.kind == moved.kind
    identity = moved.identity()
    assert identity == recognise(moved.path).identity()
    with moved.files[-1].open("ab") as file:
        file.write(b"\n")
    assert recognise(moved.path).identity() != identity


def test_suffixes_in_capitals_are_read(tmp_path: Path) -> None:
    (tmp_path / "A.JPG").write_bytes(picture("red", "JPEG"))
    (tmp_path / "A.TXT").write_text("red")
    assert [record.caption for record in read_captioned(tmp_path, Skipped())] == ["red"]


def test_json_lines_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a star", "tag": "x"}\n"a ring"\n{"tag": "x"}\nnonsense\n[1]\n')
    skipped = Skipped()
    assert [r.caption for r in read_captioned(path, skipped)] == ["a star", "a ring"]
    assert list(skipped.reasons) == ["p.jsonl:3", "p.jsonl:4", "p.jsonl:5"] and skipped.seen == 5


def test_which_caption_a_record_gets() -> None:
    assert pick_caption({"caption": "b", "txt": " a "}, (), "k") == "a"
    assert pick_caption({"other": "b"}, (), "k") is None
    assert pick_caption({"other": "b"}, ("other",), "k") == "b"
    assert pick_caption({"caption": " "}, (), "k") == ""
    several = {"caption_detail": "long", "caption_original": "short", "caption_text": " ", "caption_detail_cn": "zh"}
    drawn = [pick_caption(several, (), str(key)) for key in range(400)]
    assert set(drawn) == {"long", "short"} and 140 < drawn.count("long") < 260
    assert drawn == [pick_caption(several, (), str(key)) for key in range(400)]
    weighted = ("caption_detail", "caption_detail", "caption_detail", "caption_original")
    assert 260 < [pick_caption(several, weighted, str(key)) for key in range(400)].count("long") < 340


def test_several_caption_columns_of_parquet(tmp_path: Path) -> None:
    """As FLUX-Reason-6M: only caption_detail is always there."""
    columns = {
        "image": [{"bytes": picture("red"), "path": None}] * 3,
        "caption_detail": ["d0", "d1", "d2"],
        "caption_text": [None, "", None],
        "caption_detail_cn": ["zh"] * 3,
        "score": [1.0, 2.0, 3.0],
    }
    path = parquet(tmp_path / "part.parquet", columns)
    assert [r.caption for r in read_captioned(path, Skipped())] == ["d0", "d1", "d2"]
    skipped = Skipped()
    assert not list(read_captioned(path, skipped, ("caption_text",)))
    assert list(skipped.reasons.values()) == [
        "caption missing (no field caption_text)",
        "caption empty",
        "caption missing (no field caption_text)",
    ]


def test_a_path_of_no_kind_or_of_two_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        recognise(tmp_path / "none")
    with pytest.raises(UserError, match=r"is empty; formats: pictures with same-name \.txt; "):
        recognise(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="holds no data in a format that apexflow reads"):
        recognise(tmp_path)
    for name in ("bare/1.png", "bare/2.JPG", "1.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture("red"))
    with pytest.raises(
        UserError, match=r"bare has pictures but no captions: put 1\.txt beside 1\.png and so on for each"
    ):
        recognise(tmp_path / "bare")
    with pytest.raises(UserError, match=r"1\.webp holds no data in a format"):
        recognise(tmp_path / "1.webp")
    (tmp_path / "1.webp").unlink()
    both = folder(tmp_path / "both")
    tar(both / "a.tar", {"0.png": picture("red"), "0.txt": b"red"})
    with pytest.raises(UserError, match=r"could be read as pictures with same-name \.txt or as webdataset"):
        recognise(both)
    assert recognise(both / "a.tar").kind == kinds()["webdataset"]
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "cache.json").write_text("{}")
    with pytest.raises(UserError, match="is a finished cache"):
        recognise(tmp_path / "cached")


def test_parquet_without_pyarrow_or_without_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "words.parquet", {"caption": ["a"]})
    with pytest.raises(UserError, match="no column of picture bytes; its columns: caption"):
        list(read_captioned(path, Skipped()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'apexflow\[parquet\]'"):
        list(read_captioned(path, Skipped()))


@pytest.mark.parametrize("exif", ["upright", "damaged", "half damaged"])
def test_a_picture_is_read_in_its_exif_orientation(tmp_path: Path, exif: str) -> None:
    lying = Image.new("RGB", (20, 10), "red")
    lying.paste("blue", (10, 0, 20, 10))
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6  # to be turned a quarter clockwise
    content = tags.tobytes() if exif == "upright" else b"Exif\0\0II*\0\xff\xff\xff\xff"
    if exif == "half damaged":  # the orientation, and text where the place of a thumbnail belongs
        entries = struct.pack("<HHIIHHI4s", 0x112, 3, 1, 6, 0x201, 2, 4, b"abc\0")
        content = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    lying.save(tmp_path / "0.jpg", exif=content)
    (tmp_path / "0.txt").write_text("red above blue")
    (record,) = read_captioned(tmp_path, Skipped())
    assert record.image is not None
    assert record.image.size == ((20, 10) if exif == "damaged" else (10, 20))
    top = record.image.getpixel((2, 2))
    assert isinstance(top, tuple) and top[0] > 200 and top[2] < 60
    if exif != "damaged":
        bottom = record.image.getpixel((2, 17))
        assert isinstance(bottom, tuple) and bottom[2] > 200 and bottom[0] < 60


def test_a_split_names_pictures_anywhere_in_the_set(tmp_path: Path) -> None:
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "images").mkdir()
    (tmp_path / "set" / "images" / "a.png").write_bytes(picture("red"))
    (tmp_path / "b.png").write_bytes(picture("red"))
    rows = ({"file_name": "../images/a.png", "text": "in"}, {"file_name": "../../b.png", "text": "out"})
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [record.caption for record in read_captioned(tmp_path / "set", Skipped())] == ["in"]
