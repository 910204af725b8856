"""A comparison on pictures that are no scenes: drawn from captions that no run trains on, and scored by their distance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from apexflow.backbones import load_backbone
from apexflow.comparison import train as training
from apexflow.comparison.plan import BASIS, Plan, comparison_recipe
from apexflow.comparison.prompts import held_out_prompts, shows_scenes
from apexflow.comparison.results import run_comparison
from apexflow.data.cache import CachedSet
from apexflow.data.caching import CacheSettings, make_cache
from apexflow.data.scenes import scenes
from apexflow.errors import UserError
from apexflow.training.config import Data

COUNT = 40


def write(folder: Path, captions: Sequence[str]) -> Path:
    folder.mkdir()
    for index, caption in enumerate(captions):
        Image.effect_noise((40, 40 if index % 2 else 20), 20 + index).convert("RGB").save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("data") / "set", [f"A star in noise, number {index}!" for index in range(COUNT)]
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, pictures: Path, any_aspect: Path) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "cache"
    settings = CacheSettings(buckets=True)
    make_cache(pictures, load_backbone(str(any_aspect)), any_aspect, folder, settings)
    return folder


@pytest.fixture
def plan(tmp_path: Path, any_aspect: Path, cache: Path) -> Plan:
    recipe = replace(comparison_recipe(), model=str(any_aspect), data=Data(source=str(cache)), batch=2)
    small: dict[str, Any] = {"images": 4, "rates": (1e-4,), "nfe": (1, 2), "seeds": 2, "limit": 3, "timed": False}
    return Plan(tmp_path / "out", recipe, (BASIS,), **small)


class OwnClip:
    """Scores every picture seven."""

    model = torch.nn.Linear(1, 1)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        return torch.full((len(images),), 7.0)


@pytest.mark.parametrize("with_clip", [False, True])
def test_a_comparison_of_other_pictures_has_no_column_of_mini_geneval(
    plan: Plan, with_clip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apexflow.evaluation.against.Clip.load", lambda *_: OwnClip())
    plan = replace(plan, runs=2, clip=tmp_path) if with_clip else plan
    results = run_comparison(plan)
    row = results["rows"][BASIS]
    for report in (
        *row["budgets"]["images"]["nfe"].values(),
        *results["rows"]["teacher"]["budgets"]["images"]["nfe"].values(),
    ):
        keys = {"distance", "diversity", "evaluations", "pictures"} | ({"clip"} if with_clip else set())
        assert {key for key in report if not key.endswith("_se")} == keys
        assert report["pictures"] == 3 * 2 * 2 and report["distance"] > 0 and report["diversity"] > 0
    assert set(row["sweep"]["tried"]["0.0001"]) & {"overall", "distance"} == {"distance"}
    markdown, page = ((plan.output / name).read_text() for name in ("results.md", "report.html"))
    for text in (markdown, page):
        assert "FD, NFE 1" in text and "no run was trained on" in text
        assert "mini-GenEval" not in text and "Tasks" not in text and ("CLIP score" in text) == with_clip
    (head, *body) = (line for line in markdown.splitlines() if line.startswith("| "))
    assert body[1].count("|") == head.count("|") and (" 7.000 " in body[1]) == with_clip
    assert "star in noise" in page and page.count("<svg") == 1 + 2
    assert run_comparison(plan)["rows"] == results["rows"]
    with pytest.raises(UserError, match="different clip"):
        run_comparison(replace(plan, clip=None if with_clip else tmp_path))


def test_no_run_sees_a_picture_whose_caption_is_drawn(cache: Path, tmp_path: Path) -> None:
    """Buckets give in proportion, every epoch has the others, and no more than a quarter is held out."""
    whole, every = CachedSet(cache), set(range(COUNT))
    for asked, held in ((0, 0), (4, 4), (500, COUNT // 4)):
        data = CachedSet(cache, asked)
        seen = {row for step in range(100) for row in data.batch_rows(step, range(4), 4, seed=1)}
        rows = data.held_out_rows()
        assert len(rows) == held and seen == every - set(rows) and len(data) == COUNT
        assert all(data.count(name) == whole.count(name) - held // 2 for name in data.buckets)
        assert data.captions(rows) == whole.captions(rows)
    prompts = [json.loads(line) for line in held_out_prompts(cache, 8, tmp_path).read_text().splitlines()]
    assert sorted(prompts) == sorted(whole.captions(CachedSet(cache, 8).held_out_rows()))


def test_runs_train_on_what_is_not_held_out(plan: Plan, tmp_path: Path) -> None:
    assert plan.recipe_for(BASIS, tmp_path, 1e-4, 2).data.held_out == plan.held_out > 0
    own = replace(plan.recipe, data=replace(plan.recipe.data, held_out=3))
    assert replace(plan, recipe=own).held_out == 3
    assert Plan(tmp_path).held_out == 0 == Plan(tmp_path).recipe_for(BASIS, tmp_path, 1e-4, 2).data.held_out


def test_the_rate_is_that_of_the_least_distance(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    distances = {1e-4: 3.0, 3e-4: 1.0, 1e-3: 2.0}
    monkeypatch.setattr(
        training,
        "_tried",
        lambda plan, name, rate: {"distance": distances[rate], "seconds": 1.0, "seconds_a_step": 1.0},
    )
    assert training.sweep(replace(plan, rates=tuple(distances)), BASIS)["rate"] == 3e-4


def test_scenes_are_known_by_their_words(pictures: Path, cache: Path, scene_folder: Path) -> None:
    assert shows_scenes(Data()) and shows_scenes(Data(source=str(scene_folder)))
    assert not shows_scenes(Data(source=str(pictures))) and not shows_scenes(Data(source=str(cache)))


def test_every_caption_of_a_scene_is_one(tmp_path: Path) -> None:
    file = tmp_path / "scenes.txt"
    file.write_text("\n".join(scene.caption for scene in scenes(64, seed=9)))
    assert shows_scenes(Data(source=str(file)))
    for other in ("a red star\na red cat\n", "\N{HOT BEVERAGE}\n\N{BLACK STAR}\n"):
        file.write_text(other)
        assert not shows_scenes(Data(source=str(file)))


def test_what_does_not_fit_is_refused(plan: Plan, any_aspect: Path, scene_folder: Path, tmp_path: Path) -> None:
    on_scenes = replace(plan.recipe, data=Data(source=str(scene_folder)))
    with pytest.raises(UserError, match=r"--clip cannot be used with .*scenes"):
        run_comparison(replace(plan, recipe=on_scenes, clip=tmp_path))
    with pytest.raises(UserError, match=r"--clip .*absent does not exist"):
        run_comparison(replace(plan, clip=tmp_path / "absent"))
    few = write(tmp_path / "few", [f"a star, {index} cats" for index in range(7)])
    with pytest.raises(UserError, match=r"7 pictures and holds out 1, .* give 8 pictures or more"):
        run_comparison(replace(plan, recipe=replace(plan.recipe, data=Data(source=str(few)))))


def test_one_picture_that_is_held_out_is_too_few_of_however_many(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"40 pictures and holds out 0, .* leave data.held_out at two or more"):
        held_out_prompts(cache, 1, tmp_path)
