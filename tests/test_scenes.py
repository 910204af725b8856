"""Scenes and mini-GenEval: the detector sees what was drawn, and never what was asked for."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest

from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.scenes import (
    COLORS,
    HELD_OUT,
    SHAPES,
    TASK_WEIGHTS,
    Thing,
    draw_scene,
    prompt_text,
    render,
    scenes,
    vocabulary,
)
from apexflow.data.shards import write_scenes
from apexflow.evaluation import detector
from apexflow.evaluation.mini_geneval import TASKS, aggregate, held_out_prompts, prompts, score_picture


@pytest.mark.parametrize("task", TASK_WEIGHTS)
def test_true_renders_score_at_least_99_percent(task: str) -> None:
    drawn = [draw_scene(np.random.default_rng([9, i]), task) for i in range(300)]
    rows = [score_picture(render(s.things), s.metadata) for s in drawn]
    assert np.mean([r["correct"] for r in rows]) >= 0.99
    assert np.mean([r["strict"] for r in rows]) >= 0.99


def test_pictures_of_other_prompts_score_near_zero() -> None:
    drawn = list(scenes(300, seed=9))
    rows = [score_picture(render(drawn[(i + 101) % 300].things), s.metadata) for i, s in enumerate(drawn)]
    assert aggregate(rows)["overall"] < 0.1


def test_the_detector_never_sees_the_prompt() -> None:
    assert list(inspect.signature(detector.detect).parameters) == ["image"]
    assert "prompt" not in inspect.getsource(detector).split('"""', 2)[2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_every_shape_in_every_color_is_recognised(shape: str, color: str) -> None:
    (found,) = detector.detect(render((Thing(shape, color, 30, 35, 20),)))
    assert (found.shape, found.color) == (shape, color) and found.score > 0.8


def things(*specs: tuple[str, str, float, float]) -> tuple[Thing, ...]:
    return tuple(Thing(shape, color, x, y, 20) for shape, color, x, y in specs)


@pytest.mark.parametrize(
    ("tag", "include", "exclude", "right", "wrong"),
    [
        (
            "colors",
            [{"class": "star", "count": 1, "color": "red"}],
            [],
            [("star", "red", 32, 32)],
            [("star", "blue", 32, 32)],
        ),
        ("single_object", [{"class": "star", "count": 1}], [], [("star", "red", 32, 32)], [("heart", "red", 32, 32)]),
        (
            "counting",
            [{"class": "ring", "count": 2}],
            [{"class": "ring", "count": 3}],
            [("ring", "red", 16, 16), ("ring", "red", 48, 16)],
            [("ring", "red", 16, 16), ("ring", "red", 48, 16), ("ring", "red", 16, 48)],
        ),
        (
            "position",
            [{"class": "star", "count": 1}, {"class": "ring", "count": 1, "position": ["left of", 0]}],
            [],
            [("star", "red", 48, 32), ("ring", "blue", 16, 32)],
            [("star", "red", 16, 32), ("ring", "blue", 48, 32)],
        ),
        (
            "color_attr",
            [{"class": "star", "count": 1, "color": "red"}, {"class": "ring", "count": 1, "color": "blue"}],
            [],
            [("star", "red", 16, 32), ("ring", "blue", 48, 32)],
            [("star", "blue", 16, 32), ("ring", "red", 48, 32)],
        ),
    ],
)
def test_the_score_falls_when_the_picture_is_wrong(
    tag: str, include: list, exclude: list, right: list, wrong: list
) -> None:
    metadata = {"tag": tag, "include": include, "exclude": exclude}
    metadata["prompt"] = prompt_text(metadata)
    assert score_picture(render(things(*right)), metadata)["correct"]
    assert not score_picture(render(things(*wrong)), metadata)["correct"]


def test_an_extra_thing_fails_only_the_strict_score() -> None:
    metadata = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}], "prompt": ""}
    row = score_picture(render(things(("star", "red", 16, 16), ("heart", "blue", 48, 48))), metadata)
    assert row["correct"] and not row["strict"]


def test_an_empty_picture_shows_nothing() -> None:
    assert detector.detect(render(())) == []


def test_held_out_pairs_never_occur_in_training() -> None:
    assert {s for s, _ in HELD_OUT} == set(SHAPES) and {c for _, c in HELD_OUT} == set(COLORS)
    for scene in scenes(2000, seed=4):
        assert not HELD_OUT & {(t.shape, t.color) for t in scene.things}
    clauses = [c for p in prompts() for c in p["include"]]
    assert not HELD_OUT & {(c["class"], c.get("color")) for c in clauses}
    assert all(HELD_OUT & {(c["class"], c["color"]) for c in p["include"]} for p in held_out_prompts())


def test_prompts_follow_geneval() -> None:
    listed = prompts()
    assert len(listed) == 553 and {tag: sum(p["tag"] == tag for p in listed) for tag in TASKS} == TASKS
    assert listed == prompts()
    assert {word for p in listed for word in p["prompt"].split()} | {"of"} <= set(vocabulary())


def test_clauses_of_a_prompt_ask_for_what_its_task_is_about() -> None:
    for prompt in [*prompts(), *held_out_prompts()]:
        tag, include = prompt["tag"], prompt["include"]
        colors = [clause["color"] for clause in include if "color" in clause]
        # Two things share neither shape nor colour: else a picture with them swapped would be right as well.
        assert len({clause["class"] for clause in include}) == len(include) and len(set(colors)) == len(colors)
        assert len(colors) == (len(include) if tag in ("colors", "color_attr") else 0)
        assert len(include) == (1 if tag in ("single_object", "counting", "colors") else 2)
        stands = [clause["position"][1] for clause in include if "position" in clause]
        assert stands == ([0] if tag == "position" else []) and "position" not in include[0]  # the second by the first
        one_more = {"class": include[0]["class"], "count": include[0]["count"] + 1}
        assert prompt.get("exclude", []) == ([one_more] if tag == "counting" else [])


def test_strict_scores_are_those_of_strict_rows() -> None:
    rows = [{"tag": "colors", "prompt": str(index), "correct": index < 3, "strict": index < 1} for index in range(4)]
    found = aggregate(rows)
    assert (found["overall"], found["strict"], found["strict_tasks"]) == (0.75, 0.25, {"colors": 0.25})


def test_scene_i_does_not_depend_on_the_others() -> None:
    assert list(scenes(5, seed=1))[3] == next(scenes(1, seed=1, start=3))
    assert next(scenes(1, seed=1)) != next(scenes(1, seed=2))


def test_scenes_round_trip_through_shards(tmp_path: Path) -> None:
    drawn = list(scenes(7, seed=1))
    assert write_scenes(drawn, tmp_path / "a", per_shard=3) == 7
    write_scenes(drawn, tmp_path / "b", per_shard=3)
    shards = sorted((tmp_path / "a").iterdir())
    assert [p.read_bytes() for p in shards] == [p.read_bytes() for p in sorted((tmp_path / "b").iterdir())]
    read = list(read_captioned(tmp_path / "a", Skipped()))
    assert [r.caption for r in read] == [s.caption for s in drawn]
    assert all(
        np.array_equal(np.asarray(r.image), np.asarray(render(s.things))) for r, s in zip(read, drawn, strict=True)
    )
