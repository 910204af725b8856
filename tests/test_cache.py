"""The cache: what it keeps equals what the model says, it survives any kill, and it never serves another model or set."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from apexflow.backbones import load_backbone
from apexflow.data import caching
from apexflow.data.buckets import bucket_sizes, nearest
from apexflow.data.cache import CachedSet, verify
from apexflow.data.caching import CacheSettings, make_cache
from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.fingerprint import autoencoder_fingerprint, text_fingerprint
from apexflow.data.order import batch_rows, data_row
from apexflow.data.pictures import to_tensor
from apexflow.data.scenes import render, scenes
from apexflow.errors import UserError
from apexflow.objectives.apex import APEX
from apexflow.training.config import load_recipe
from apexflow.training.loop import start
from apexflow.training.step import make_batch, training_step

WINDOW = 8  # records a shard in these tests: 48 scenes make six


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "WINDOW", WINDOW)


def cached(source: Path, model: Path, folder: Path, **settings: object) -> CachedSet:
    assert make_cache(source, load_backbone(str(model)), model, folder, CacheSettings(**settings))  # type: ignore[arg-type]
    return CachedSet(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, scene_folder: Path, tiny_model: Path) -> Path:
    """48 scenes cached in one go, in six shards."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "WINDOW", WINDOW)
        cached(scene_folder, tiny_model, folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(scope="session")
def any_aspect(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model without its square position embedding, as SANA's large ones are."""
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("aspect") / "model"))
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"interpolation_scale": None}))
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- What is kept ------------------------------------------------------------------------------------------------------


def test_rows_equal_what_the_model_says(whole: Path, scene_folder: Path, tiny_model: Path) -> None:
    data, backbone = CachedSet(whole), load_backbone(str(tiny_model))
    records = list(read_captioned(scene_folder, Skipped()))
    assert len(data) == len(records) == 48 and data.has_pictures and data.has_text
    rows = [40, 0, 7, 8]
    assert data.captions(rows) == [records[r].caption for r in rows]
    with torch.no_grad():
        latents = backbone.encode_images(torch.stack([to_tensor(records[r].image, (64, 64)) for r in rows]))  # type: ignore[arg-type]
        told = backbone.encode_prompts(data.captions(rows))
        null = backbone.encode_prompts([""])
    assert (data.latents(rows) - latents).abs().max() < 2e-3  # kept in half precision
    c = data.condition(rows)
    assert told.mask is not None and c.mask is not None and torch.equal(c.mask.bool(), told.mask.bool())
    assert (c.embeds - told.embeds * told.mask[..., None]).abs().max() < 1e-5
    cached_null = data.null()
    assert cached_null is not None and (cached_null.embeds - null.embeds).abs().max() < 1e-5
    assert data.condition([3]).mask is None  # nothing to hide
    with pytest.raises(IndexError):
        data.latents([48])


def test_only_the_shards_that_are_asked_for_are_read(copy: Path) -> None:
    data = CachedSet(copy)
    for number in (0, 1, 2, 4, 5):
        (copy / f"shard-{number:06d}.safetensors").unlink()
        (copy / f"shard-{number:06d}.json").unlink()
    rows = range(3 * WINDOW, 4 * WINDOW)
    assert data.latents(rows).shape == (WINDOW, 8, 8, 8) and len(data.condition(rows)) == len(data.captions(rows)) == 8


