"""The user's own captioned pictures as a suite, of every kind that can be read, with no way to a network."""

from __future__ import annotations

import json
from pathlib import Path

import little
import numpy as np
import pytest
from command_line import Run, refused
from little import rows_of, settings
from little_sets import COLORS, WRITERS
from PIL import Image

from apexflow.data.captioned import Sample, Skipped, read_captioned, read_sample
from apexflow.errors import UserError
from apexflow.evaluation.runner import Tools, evaluate, score_folder
from apexflow.evaluation.suites import SUITES, own
from apexflow.evaluation.table import score_table
from apexflow.generator import Generator

pytestmark = pytest.mark.usefixtures("no_network")
WHOLE = settings("own", limit=None)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six different pictures with captions."""
    folder = tmp_path_factory.mktemp("noise")
    for index in range(6):
        Image.effect_noise((40, 30), 40 + 10 * index).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a star {index}")
    return folder


def drawn(data: Path, folder: Path) -> Path:
    """The pictures of a set where those of its prompts would be drawn."""
    folder.mkdir()
    for index, record in enumerate(read_captioned(data, Skipped())):
        if record.image is not None:
            record.image.save(folder / f"{index:05d}.png")
    return folder


@pytest.mark.parametrize("kind", WRITERS)
def test_a_set_of_any_kind_gives_its_captions_as_prompts_and_nothing_is_nearer_to_it_than_itself(
    kind: str, inception_file: Path, clip_folder: Path, tmp_path: Path
) -> None:
    data = WRITERS[kind](tmp_path / "set")
    if kind == "prompts":
        suite = SUITES["own"](Tools(data=data, clip=clip_folder))
        suite.check()
        assert [prompt.text for prompt in suite.choose(None)[0]] == list(COLORS)
        with pytest.raises(UserError, match="holds only prompts, and FID needs pictures"):
            SUITES["own"](Tools(data=data, inception=inception_file)).check()
        return
    pictures = drawn(data, tmp_path / "pictures")
    report = score_folder(pictures, WHOLE, tmp_path / "s", "x", Tools(data=data, inception=inception_file))
    assert [row["prompt"] for row in rows_of(tmp_path / "s")] == list(COLORS)
    assert report["pictures"] == report["reference_pictures"] == 4 and not report["missing"] and not report["extra"]
    assert report["fid"] == pytest.approx(0, abs=1e-6) and "FID of 4 pictures" in report["warning"]


def test_several_pictures_a_prompt_have_all_three_numbers(
    generator: Generator, noise: Path, inception_file: Path, clip_folder: Path, tmp_path: Path
) -> None:
    tools = Tools(data=noise, inception=inception_file, clip=clip_folder)
    report = evaluate(generator, settings("own", per_prompt=2), tmp_path / "e", tools=tools)
    pictures = tmp_path / "e" / "pictures"
    assert sorted(path.name for path in pictures.iterdir()) == [f"0000{i}-{k}.png" for i in (0, 1) for k in (0, 1)]
    assert report["reference_pictures"] == 2 and not report["complete"]  # the first two of six
    assert report["fid"] > 0 and report["diversity"] > 0 and report["scoring"]["fid_size"] == 64
    assert report["clip"] == pytest.approx(np.mean([row["clip"] for row in rows_of(tmp_path / "e")]))
    assert "diversity" in score_table({"m": report}) and "clip" in score_table({"m": report})
    (pictures / "00001-1.png").unlink()
    again = score_folder(pictures, settings("own", per_prompt=2), None, "x", Tools(data=noise, clip=clip_folder))
    assert again["missing"] == ["00001-1.png"] and again["pictures"] == 3


def test_the_first_prompts_are_the_same_whatever_the_limit(noise: Path) -> None:
    whole, complete = SUITES["own"](Tools(data=noise)).choose(None)
    assert complete and len(whole) == 6
    for limit in (1, 5, 6, 7):
        found, complete = SUITES["own"](Tools(data=noise)).choose(limit)
        assert found == whole[:limit] and complete == (limit >= 6)


def test_the_set_is_read_once_for_all_steps_and_seeds(
    run: Run, tiny_model: Path, noise: Path, inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def note(sample: Sample) -> object:
        read.append(sample.name)
        return read_sample(sample)

    monkeypatch.setattr(own, "read_sample", note)
    common = ("evaluate", "--suite", "own", "--data", noise, "--model", tiny_model, "--inception", inception_file)
    assert run(*common, "--steps", "1,2", "--seeds", 2, "-o", tmp_path / "e")[0] == 0
    assert sorted(read) == sorted(2 * [str(noise / f"{index}.png") for index in range(6)])  # captions, then features
    assert run(*common, "--steps", 2, "--seed", 1, "-o", tmp_path / "alone")[0] == 0
    one, other = (
        json.loads((tmp_path / folder / "seed-1" / "report.json").read_text()) for folder in ("e/steps-2", "alone")
    )
    assert one["fid"] == other["fid"] and one["scoring"] == other["scoring"]


def test_another_picture_is_another_reference(inception_file: Path, noise: Path, tmp_path: Path) -> None:
    pictures, found = drawn(noise, tmp_path / "pictures"), []
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in noise.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    for turn in range(3):
        if turn == 2:
            Image.new("RGB", (40, 30), "red").save(changed / "1.png")
        report = score_folder(
            pictures, settings("own"), None, "x", Tools(data=noise if turn == 0 else changed, inception=inception_file)
        )
        found.append((report["scoring"]["reference_sha256"], report["prompts_sha256"]))
    assert found[0] == found[1] != found[2] and found[1][1] == found[2][1]


def test_what_cannot_be_used_is_left_out_and_told(noise: Path, clip_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "set"
    data.mkdir()
    for path in noise.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "1.txt").unlink()
    (data / "3.png").write_bytes((noise / "3.png").read_bytes()[:-300])
    pictures = drawn(data, tmp_path / "pictures")
    report = score_folder(pictures, WHOLE, tmp_path / "s", "x", Tools(data=data, clip=clip_folder))
    assert [row["prompt"][-1] for row in rows_of(tmp_path / "s")] == ["0", "2", "4", "5"]
    assert [Path(name).name for name in report["left_out"]] == ["1.png", "3.png"]
    assert "2 of 6 records left out" in score_table({"m": report})


def test_a_shard_that_breaks_off_is_left_out_and_told(clip_folder: Path, tmp_path: Path) -> None:
    data = WRITERS["webdataset"](tmp_path / "set")
    broken = data / "a-1.tar"
    broken.write_bytes(broken.read_bytes()[:700])
    report = score_folder(drawn(data, tmp_path / "pictures"), WHOLE, None, "x", Tools(data=data, clip=clip_folder))
    assert report["pictures"] == 3 and list(report["left_out"]) == [str(broken)]


def test_a_reference_that_cannot_be_read_is_told_before_anything_is_drawn(
    noise: Path, inception_file: Path, tmp_path: Path
) -> None:
    contents = {"empty": b"", "broken": b"PK\x03\x04" + b"x" * 50, "text": b"mu\n"}
    for name, content in contents.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.save(tmp_path / "array.npy", np.zeros(128))
    (tmp_path / "folder").mkdir()
    for path in tmp_path.iterdir():
        suite = SUITES["own"](Tools(data=noise, inception=inception_file, reference=path))
        with pytest.raises(UserError, match=f"{path}") as error:
            suite.check()
        assert "pickle.load" not in str(error.value)


def test_a_column_of_one_row_alone_leaves_the_others_in_their_places() -> None:
    rows = {"a": {"tasks": {"fid of 6": 1.0, "clip": 2.0}}, "b": {"tasks": {"fid of 5": 3.0, "clip": 4.0}}}
    lines = [line.split("│") for line in score_table({n: r | {"suite": "own"} for n, r in rows.items()}).splitlines()]
    found = [[cell.strip() for cell in line[3:7]] for line in lines if len(line) > 7]
    assert found == [["1.00", "2.00", "", ""], ["", "4.00", "3.00", ""]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), ("--data is missing", "captioned pictures")),
        (("--data", "absent"), ("--data absent", "does not exist")),
        (("--data", "empty"), ("empty", "formats: ")),
        (("--data", "bare"), ("no caption", "a.txt")),
        (("--data", "blank"), ("no usable record", "caption empty")),
        (("--data", "noise", "--limit", 1), ("FID needs at least two pictures", "gives 1", "--limit")),
        (("--data", "noise", "--judge", "x"), ("--judge cannot be used",)),
        (("--data", "noise", "--fid-size", 100_000), ("--fid-size", "8192")),
    ],
)
def test_what_lacks_is_one_line_with_its_mend(
    given: tuple, told: tuple, run: Run, noise: Path, inception_file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise").symlink_to(noise)
    for name, text in (("empty", None), ("bare", None), ("blank", " \n")):
        (tmp_path / name).mkdir()
        if name != "empty":
            Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
        if text:
            (tmp_path / name / "a.txt").write_text(text)
    refused(run("evaluate", "--suite", "own", "--images", noise, "--inception", inception_file, *given), *told)


@pytest.mark.parametrize("drawing", [(), ("--per-prompt", "1"), ("--images", ".", "--per-prompt", "2")])
def test_nothing_to_score_with_is_refused_before_a_model_is_loaded(
    run: Run, noise: Path, drawing: tuple[str, ...]
) -> None:
    model = () if "--images" in drawing else ("--model", "no-such-model")
    given = ("evaluate", *model, "--suite", "own", "--data", noise, *drawing)
    refused(run(*given), "nothing would be scored: give --inception")


def test_what_is_about_fid_needs_its_network(noise: Path, tmp_path: Path) -> None:
    reference = little.mjhq_folder(tmp_path) / "imgs"
    with pytest.raises(UserError, match="--reference is for FID"):
        score_folder(tmp_path, WHOLE, None, "x", Tools(data=noise, reference=reference))
