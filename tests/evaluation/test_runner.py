"""The runner: drawing and scoring resume, are shared out, and never let a lacking picture move a mean."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apexflow.data.scenes import render, scenes
from apexflow.errors import UserError
from apexflow.evaluation import mini_geneval
from apexflow.evaluation.files import read_rows
from apexflow.evaluation.geneval.prompt_set import PROMPTS_SHA256
from apexflow.evaluation.geneval.prompt_set import prompts as geneval_prompts
from apexflow.evaluation.runner import EvaluationSettings, Share, Tools, evaluate, score_folder
from apexflow.evaluation.suite import prompts_sha256
from apexflow.evaluation.suites.mini_geneval import MiniGenEval
from apexflow.evaluation.table import score_table
from apexflow.generator import Generator, load

QUICK = EvaluationSettings(steps=1, guidance=1.0, per_prompt=2, limit=24)
COMPARED = ("tasks", "overall", "strict", "evaluations", "prompts_sha256", "weights", "times", "pictures")


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return load(str(tiny_model), "cpu")


@pytest.fixture(scope="module")
def whole(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "e"
    evaluate(generator, QUICK, folder)
    return folder


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def same(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in COMPARED) and a["diversity"] == pytest.approx(b["diversity"], rel=1e-3)


def pictures(folder: Path) -> dict[str, Path]:
    root = folder / "pictures"
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.png"))}


def alike(a: Path, b: Path) -> bool:
    """The same pictures, but for the last bit, which the other pictures of a batch may move."""
    one, other = pictures(a), pictures(b)
    pixels = [[np.asarray(Image.open(path), dtype=int) for path in found.values()] for found in (one, other)]
    return one.keys() == other.keys() and all(abs(x - y).max() <= 1 for x, y in zip(*pixels, strict=True))


class Interrupted(Exception):
    pass


def interrupted_after(calls: int, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = generator.generate_seeded, iter(range(calls))

    def limited(*arguments: object, **named: object) -> list[Image.Image]:
        if next(count, None) is None:
            raise Interrupted
        return original(*arguments, **named)

    monkeypatch.setattr(generator, "generate_seeded", limited)


def test_the_layout_is_the_official_one(whole: Path) -> None:
    names = list(pictures(whole))
    assert len(names) == 48 and names[:3] == ["00000/samples/0000.png", "00000/samples/0001.png", names[2]]
    metadata = json.loads((whole / "pictures" / "00000" / "metadata.jsonl").read_text())
    assert metadata == mini_geneval.prompts()[0]
    rows = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    assert [row["filename"] for row in rows] == names and {"tag", "prompt", "correct", "reason"} <= rows[0].keys()
    assert not list(whole.rglob(".partial*"))


def test_the_report_holds_what_moves_the_score(whole: Path) -> None:
    report = report_of(whole)
    assert (report["steps"], report["guidance"], report["seed"], report["size"]) == (1, 1.0, 0, 64)
    assert report["evaluations"] == 1 and report["times"] == [1.0, 0.0] and not report["complete"]
    assert {"torch", "transformers", "apexflow"} <= report["versions"].keys() and len(report["prompts_sha256"]) == 64


def test_the_prompts_hash_is_that_of_the_official_file() -> None:
    assert prompts_sha256(geneval_prompts()) == PROMPTS_SHA256


def test_an_interrupted_evaluation_goes_on_as_if_nothing_had_happened(
    generator: Generator, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupted_after(1, generator, patch)
        with pytest.raises(Interrupted):
            evaluate(generator, QUICK, tmp_path / "e")
    assert len(pictures(tmp_path / "e")) == 32
    assert same(evaluate(generator, QUICK, tmp_path / "e"), report_of(whole))
    assert alike(tmp_path / "e", whole)
    assert same(evaluate(generator, QUICK), report_of(whole))  # in memory, too


def test_a_half_written_picture_does_not_count(generator: Generator, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "e")
    torn, empty = (folder / "pictures" / "00000" / "samples" / name for name in ("0000.png", "0001.png"))
    torn.write_bytes(torn.read_bytes()[:-30])
    empty.write_bytes(b"")
    assert same(evaluate(generator, QUICK, folder), report_of(whole))
    assert alike(folder, whole)


def test_a_spoilt_picture_is_reported_and_moves_nothing(generator: Generator, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "e")
    spoilt = folder / "pictures" / "00000" / "samples" / "0000.png"
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:60] + bytes(len(content) - 80) + content[-20:])  # with its end, as a bad disk leaves it
    report = evaluate(generator, QUICK, folder)
    assert list(report["failed"]) == ["00000/samples/0000.png"] and report["pictures"] == 47
    assert report["diversity"] == pytest.approx(report_of(whole)["diversity"], rel=0.2)


def test_half_a_row_and_the_row_of_another_picture_are_scored_again(
    generator: Generator, whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "e")
    rows = (folder / "results.jsonl").read_text().splitlines()
    (folder / "results.jsonl").write_text("\n".join(rows[:20]) + "\n" + rows[20][:40])
    assert same(evaluate(generator, QUICK, folder), report_of(whole))
    assert (folder / "results.jsonl").read_text().splitlines() == rows
    copied = score_folder(folder / "pictures", QUICK, tmp_path / "s")
    shown = json.loads((folder / "pictures" / "00000" / "metadata.jsonl").read_text())
    scene = next(s for s in scenes(400, 1) if mini_geneval.score_picture(render(s.things), shown)["correct"])
    render(scene.things).save(folder / "pictures" / "00000" / "samples" / "0000.png")
    assert score_folder(folder / "pictures", QUICK, tmp_path / "s")["images"] > copied["images"]


def test_processes_share_the_drawing_and_the_last_one_scores(
    generator: Generator, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    results = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        results.append(evaluate(generator, QUICK, tmp_path / "e", share=Share.from_environment()))
        assert len(pictures(tmp_path / "e")) == 24 * len(results)
    assert results[0]["pending"] == 24 and same(results[1], report_of(whole))
    assert alike(tmp_path / "e", whole)
    for rank, told in (("2", "does not lie below"), ("x", "RANK must be a whole number")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match=told):
            Share.from_environment()
    with pytest.raises(UserError, match="--output"):
        evaluate(generator, QUICK, share=Share(0, 2))


def test_under_torchrun_the_first_process_waits_and_alone_scores(
    generator: Generator, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[dict] = []

    def second(seconds: float) -> None:
        waited.append(evaluate(generator, QUICK, tmp_path / "e", share=Share(1, 2, together=True)))

    monkeypatch.setattr("apexflow.data.workers.time.sleep", second)
    report = evaluate(generator, QUICK, tmp_path / "e", share=Share(0, 2, together=True))
    assert len(waited) == 1 and waited[0]["pending"] == 0 and same(report, report_of(whole))


def test_fresh_noise_belongs_to_the_picture_not_to_the_batch(generator: Generator) -> None:
    prompts, seeds = ["a red star", "a blue ring"], [(3, 5), (3, 6)]
    together = generator.generate_seeded(prompts, seeds, 3, guidance=1.0, rho=0.7)
    alone = generator.generate_seeded(prompts[1:], seeds[1:], 3, guidance=1.0, rho=0.7)
    still = generator.generate_seeded(prompts[1:], seeds[1:], 3, guidance=1.0)
    pixels = [np.asarray(picture, dtype=int) for picture in (together[1], alone[0], still[0])]
    assert abs(pixels[0] - pixels[1]).max() <= 1 < abs(pixels[1] - pixels[2]).max()


def test_a_report_names_the_sampler_that_was_used(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = replace(generator.backbone.settings, rho=0.5)
    monkeypatch.setattr(generator.backbone, "settings", own)
    for given, used in (({}, 0.5), ({"rho": 0.25}, 0.25)):
        settings = EvaluationSettings(steps=2, guidance=1.0, per_prompt=1, limit=1, **given)
        report = evaluate(generator, settings, tmp_path / str(used))
        assert (report["rho"], report["kappa"], report["order"]) == (used, 0, 1)


def test_other_settings_need_another_folder(generator: Generator, whole: Path) -> None:
    with pytest.raises(UserError, match="different seed"):
        evaluate(generator, EvaluationSettings(**{**vars(QUICK), "seed": 1}), whole)
    with pytest.raises(UserError, match="different limit"):
        score_folder(whole / "pictures", EvaluationSettings(limit=3, per_prompt=2), whole)


def foreign(root: Path, count: int = 12) -> list[dict]:
    """True renders as another program would leave them: five digits, whole numbers for folders, a grid beside."""
    prompts = mini_geneval.prompts()
    pool = {}
    for scene in scenes(3000, 5):
        pool.setdefault(scene.caption, scene)
    chosen = [index for index, metadata in enumerate(prompts) if metadata["prompt"] in pool][:count]
    for index in chosen:
        place = root / f"{index:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps(prompts[index]))
        (place / "grid.png").write_bytes(b"ignored")
        render(pool[prompts[index]["prompt"]].things).save(place / "samples" / "00000.png")
    return [prompts[index] for index in chosen]


def test_a_folder_of_another_program_is_scored_and_what_lacks_is_named(tmp_path: Path) -> None:
    root = tmp_path / "theirs"
    foreign(root)
    once = EvaluationSettings(per_prompt=1)
    before = sorted(root.rglob("*"))
    report = score_folder(root, once, tmp_path / "scores")
    assert sorted(root.rglob("*")) == before
    assert report["images"] == 1.0 and report["pictures"] == 12 and len(report["missing"]) == 553 - 12
    # A task without a picture has no mean, and the others' mean is no overall.
    assert (
        list(report["tasks"].values()) == [1.0, None, None, None, None, None] == list(report["strict_tasks"].values())
    )
    assert (report["overall"], report["strict"], report["overall_se"]) == (None, None, None)
    assert "INCOMPLETE (541 missing), 12 pictures" in score_table({"x": report})
    places = sorted(root.iterdir())
    (places[0] / "samples" / "00000.png").write_bytes(b"no picture")
    (places[1] / "metadata.jsonl").write_text("{")
    shutil.copy(places[2] / "samples" / "00000.png", places[2] / "samples" / "00001.png")
    again = score_folder(root, once, tmp_path / "scores")
    name = f"{places[0].name}/samples/00000.png"
    assert list(again["failed"]) == [name] and "unreadable" in again["failed"][name]
    assert again["extra"] == [places[1].name, f"{places[2].name}/samples/00001.png"]
    assert (again["images"], again["pictures"], again["complete"]) == (1.0, 10, False)
    assert len(again["missing"]) == 553 - 11


def test_reworded_prompts_are_scored_and_change_the_hash(tmp_path: Path) -> None:
    metadata = foreign(tmp_path / "theirs", 2)
    plain = score_folder(tmp_path / "theirs", EvaluationSettings(per_prompt=1), tmp_path / "scores")
    place = sorted((tmp_path / "theirs").iterdir())[0]
    (place / "metadata.jsonl").write_text(json.dumps(metadata[0] | {"prompt": "in other words"}))
    reworded = score_folder(tmp_path / "theirs", EvaluationSettings(per_prompt=1), tmp_path / "scores")
    assert reworded["pictures"] == 2 and reworded["prompts_sha256"] != plain["prompts_sha256"]
    rows = [json.loads(line) for line in (tmp_path / "scores" / "results.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["in other words", metadata[1]["prompt"]]  # no row of the old prompt


@pytest.mark.parametrize(
    ("there", "wanted", "missing"),
    [
        (["0000", "0002", "0003"], 4, ["0001"]),
        (["00000", "00010"], 4, ["00001", "00002"]),
        (["0001", "0002", "0004"], 4, ["0003"]),
        (["0000", "00000"], 3, ["0001"]),
        (["2", "10", "1"], 3, []),
    ],
)
def test_a_hole_in_the_numbering_is_named(there: list[str], wanted: int, missing: list[str], tmp_path: Path) -> None:
    foreign(tmp_path, 1)
    samples = next(tmp_path.rglob("samples"))
    picture = next(samples.iterdir()).rename(tmp_path / "picture.png")
    for name in there:
        shutil.copy(picture, samples / f"{name}.png")
    found = MiniGenEval(Tools(), wanted).find(tmp_path, MiniGenEval(Tools()).choose(None)[0])
    names = [name for name in found.missing if name.startswith(samples.parent.name)]
    assert names == [f"{samples.parent.name}/samples/{name}.png" for name in missing]
    assert [picture.path.stem for picture in found.pictures] == sorted(there, key=lambda name: (int(name), name))


def test_folders_that_hold_nothing_to_score(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pictures folder"):
        score_folder(tmp_path / "none", EvaluationSettings())
    with pytest.raises(UserError, match="layout"):
        score_folder(tmp_path, EvaluationSettings())
    root = tmp_path / "theirs"
    foreign(root, 1)
    next(root.rglob("00000.png")).write_bytes(b"x")
    with pytest.raises(UserError, match="could be scored"):
        score_folder(root, EvaluationSettings())


def test_a_link_to_nowhere_is_told_of(whole: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(whole / "pictures", pictures)
    lost = sorted(pictures.rglob("*.png"))[0]
    lost.unlink()
    lost.symlink_to(tmp_path / "nowhere")
    report = score_folder(pictures, QUICK, tmp_path / "scores")
    assert list(report["failed"]) == [lost.relative_to(pictures).as_posix()] and not report["complete"]


def test_half_a_row_that_ends_in_a_bracket_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"filename": "a"}\n{"filename": "b", "metadata": {"tag": "x"}')
    assert read_rows(file) == [{"filename": "a"}]
