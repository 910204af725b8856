"""A writer for each kind of set: four pictures of one colour, captioned by it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

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
