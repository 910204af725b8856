"""Several sets in one run: each gives its share, whatever its size, and the run is as exact as one of a single set."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from command_line import Run, refused
from interrupted import train_in_parts
from little_runs import assert_same, weights
from little_shards import cached
from PIL import Image

from apexflow.comparison.plan import Plan
from apexflow.data.cache import CachedSet
from apexflow.data.mixture import Mixture
from apexflow.data.order import mixed_rows
from apexflow.errors import UserError
from apexflow.training.config import Data, Recipe, load_recipe, parse
from apexflow.training.loop import start, train
from apexflow.training.sources import foreseen
from apexflow.training.step import make_batch, training_step


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished cache of six red pictures."""
    folder = tmp_path_factory.mktemp("second")
    cached(red(folder / "red", 6), tiny_model, folder / "cache")
    return folder / "cache"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a photo of {number} stars\n" for number in range(9)))
    return path


def red(folder: Path, count: int, shape: tuple[int, int] = (64, 64)) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", shape, "red").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a red square {index}")
    return folder


def sources(*paths: Path | str) -> str:
    return f"data.source=[{', '.join(map(str, paths))}]"


# -- Which rows a step takes -------------------------------------------------------------------------------------------


def test_every_epoch_has_each_sets_places_and_every_picture_of_a_set_comes_as_often() -> None:
    places, counts, batch = [[70, 30], [5, 0]], [[50, 7], [3, 0]], 5
    seen: Counter[tuple[int, int, int]] = Counter()
    for step in range(21 * 10):  # ten epochs of 105 places
        bucket, found = mixed_rows(places, counts, step, range(batch), batch, seed=5)
        seen.update((bucket, part, position) for part, position in found)
        for row in range(batch):  # whatever the micro-batch or process
            assert mixed_rows(places, counts, step, [row], batch, seed=5) == (bucket, [found[row]])
    for bucket, part, times in ((0, 0, 700), (0, 1, 300), (1, 0, 50)):
        own = [seen[bucket, part, position] for position in range(counts[bucket][part])]
        assert sum(own) == times and max(own) - min(own) <= 1
    steps = [mixed_rows(places, counts, step, range(batch), batch, seed) for seed in (5, 6) for step in range(4)]
    assert steps[:4] != steps[4:]


def test_without_shares_an_epoch_has_every_row_once(whole: Path, second: Path) -> None:
    data = Mixture([CachedSet(whole), CachedSet(second)])
    assert len(data) == 54 and data.shares == pytest.approx([48 / 54, 6 / 54])
    epochs = [[row for step in range(9) for row in data.batch_rows(9 * e + step, range(6), 6, seed=1)] for e in (0, 1)]
    assert all(sorted(epoch) == list(range(54)) for epoch in epochs) and epochs[0] != epochs[1]
    assert any({row < 48 for row in epochs[0][at : at + 6]} == {True, False} for at in range(0, 54, 6))  # shuffled


def test_a_small_set_repeats_as_often_as_its_share_asks(whole: Path, second: Path) -> None:
    data = Mixture([CachedSet(whole), CachedSet(second)], [1, 3])
    assert data.shares == [0.25, 0.75]
    rows = Counter(row for step in range(1000) for row in data.batch_rows(step, range(10), 10, seed=1))
    assert sum(times for row, times in rows.items() if row >= 48) == 7500
    assert {rows[row] for row in range(48, 54)} == {1250} and {rows[row] for row in range(48)} <= {52, 53}
    only = Mixture([CachedSet(whole), CachedSet(second)], [0, 1])
    assert {row for step in range(9) for row in only.batch_rows(step, range(6), 6, seed=1)} == set(range(48, 54))


def test_what_is_held_out_of_one_set_leaves_the_shares_as_they_are(whole: Path, second: Path) -> None:
    data = Mixture([CachedSet(whole, 12), CachedSet(second)], [1, 1])
    assert data.shares == [0.5, 0.5] and (len(data), data.trained) == (54, 42)


def test_shares_are_met_over_many_buckets(whole: Path) -> None:
    few, many = (CachedSet(whole) for _ in range(2))
    for one, count in ((few, 1), (many, 5)):
        one.buckets = {f"{width}x64": [(0, count)] for width in range(40)}
        one._ends, one._bucket_ends = [40 * count], {name: [count] for name in one.buckets}
    for share in (0.001, 0.01, 0.3):
        assert Mixture([few, many], [share, 1 - share]).shares[0] == pytest.approx(share, abs=0.001)


