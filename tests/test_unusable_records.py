"""What of a set cannot be used: records, files and links, each named and counted."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from pathlib import Path

import pytest
from little_sets import COLORS, folder, parquet, picture, sharegpt, tar

from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.readers import recognise
from apexflow.errors import UserError


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
        "5": "unreadable (not a JSON object with file_name)",
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
        "3": "unreadable (3.png is not a regular file)",
        "4": "unreadable (4.png is not a regular file)",
    }


ODD_SIZES = {"GNU.sparse.realsize": str(2**62), "GNU.sparse.size": "none", "size": str(2**80)}


@pytest.mark.parametrize("key", ODD_SIZES)
def test_sizes_that_no_member_of_a_tar_has_are_told(tmp_path: Path, key: str) -> None:
    """Headers may say anything; a size is asked of memory before a byte is read."""
    tar(tmp_path / "a.tar", {"0.png": picture("red"), "0.txt": b"red"})
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo("0.png")
        member.pax_headers = {key: ODD_SIZES[key]}
        file.addfile(member)
        file.addfile(tarfile.TarInfo("0.txt"))
        file.addfile(tarfile.TarInfo("1.txt"))
    skipped = Skipped()
    assert [record.caption for record in read_captioned(tmp_path, skipped)] == ["red"]
    assert skipped.broken or "larger than its tar" in next(iter(skipped.reasons.values()))


def test_sparse_members_of_a_tar_are_counted(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"0.png": picture("red"), "0.txt": b"red"})
    with tarfile.open(tmp_path / "a.tar", "a", format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo("1.txt")
        member.pax_headers = {"GNU.sparse.size": "512", "GNU.sparse.numblocks": "0"}
        file.addfile(member)
    skipped = Skipped()
    assert len(list(read_captioned(tmp_path, skipped))) == 1
    assert list(skipped.reasons.values()) == ["unreadable (1.txt is not a regular file)"]


def test_what_has_the_name_of_a_list_of_records_and_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metadata.jsonl")
    (tmp_path / "train" / "metadata.jsonl").mkdir(parents=True)
    (tmp_path / "0.png").write_bytes(picture("red"))
    (tmp_path / "0.txt").write_text("red")
    assert [record.caption for record in read_captioned(tmp_path, Skipped())] == ["red"]


def test_a_list_of_prompts_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "prompts.txt").write_text("a star")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read .*prompts.txt \(Permission denied\)"):
        list(read_captioned(tmp_path / "prompts.txt", Skipped()))


def test_columns_of_parquet_that_others_write(tmp_path: Path) -> None:
    """Captions as a category of pandas or as views; of two columns of one name nobody would see which is read."""
    import pyarrow
    import pyarrow.parquet

    def written(*columns: pyarrow.Array, names: list[str]) -> Path:
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    image, red = pyarrow.array([picture("red")] * 2), pyarrow.array(["red", "red"])
    views = (image.cast(pyarrow.binary_view()), red.cast(pyarrow.string_view()))
    for columns in ((image, red.dictionary_encode()), views):
        path = written(*columns, names=["image", "caption"])
        assert [record.caption for record in read_captioned(path, Skipped())] == ["red", "red"]
    with pytest.raises(UserError, match="several columns 'caption'"):
        list(read_captioned(written(image, red, red, names=["image", "caption", "caption"]), Skipped()))
    path = written(image, red, names=["image", "caption"])
    path.write_bytes(path.read_bytes().replace(b"caption", b"\xffaption"))
    skipped = Skipped()
    assert not list(read_captioned(path, skipped)) and skipped.broken


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
        outside = ["unreadable (outside the dataset's folder)"] * (skipped.seen - 2 - len(odd))
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
    with pytest.raises(UserError, match=r"text_to_image\.json: not a JSON list"):
        skipped.check(1, path)