def test_prompts_alone_have_text_and_no_pictures(tiny_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red star\na photo of two rings\n")
    data = cached(prompts, tiny_model, tmp_path / "cache")
    assert not data.has_pictures and data.captions([1]) == ["a photo of two rings"]
    assert data.latents([0, 1]).shape == (2, 8, 8, 8) and not data.latents([0]).any()
    assert len(data.condition([0, 1])) == 2


def test_buckets_keep_aspect_ratios(any_aspect: Path, tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    shapes = [(64, 64), (128, 80), (60, 96), (64, 64), (40, 100)]  # width, height
    for index, shape in enumerate(shapes * 4):
        Image.new("RGB", shape, "red").save(source / f"{index:02d}.png")
        (source / f"{index:02d}.txt").write_text("a red square")
    data = cached(source, any_aspect, tmp_path / "cache", buckets=True)
    counts = {name: sum(count for _, count in spans) for name, spans in data.buckets.items()}
    assert counts == {"48x80": 4, "64x64": 8, "80x48": 8}
    for name, spans in data.buckets.items():
        height, width = map(int, name.split("x"))
        for first, count in spans:
            assert data.latents(range(first, first + count)).shape == (count, 8, height // 8, width // 8)
    shapes_drawn = set()
    for step in range(12):
        rows = data.batch_rows(step, range(4), 4, seed=1)
        shapes_drawn.add(tuple(data.latents(rows).shape))  # rows of one shape, or this fails
    assert len(shapes_drawn) == len(counts)
    with pytest.raises(UserError, match="square pictures of one size only"):
        cached(source, tiny_model, tmp_path / "square", buckets=True)


def test_bucket_sizes_fit_the_model_and_the_area(any_aspect: Path) -> None:
    backbone = load_backbone(str(any_aspect))
    sizes = bucket_sizes(backbone, 512)
    assert (512, 512) in sizes and len(sizes) > 8
    for height, width in sizes:
        assert 0.75 * 512**2 < height * width <= 512**2 and 0.5 <= height / width <= 2
        assert backbone.latent_shape((height, width))
        assert nearest(sizes, height, width) == (height, width)
    assert nearest(sizes, 1000, 100) == max(sizes, key=lambda s: s[0] / s[1])


# -- Which rows a step takes -------------------------------------------------------------------------------------------


def test_one_bucket_is_one_shuffled_stream() -> None:
    for step in (0, 3, 11):
        assert batch_rows([10], step, range(4), 4, 7) == (0, [data_row(4 * step + row, 10, 7) for row in range(4)])
    epoch = [data_row(i, 10, 7) for i in range(10)]
    assert sorted(epoch) == list(range(10)) and epoch != [data_row(10 + i, 10, 7) for i in range(10)]


def test_buckets_get_batches_in_proportion_and_leave_nothing_out() -> None:
    sizes, batch = [50, 3, 21], 4
    seen: list[Counter[int]] = [Counter() for _ in sizes]
    for step in range(74 * 40 // batch):  # forty epochs
        bucket, rows = batch_rows(sizes, step, range(batch), batch, seed=5)
        seen[bucket].update(rows)
        parts = [batch_rows(sizes, step, [row], batch, seed=5) for row in range(batch)]
        assert parts == [(bucket, [row]) for row in rows]  # whatever the micro-batch or process
    for size, counter in zip(sizes, seen, strict=True):
        assert set(counter) == set(range(size))
        assert min(counter.values()) >= 38 and max(counter.values()) <= 42


# -- Kills, workers, damage --------------------------------------------------------------------------------------------


def test_a_killed_cache_goes_on_and_ends_the_same(
    whole: Path, scene_folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    # One shard, then a wait in the middle of writing the next one, in which the process is killed.
    script = (
        "import time, apexflow.data.caching as c; c.WINDOW = 8\n"
        "save = c.save_file\n"
        "def slow(tensors, path):\n"
        "    save(tensors, path)\n"
        "    if 'shard-000001' in str(path): time.sleep(600)\n"
        "c.save_file = slow\n"
        "from apexflow.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "cache", scene_folder, "-o", folder, "--model", tiny_model]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("shard-000001*.partial")) and time.monotonic() < deadline:
        assert process.poll() is None, "the cache ended before it could be killed"
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "shard-000000.json").is_file() and not (folder / "cache.json").exists()
    written = (folder / "shard-000000.safetensors").stat().st_mtime_ns
    cached(scene_folder, tiny_model, folder)
    assert (folder / "shard-000000.safetensors").stat().st_mtime_ns == written  # not made again
    assert sorted(files(folder)) == sorted(files(whole))  # and no .partial is left
    assert verify(folder)["rows"] == 48
    for name, content in files(whole).items():
        if name.startswith("shard") and name.endswith("safetensors"):
            same, other = load_file(whole / name), load_file(folder / name)
            assert same.keys() == other.keys() and all(torch.equal(same[key], other[key]) for key in same), name
            assert len(content) == (folder / name).stat().st_size


def test_workers_share_the_shards_and_end_the_same(
    whole: Path, scene_folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder, backbone = tmp_path / "cache", load_backbone(str(tiny_model))
    job = (scene_folder, backbone, tiny_model, folder, CacheSettings())
    assert not make_cache(*job, rank=1, world=2)
    assert sorted(p.stem for p in folder.glob("shard-*.json")) == ["shard-000001", "shard-000003", "shard-000005"]
    assert make_cache(*job, rank=0, world=2)
    assert files(folder) == files(whole)


def test_damage_is_found_named_and_mended(whole: Path, copy: Path, scene_folder: Path, tiny_model: Path) -> None:
    assert verify(copy) == {"cache": str(copy), "shards": 6, "rows": 48}
    shard = copy / "shard-000002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000002\.safetensors differs from its checksum"):
        verify(copy)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000002\.safetensors is missing or truncated"):
        CachedSet(copy)
    cached(scene_folder, tiny_model, copy)
    assert files(copy) == files(whole)
    os.truncate(shard, 100)
    with pytest.raises(UserError, match="truncated"):
        CachedSet(copy)
    (copy / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged \(cache\.json"):
        CachedSet(copy)


def test_a_full_disk_keeps_the_shards_before(
    scene_folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        if "shard-000002" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(caching, "save_file", full)
        with pytest.raises(UserError, match=r"shard-000002.*No space left.*the same command then goes on"):
            cached(scene_folder, tiny_model, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert len(cached(scene_folder, tiny_model, tmp_path / "cache")) == 48


def test_too_many_unusable_records_stop_early_and_mended_data_are_read_anew(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for index, scene in enumerate(scenes(24)):
        render(scene.things).save(source / f"{index:02d}.png")
        (source / f"{index:02d}.txt").write_text(scene.caption if index > 0 else " ")
    with pytest.raises(UserError, match=r"1 of 8 records .*more than the share 0.05; first: .*00\.png: caption empty"):
        cached(source, tiny_model, tmp_path / "cache")
    (source / "00.txt").write_text("a red star")
    assert cached(source, tiny_model, tmp_path / "cache").captions([0]) == ["a red star"]
    (source / "00.txt").write_text(" ")
    data = cached(source, tiny_model, tmp_path / "borne", skip_limit=0.2)
    assert len(data) == 23 and data.index["skipped"] == {str(source / "00.png"): "caption empty"}


def test_a_folder_of_something_else_is_left_alone(scene_folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and holds no cache"):
        cached(scene_folder, tiny_model, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


# -- Another model, other data, other settings -------------------------------------------------------------------------


def change(model: Path, part: str, target: Path) -> Path:
    """A copy of a model with one part's weights changed."""
    shutil.copytree(model, target)
    path = next((target / part).glob("*.safetensors"))
    tensors = {name: tensor + 0.125 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def test_fingerprints_follow_weights_not_files(tiny_model: Path, tmp_path: Path) -> None:
    settings = load_backbone(str(tiny_model)).settings
    before = autoencoder_fingerprint(tiny_model), text_fingerprint(tiny_model, settings)
    other = Path(shutil.copytree(tiny_model, tmp_path / "split"))
    path = next((other / "vae").glob("*.safetensors"))
    tensors = sorted((name, tensor.clone()) for name, tensor in load_file(path).items())
    save_file(dict(tensors[:5]), path)
    save_file(dict(tensors[5:]), path.with_name("second.safetensors"))
    assert (autoencoder_fingerprint(other), text_fingerprint(other, settings)) == before
    backbone = load_backbone(str(tiny_model))
    with pytest.warns(UserWarning, match="longer than"):
        backbone.encode_prompts(["a red star " * 40])  # the tokenizer remembers how it cut and padded, and saves that
    (tmp_path / "used").mkdir()
    backbone.save(tmp_path / "used", backbone.settings)
    assert text_fingerprint(tmp_path / "used", settings) == before[1]
    assert autoencoder_fingerprint(change(tiny_model, "vae", tmp_path / "vae")) != before[0]
    assert text_fingerprint(change(tiny_model, "text_encoder", tmp_path / "text"), settings) != before[1]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="restore it"):
        autoencoder_fingerprint(other)


@pytest.mark.parametrize(("part", "named"), [("vae", "autoencoder"), ("text_encoder", "text encoder")])
def test_a_cache_of_another_model_is_refused(
    whole: Path, recipe_file: Path, tiny_model: Path, tmp_path: Path, part: str, named: str
) -> None:
    model = change(tiny_model, part, tmp_path / "other")
    with pytest.raises(UserError, match=f"another model's {named}: name that model"):
        start(load_recipe(recipe_file, [f"data.source={whole}", f"model={model}"]), resume=False)
    if part == "text_encoder":  # which is trained here, so the cached embeddings are not read
        start(load_recipe(recipe_file, [f"data.source={whole}", f"model={model}", "tuning.text_encoder=true"]), False)


def test_a_cache_with_other_settings_is_refused(
    whole: Path, copy: Path, recipe_file: Path, scene_folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"other settings .*size 64 instead of 32"):
        start(load_recipe(recipe_file, [f"data.source={whole}", "data.size=32"]), resume=False)
    with pytest.raises(UserError, match=r"other settings .*captions \[\] instead of \['txt'\]"):
        cached(scene_folder, tiny_model, copy, captions=("txt",))
    cached(scene_folder, tiny_model, tmp_path / "captions", text=False)
    with pytest.raises(UserError, match="text"):
        start(load_recipe(recipe_file, [f"data.source={tmp_path / 'captions'}"]), resume=False)


# -- Training reads it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["source", "cache"])
def test_training_on_a_finished_cache_equals_training_on_its_source_and_calls_no_encoder(
    whole: Path, recipe_file: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    direct = start(load_recipe(recipe_file, [f"output={tmp_path / 'direct'}"]), resume=False)
    expected = [training_step(direct) for _ in range(2)]
    kind = type(direct.backbone)

    def never(*_: object) -> None:
        raise AssertionError("an encoder was called")

    monkeypatch.setattr(kind, "encode_prompts", never)
    monkeypatch.setattr(kind, "encode_images", never)
    recipe = tmp_path / "cached.yaml"
    recipe.write_text(recipe_file.read_text().replace("source: ", "source_was: ").replace("data: {", "#"))
    overrides = [f"data.{key}={whole}", f"output={tmp_path / 'cached'}"]
    run = start(load_recipe(recipe, overrides), resume=False)
    assert [training_step(run) for _ in range(2)] == expected


def test_buckets_train(any_aspect: Path, recipe_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for index in range(12):
        Image.new("RGB", (64, 64) if index % 3 else (64, 128), "red").save(source / f"{index}.png")
        (source / f"{index}.txt").write_text("a red square")
    overrides = [f"data.source={source}", "data.buckets=true", f"model={any_aspect}"]
    run = start(load_recipe(recipe_file, overrides), resume=False)
    shapes = set()
    for _ in range(5):
        shapes.add(tuple(make_batch(run, torch.arange(4)).x.shape[1:]))
        training_step(run)
    assert len(shapes) == 2 and run.bad == 0


def test_prompts_alone_train_what_starts_from_noise_and_nothing_else(recipe_file: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red star\na photo of two rings\n" * 4)
    source = f"data.source={prompts}"
    both = ["objective.share=1", "objective.path_rows=all"]
    for index, objective in enumerate((["objective.path_weight=0"], both)):
        run = start(load_recipe(recipe_file, [source, *objective, f"output={tmp_path / str(index)}"]), resume=False)
        first = training_step(run)
        # No picture is read: the losses are the same whatever stands in their place.
        other = start(load_recipe(recipe_file, [source, *objective, f"output={tmp_path / f'x{index}'}"]), resume=False)
        other.data.latents = lambda rows: torch.full((len(rows), 8, 8, 8), 1e3)  # type: ignore[method-assign]
        second = training_step(other)
        assert first["loss"] == second["loss"] and first["grad_norm"] == second["grad_norm"]
    for overrides in ([], ["method=flow_matching"], ["objective.path_velocity=sample", *both]):
        with pytest.raises(UserError, match=r"prompts alone.*starts from pictures.*apexflow synthesize"):
            start(load_recipe(recipe_file, [source, *overrides, f"output={tmp_path / 'no'}"]), resume=False)


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, True),
        ({"path_weight": 0.0}, False),
        ({"share": 1.0, "path_rows": "all"}, False),
        ({"share": 1.0, "path_rows": "all", "path_velocity": "sample"}, True),
        ({"path_weight": 0.0, "path_velocity": "sample"}, False),
        ({"share": 1.0, "path_rows": "all", "endpoint_weight": 0.0}, True),
        ({"path_weight": 0.0, "pairing": "printed"}, True),
    ],
)
def test_which_readings_need_pictures(fields: dict, needs: bool) -> None:
    assert APEX(**fields).needs_pictures is needs
