"""Data and caches on the command line: what trains, and one line with exit code 2 for what cannot."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from command_line import Run, refused, write
from PIL import Image

from apexflow.training.config import Data
from apexflow.training.prepare import finished_cache


def with_data(recipe: Path, source: Path) -> tuple[str, ...]:
    return ("train", str(recipe), "steps=1", f"data.source={source}")


def picture_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path, pictures: dict[str, bytes], captions: dict[str, str]) -> Path:
    folder.mkdir()
    for name, content in pictures.items():
        (folder / f"{name}.png").write_bytes(content)
    for name, caption in captions.items():
        (folder / f"{name}.txt").write_text(caption)
    return folder


def test_a_folder_of_pictures_with_captions_trains(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    names = [str(i) for i in range(6)]
    folder = fill(tmp_path / "own", dict.fromkeys(names, picture_bytes()), dict.fromkeys(names, "a red square"))
    assert run(*with_data(recipe_file, folder))[0] == 0


def test_data_that_cannot_be_used_is_named(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    refused(run(*with_data(recipe_file, tmp_path / "none")), "none", "not found")
    (tmp_path / "empty").mkdir()
    refused(run(*with_data(recipe_file, tmp_path / "empty")), "empty")
    good = picture_bytes()
    cases = {
        "nocaption": ({"a": good, "b": good}, {"a": "a star"}, "caption missing"),
        "blank": ({"a": good, "b": good}, {"a": "a star", "b": "  "}, "caption empty"),
        "corrupt": ({"a": good, "b": good[:40]}, {"a": "a star", "b": "a star"}, "corrupt"),
    }
    for name, (pictures, captions, word) in cases.items():
        refused(run(*with_data(recipe_file, fill(tmp_path / name, pictures, captions)), "batch=2"), word, name)


def test_a_folder_called_scenes_is_not_passed_over(
    run: Run, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "scenes", {}, {})
    refused(run(*with_data(recipe_file, Path("scenes"))), "'scenes' stands for scenes that are drawn", "./scenes")
    assert not (tmp_path / "run").exists()
    refused(run("train", recipe_file, "data.source=./scenes"), "scenes is empty")
    write(folder / "cache.json", "{}")
    assert finished_cache(Data(source="scenes")) is None and finished_cache(Data(source="./scenes")) is not None


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_shard_is_named(run: Run, recipe_file: Path, scene_folder: Path, tmp_path: Path, damage: str) -> None:
    content = next(scene_folder.glob("*.tar")).read_bytes()
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "bad.tar").write_bytes(content[: len(content) // 2 + 700] if damage == "truncated" else b"nonsense" * 500)
    refused(run(*with_data(recipe_file, folder)), "bad.tar")


def test_a_shard_with_one_bad_record_is_used_without_it(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for index in range(40):
            for suffix, content in ((".png", picture_bytes() if index else b"x"), (".txt", b"a red square")):
                member = tarfile.TarInfo(f"{index}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    code, _, errors = run(*with_data(recipe_file, folder))
    first = f"1 of 40 records skipped; first: {folder / 'a.tar:0'}: corrupt picture"
    assert code == 0 and first in errors and str(tmp_path / "run" / "cache" / "cache.json") in errors
    record = json.loads((tmp_path / "run" / "cache" / "cache.json").read_text())
    assert record["rows"] == 39 and record["skipped"] == {str(folder / "a.tar:0"): "corrupt picture"}


def test_a_cache_of_other_data_or_a_damaged_cache_is_refused(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run("train", recipe_file, "steps=1", f"data.cache={cache}")[0] == 0
    names = [str(i) for i in range(6)]
    other = fill(tmp_path / "own", dict.fromkeys(names, picture_bytes()), dict.fromkeys(names, "a red square"))
    again = (f"data.cache={cache}", f"output={tmp_path / 'again'}")
    refused(run(*with_data(recipe_file, other), *again), "cache", "from other files than the dataset has now")
    refused(run("train", recipe_file, "steps=1", f"data.source={cache}", "data.size=32", *again[1:]), "size 64", "32")


def test_cache_makes_reads_and_verifies(run: Run, recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    names = [str(i) for i in range(6)]
    own = fill(tmp_path / "own", dict.fromkeys(names, picture_bytes()), dict.fromkeys(names[1:], "a red square"))
    folder = tmp_path / "kept"
    command = ("cache", own, "-o", folder, "--model", tiny_model)
    refused(run(*command), "1 of 6", "0.png", "caption missing")
    code, out, _ = run(*command, "--skip-limit", 0.5, "--json")
    made = json.loads(out)
    assert code == 0 and made["rows"] == 5 and made["complete"] and list(made["skipped"]) == [str(own / "0.png")]
    code, out, _ = run(*command, "--skip-limit", 0.5)
    assert code == 0 and "0.png: caption missing" in out and f"data.source={folder}" in out
    code, out, _ = run("cache", folder, "--verify", "--json")
    assert code == 0 and json.loads(out)["rows"] == 5
    assert run("train", recipe_file, "steps=1", f"data.source={folder}")[0] == 0
    (folder / "null.safetensors").unlink()
    refused(run("cache", folder, "--verify"), "null.safetensors is missing", "make it again", "apexflow cache")
    refused(run(*command, "--skip-limit", 0.5, "--size", 32), "size", "other settings")
    refused(run("cache", own), "-o")
    refused(run("cache", folder, "-o", tmp_path / "twice"), "is a finished cache")
    refused(run("cache", own, "-o", tmp_path / "odd", "--model", tiny_model, "--size", 50), "50", "multiples")
