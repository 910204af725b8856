"""Every kind of set that is read: recognised by its path alone, read whole, and what is unusable named and counted."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from apexflow.data.captioned import Skipped, pick_caption, read_captioned
from apexflow.data.readers import kinds, recognise
from apexflow.errors import UserError

COLORS = ("red", "green", "blue", "white")


def picture(color: str, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), color).save(buffer, form)
    return buffer.getvalue()


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def parquet(path: Path, columns: Mapping[str, list]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=2)
    return path


# -- One writer for each kind: four pictures of one colour, captioned by it ---------------------------------------------


def folder(path: Path) -> Path:
    path.mkdir()
    for index, color in enumerate(COLORS):
        (path / f"{index}.jpg").write_bytes(picture(color, "JPEG"))
        (path / f"{index}.txt").write_text(f" {color}\n")
    return path


def imagefolder(path: Path) -> Path:
    (path / "train").mkdir(parents=True)
    rows = [{"file_name": f"{color}.webp", "text": color} for color in COLORS]
    for color in COLORS:
        (path / "train" / f"{color}.webp").write_bytes(picture(color, "WEBP"))
    (path / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def webdataset(path: Path) -> Path:
    tar(path / "a-0.tar", {"x.y/0.jpg": picture("red", "JPEG"), "x.y/0.txt": b"red", "x.y/0.seg.png": b"other"})
    text = json.dumps({"caption": "green"}).encode()
    tar(path / "a-1.tar", {"1.webp": picture("green", "WEBP"), "1.json": text, "2.png": picture("blue")})
    members = {"3.txt": b"blue", "3.PNG": picture("blue"), "4.png": picture("white"), "4.txt": b"white"}
    tar(path / "a-2.tar", members)
    return path


def sharegpt(path: Path) -> Path:
    for part in range(2):
        tar(
            path / f"text_to_image_part_{part}.tar",
            {f"image/{i}.png": picture(COLORS[i]) for i in range(2 * part, 2 * part + 2)},
        )
    rows = [{"input_prompt": color, "output_image": f"image/{i}.png"} for i, color in enumerate(COLORS)]
    (path / "text_to_image.json").write_text(json.dumps(rows))
    return path


def parquets(path: Path) -> Path:
    pictures = [{"bytes": picture(color), "path": None} for color in COLORS]
    parquet(path / "data" / "0.parquet", {"id": ["a", "b", "c", "d"], "image": pictures, "caption": list(COLORS)})
    return path


def prompts(path: Path) -> Path:
    file = path.with_suffix(".txt")
    file.write_text("\n\n".join(COLORS) + "\n")
    return file


WRITERS: dict[str, Callable[[Path], Path]] = {
    "folder": folder,
    "imagefolder": imagefolder,
    "webdataset": webdataset,
    "sharegpt": sharegpt,
    "parquet": parquets,
    "prompts": prompts,
}


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


def test_json_lines_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a star", "tag": "x"}\n"a ring"\n{"tag": "x"}\nnonsense\n[1]\n')
    skipped = Skipped()
    assert [r.caption for r in read_captioned(path, skipped)] == ["a star", "a ring"]
    assert list(skipped.reasons) == ["p.jsonl:3", "p.jsonl:4", "p.jsonl:5"] and skipped.seen == 5


# -- Captions ----------------------------------------------------------------------------------------------------------


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


# -- What cannot be used -----------------------------------------------------------------------------------------------


def test_records_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    rows = [
        {"file_name": "good.png", "text": "a star"},
        {"file_name": "none.png", "text": "a star"},
        {"file_name": "good.png", "text": " "},
        {"file_name": "good.png"},
        {"text": "a star"},
        {"file_name": "bad.png", "text": "a star"},
        {"file_name": "spoilt.png", "text": "a star"},
    ]
    (tmp_path / "good.png").write_bytes(picture("red"))
    (tmp_path / "bad.png").write_bytes(picture("red")[:50])
    content = picture("red")
    (tmp_path / "spoilt.png").write_bytes(content[:41] + bytes(len(content) - 53) + content[-12:])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    skipped = Skipped()
    assert len(list(read_captioned(tmp_path, skipped))) == 1
    reasons = {key.rpartition(":")[2]: reason for key, reason in skipped.reasons.items()}
    assert reasons.pop("8").startswith("unreadable (")
    assert reasons == {
        "2": "picture missing",
        "3": "caption empty",
        "4": "caption missing",
        "5": "unreadable (no JSON object with file_name)",
        "6": "corrupt picture",
        "7": "corrupt picture",
    }
    with pytest.raises(UserError, match=r"7 of 8 records .* first: .*metadata.jsonl:2: picture missing"):
        skipped.check(0.5, tmp_path)
    skipped.check(0.9, tmp_path)


def test_what_only_has_the_name_of_a_picture_is_named(tmp_path: Path) -> None:
    home = folder(tmp_path / "set")
    for name in ("empty", "link", "fifo", "folder", "nothing"):
        (home / f"{name}.txt").write_text("a star")
    (home / "empty.png").write_bytes(b"")
    (home / "link.png").symlink_to("nowhere")
    (home / "nothing.png").symlink_to("link.png")
    os.mkfifo(home / "fifo.png")
    (home / "folder.png").mkdir()
    (home / "folder.png" / "in it.png").write_bytes(picture("red"))
    (home / "folder.png" / "in it.txt").write_text("within")
    skipped = Skipped()
    assert [r.caption for r in read_captioned(home, skipped)] == [*COLORS, "within"] and skipped.seen == 10
    lost = {str(home / f"{name}.png"): "picture missing" for name in ("fifo", "folder", "link", "nothing")}
    assert skipped.reasons == lost | {str(home / "empty.png"): "picture empty"}
    before = recognise(home).identity()
    (home / "nowhere").write_bytes(picture("red"))
    assert recognise(home).identity() != before


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_links_to_nothing_are_broken_files_and_folders_are_none(tmp_path: Path, suffix: str) -> None:
    if suffix == "tar":
        tar(tmp_path / "0.tar", {"0.png": b"", "0.txt": b"red", "1.png": picture("red"), "1.txt": b"red"})
    else:
        parquet(tmp_path / "0.parquet", {"image": [b"", None, picture("red")], "caption": ["red"] * 3})
    (tmp_path / f"1.{suffix}").symlink_to("nowhere")
    (tmp_path / f"2.{suffix}").mkdir()
    skipped = Skipped()
    assert len(list(read_captioned(tmp_path, skipped))) == 1
    assert list(skipped.broken) == [str(tmp_path / f"1.{suffix}")] and skipped.files == 2
    assert next(iter(skipped.reasons.values())) == "picture empty"
    (tmp_path / "thumbnails.png").mkdir()
    assert recognise(tmp_path).kind == recognise(tmp_path / f"0.{suffix}").kind


def linked(path: Path, links: list[tuple[str, bytes, str]]) -> Path:
    """A tar of one red picture with its caption, and links (name, type, target) behind it."""
    tar(path, {"./0.png": picture("red"), "0.txt": b"red"})
    with tarfile.open(path, "a") as file:
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            file.addfile(member)
    return path


def test_hard_links_in_a_tar_are_read_and_other_links_are_counted(tmp_path: Path) -> None:
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    links = [("1.png", hard, "0.png"), ("1.txt", hard, "./0.txt"), ("2.png", hard, "1.png"), ("2.txt", hard, "0.txt")]
    links += [("3.png", soft, "0.png"), ("3.txt", hard, "0.txt"), ("4.png", hard, "none"), ("4.txt", hard, "0.txt")]
    path = linked(tmp_path / "a.tar", links)
    skipped = Skipped()
    assert [(r.key, r.caption) for r in read_captioned(path, skipped)] == [(f"a.tar:{n}", "red") for n in range(3)]
    assert {name.rpartition(":")[2]: reason for name, reason in skipped.reasons.items()} == {
        "3": "unreadable (3.png is a link or a device)",
        "4": "unreadable (4.png is a link or a device)",
    }


@pytest.mark.parametrize("home", ["set", "set/train"])
def test_no_more_than_files_of_the_set_itself_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """A set that others made may name any path."""
    folder = tmp_path / home
    folder.mkdir(parents=True)
    for place in (tmp_path, folder.parent, folder):
        (place / "own.png").write_bytes(picture("red"))
    os.mkfifo(folder / "fifo.png")
    up = "../" * len(Path(home).parts)
    named = ["own.png", "x/../own.png", str(tmp_path / "own.png"), f"{up}own.png", "/dev/zero", "fifo.png"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": "a"}) + "\n" for n in named))
    monkeypatch.chdir(folder.parent)
    other = tmp_path / "sharegpt"
    other.mkdir()
    (other / "own.png").write_bytes(picture("red"))
    rows = [
        {"output_image": name, "input_prompt": "a"} for name in [*named[:2], str(tmp_path / "own.png"), "/dev/zero"]
    ]
    (other / "text_to_image.json").write_text(json.dumps(rows))
    for path, odd in ((tmp_path / "set", ["picture missing"]), (Path(folder.name), ["picture missing"]), (other, [])):
        skipped = Skipped()
        assert len(list(read_captioned(path, skipped))) == 2
        outside = ["unreadable (outside of the set's folder)"] * (skipped.seen - 2 - len(odd))
        assert list(skipped.reasons.values()) == outside + odd


DEEP = "[" * 100_000


def test_json_that_is_nested_without_end_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "metadata.jsonl").write_text(DEEP)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "text_to_image.json").write_text(DEEP)
    (tmp_path / "prompts.jsonl").write_text(DEEP)
    shard = tar(tmp_path / "0.tar", {"0.png": picture("red"), "0.json": DEEP.encode()})
    for path in (tmp_path / "rows", tmp_path / "list", tmp_path / "prompts.jsonl", shard):
        skipped = Skipped()
        assert not list(read_captioned(path, skipped)) and len(skipped.reasons | skipped.broken) == 1, path


# In a tar of two records: before the first one's caption, in it (twice), behind it, in the second one's picture, in its caption.
CUTS = [("tar", 800, 0), ("tar", 1100, 0), ("tar", 1537, 0), ("tar", 2048, 0), ("tar", 2600, 1), ("tar", 3586, 1)]


@pytest.mark.parametrize(("suffix", "length", "left"), [*CUTS, ("parquet", 700, 0)])
def test_a_broken_file_among_many_is_named_and_counted_once(
    suffix: str, length: int, left: int, tmp_path: Path
) -> None:
    for number in range(4):
        name = tmp_path / f"{number}.{suffix}"
        if suffix == "tar":
            tar(name, {"0.png": picture("red"), "0.txt": b"red", "1.png": picture("red"), "1.txt": b"red"})
        else:
            parquet(name, {"image": [picture("red")] * 2, "caption": ["red"] * 2})
    broken = tmp_path / f"2.{suffix}"
    broken.write_bytes(broken.read_bytes()[:length])
    skipped = Skipped()
    assert len(list(read_captioned(tmp_path, skipped))) == 6 + left
    assert list(skipped.broken) == [str(broken)] and skipped.files == 4 and not skipped.reasons
    skipped.check(0.3, tmp_path)
    with pytest.raises(UserError, match=rf"1 of 4 files .*2\.{suffix}: corrupt or truncated"):
        skipped.check(0.2, tmp_path)


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_files_of_one_name_in_two_folders_count_and_draw_captions_alike(suffix: str, tmp_path: Path) -> None:
    for part in ("train", "val"):
        name = tmp_path / part / f"0.{suffix}"
        if suffix == "tar":
            tar(name, {"0.png": picture("red"), "0.txt": b" ", "1.png": picture("red"), "1.txt": b"red"})
        else:
            parquet(name, {"image": [picture("red")] * 2, "caption": [" ", "red"]})
    skipped = Skipped()
    assert [record.key for record in read_captioned(tmp_path, skipped)] == [f"0.{suffix}:1"] * 2
    assert skipped.reasons == {str(tmp_path / part / f"0.{suffix}:0"): "caption empty" for part in ("train", "val")}
    with pytest.raises(UserError, match="2 of 4 records"):
        skipped.check(0.4, tmp_path)


def test_a_damaged_manifest_and_lost_pictures_are_named(tmp_path: Path) -> None:
    path = sharegpt(tmp_path / "set")
    (path / "text_to_image_part_1.tar").unlink()
    skipped = Skipped()
    assert len(list(read_captioned(path, skipped))) == 2
    assert skipped.reasons == {"image/2.png": "picture missing", "image/3.png": "picture missing"}
    (path / "text_to_image.json").write_text('{"a": 1}')
    skipped = Skipped()
    assert not list(read_captioned(path, skipped))
    with pytest.raises(UserError, match=r"text_to_image\.json: no JSON list"):
        skipped.check(1, path)


def test_a_path_of_no_kind_or_of_two_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        recognise(tmp_path / "none")
    with pytest.raises(UserError, match=r"is empty; it reads: pictures with same-name \.txt; "):
        recognise(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="holds no kind of data that apexflow reads"):
        recognise(tmp_path)
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