def test_previews_show_rows_of_each_set_that_has_a_share(whole: Path, second: Path) -> None:
    sets = [CachedSet(whole), CachedSet(second)]
    assert Mixture(sets).spread(4) == [0, 24, 48, 51]
    assert Mixture(sets, [1, 0]).spread(4) == [0, 12, 24, 36]
    assert len(Mixture(sets).spread(20)) == 20 and Mixture(sets).spread(100) == list(range(54))


def test_rows_are_those_of_the_sets(whole: Path, second: Path) -> None:
    one, other = CachedSet(whole), CachedSet(second)
    data, rows = Mixture([one, other]), [50, 0, 47, 48]
    assert data.captions(rows) == other.captions([2]) + one.captions([0, 47]) + other.captions([0])
    latents, c = data.latents(rows), data.condition(rows)
    assert torch.equal(latents, torch.cat([other.latents([2]), one.latents([0, 47]), other.latents([0])]))
    assert c.mask is not None and c.mask.shape == c.embeds.shape[:2]
    alone = one.condition([0, 47])
    length = alone.embeds.shape[1]
    assert torch.equal(c.embeds[1:3, :length], alone.embeds) and not c.embeds[1:3, length:].any()
    with pytest.raises(IndexError):
        data.latents([54])


def test_buckets_of_several_sets_are_joined(any_aspect: Path, recipe_file: Path, tmp_path: Path) -> None:
    tall, square = red(tmp_path / "tall", 9, (64, 128)), red(tmp_path / "square", 9)
    mixed = red(tmp_path / "mixed", 3)
    for file in red(tmp_path / "more", 3, (64, 128)).iterdir():
        shutil.copy(file, mixed / f"tall-{file.name}")
    options = [sources(tall, square, mixed), "data.shares=[1, 2, 2]", "data.buckets=true", f"model={any_aspect}"]
    run = start(load_recipe(recipe_file, options), resume=False)
    data, seen, shapes = run.data, Counter[int](), set()
    assert isinstance(data, Mixture)
    for step in range(500):
        rows = data.batch_rows(step, range(4), 4, seed=1)
        seen.update(0 if row < 9 else 1 if row < 18 else 2 for row in rows)
        shapes.add(tuple(data.latents(rows).shape))  # rows of one shape, or this fails
    assert len(shapes) == 2 and [seen[part] / 2000 for part in range(3)] == pytest.approx([0.2, 0.4, 0.4], abs=0.01)
    assert training_step(run)["skipped"] == 0


# -- Runs --------------------------------------------------------------------------------------------------------------


def test_resume_with_a_mixture_is_exact(
    whole: Path, recipe_file: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = red(tmp_path / "own", 6)
    common = [sources(whole, own, prompts), "data.shares=[1, 1, 2]", "objective.path_weight=0", "objective.share=1"]
    direct = load_recipe(recipe_file, [*common, f"output={tmp_path / 'direct'}"])
    train(direct)
    parts = load_recipe(recipe_file, [*common, f"output={tmp_path / 'parts'}"])
    train_in_parts(parts)
    assert_same(weights(tmp_path / "direct"), weights(tmp_path / "parts"))
    told = json.loads((tmp_path / "parts" / "data.json").read_text())["sources"]
    assert [(one["rows"], one["share"], one["pictures"]) for one in told] == [
        (48, 0.25, True),
        (6, 0.25, True),
        (9, 0.5, False),
    ]
    assert f"{own}: 6 rows, 25.0% of a run's rows" in capsys.readouterr().err
    page = (tmp_path / "parts" / "report.html").read_text()
    assert f"{prompts} (prompts alone)" in page and "50.0%" in page and "1.3" in page  # 24 rows, of which 12 of nine
    changed = load_recipe(recipe_file, [*common, f"output={tmp_path / 'parts'}", sources(whole, own, second_name(own))])
    with pytest.raises(UserError, match=r"data\.source .* instead of .* would have no effect"):
        train(changed, resume=True)


def second_name(own: Path) -> Path:
    return red(own.parent / "other" / own.name, 2)


def test_raw_sets_of_one_name_have_caches_of_their_own_at_the_size_of_the_finished_one(
    recipe_file: Path, any_aspect: Path, tmp_path: Path
) -> None:
    one, other = red(tmp_path / "a" / "red", 2), red(tmp_path / "b" / "red", 3)
    cached(red(tmp_path / "c", 2), any_aspect, tmp_path / "small", size=32)
    run = start(load_recipe(recipe_file, [sources(tmp_path / "small", one, other), f"model={any_aspect}"]), False)
    caches = tmp_path / "run" / "cache"
    assert [len(CachedSet(caches / name)) for name in ("red", "red-2")] == [2, 3]
    assert run.data.size == 32 and make_batch(run, torch.arange(4)).x.shape[-1] == 4


def test_a_list_of_one_is_that_one(whole: Path, recipe_file: Path) -> None:
    listed, plain = (load_recipe(recipe_file, [f"data.source={text}"]) for text in (f"[{whole}]", str(whole)))
    assert listed.to_dict() == plain.to_dict()
    kept = json.loads(json.dumps(asdict(Recipe("x", data=Data(source=("a", "b"), shares=(1.0, 0.0))))))
    assert parse(Recipe, kept, "state").data == Data(source=("a", "b"), shares=(1.0, 0.0))


# -- What does not go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["data.source=[a, b]", "data.shares=[1]"], "shares has 1 numbers for 2 sources"),
        (["data.source=[a, b]", "data.shares=[1, -0.5]"], "data.shares.1: Input should be greater than or equal to 0"),
        (["data.source=[a, b]", "data.shares=[0, 0]"], "shares are all 0"),
        (["data.source=[a, b]", "data.shares=[.inf, 1]"], "finite number"),
        (["data.source=[a, b]", "data.shares=[true, 1]"], "data.shares.0: Input should be a number"),
        (["data.source=a", "data.shares=[1]"], "shares need several sources"),
        (["data.source=[a, b]", "data.shares=[1e308, 1e308]"], "data.shares.0: Input should be less than or equal to"),
        (["data.source=[a, a]"], "a is listed twice"),
        (["data.source=[a, ./a/]"], "./a/ is listed twice"),
        (["data.source=[]"], "data.source: Input should be a path, or a list of paths"),
        (["data.source=[a, 3]"], "data.source: Input should be a path, or a list of paths"),
    ],
)
def test_a_list_that_says_nothing_sensible_is_refused(recipe_file: Path, options: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        load_recipe(recipe_file, options)


def test_sets_that_cannot_go_together_are_named(
    whole: Path, second: Path, recipe_file: Path, prompts: Path, any_aspect: Path, tmp_path: Path
) -> None:
    def told(*options: str) -> str:
        with pytest.raises(UserError) as error:
            start(load_recipe(recipe_file, list(options)), resume=False)
        assert not (tmp_path / "run" / "cache").exists()
        return str(error.value)

    assert told(sources(whole, prompts)).startswith(f"{prompts} holds only prompts")
    assert "data 'nowhere' not found" in told(sources(whole, "nowhere"))
    assert "more than the 54 records" in told(sources(whole, second), "batch=55")
    kept = "more than the 41 records of " + f"{whole}, {second} that are not held out: set batch to 41 or less"
    assert kept in told(sources(whole, second), "batch=42", "data.held_out=500")  # 12 of 48, 1 of 6
    cached(red(tmp_path / "red", 2), any_aspect, tmp_path / "small", size=32)
    assert f"cache {tmp_path / 'small'} was made at size 32 and cache {whole} at 64" in told(
        sources(whole, tmp_path / "small")
    )
    others = Path(shutil.copytree(second, tmp_path / "others"))
    index = json.loads((others / "cache.json").read_text())
    index["made_by"]["autoencoder"] = "another"
    (others / "cache.json").write_text(json.dumps(index))
    words = told(sources(tmp_path / "red", whole, others))  # before anything is cached
    assert f"cache {others} was made with another model's autoencoder" in words


def test_a_folder_that_is_one_sets_cache_is_none_of_several(whole: Path, recipe_file: Path, scene_folder: Path) -> None:
    with pytest.raises(UserError, match=r"is the cache of one source, and data\.source lists several"):
        start(load_recipe(recipe_file, [sources(whole, scene_folder), f"data.cache={whole}"]), resume=False)


def test_a_comparison_takes_one_set(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a comparison takes one dataset, and its recipe has a, b"):
        Plan(tmp_path, load_recipe(recipe_file, ["data.source=[a, b]"]))


def test_the_plan_says_what_is_there(run: Run, whole: Path, recipe_file: Path, tmp_path: Path) -> None:
    shares = (sources(whole, tmp_path / "later"), "data.shares=[3, 1]")
    code, out, _ = run("plan", recipe_file, *shares)
    assert code == 0 and f"{whole}: 48 rows, 75.0% of a run's rows" in out
    assert f"{tmp_path / 'later'}: rows are counted during caching, 25.0% of a run's rows" in out
    refused(run("plan", recipe_file, *shares[:1], "data.shares=[1]"), "1 numbers for 2 sources")
    for others, expected in (((), [0.5, 0.5]), ((tmp_path / "later",), [None] * 3)):
        found = foreseen(Data(source=(str(whole), "scenes", *map(str, others)), count=48))
        assert [one["rows"] for one in found] == [48, 48, None][: len(found)]
        assert [one["share"] for one in found] == expected
