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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from little_shards import WINDOW, cached, files
from PIL import Image
from safetensors.torch import load_file, save_file

from apexflow.backbones import load_backbone
from apexflow.data import files as cache_files
from apexflow.data.buckets import bucket_sizes, nearest
from apexflow.data.cache import CachedSet, verify
from apexflow.data.caching import CacheSettings, make_cache
from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.order import batch_rows, data_row
from apexflow.data.pictures import to_tensor
from apexflow.data.scenes import render, scenes
from apexflow.data.workers import Share
from apexflow.devices import worker_device
from apexflow.errors import UserError
from apexflow.progress import console

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
    with pytest.raises(UserError, match="square pictures only"):
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
        "import time, apexflow.data.caching as c, apexflow.data.files as f; c.WINDOW = 8\n"
        "save = f.save_file\n"
        "def slow(tensors, path):\n"
        "    save(tensors, path)\n"
        "    if 'shard-000001' in str(path): time.sleep(600)\n"
        "f.save_file = slow\n"
        "from apexflow.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "cache", scene_folder, "-o", folder, "--model", tiny_model]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob(".shard-000001*.partial")) and time.monotonic() < deadline:
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
    assert not make_cache(*job, Share(1, 2))
    assert sorted(p.stem for p in folder.glob("shard-*.json")) == ["shard-000001", "shard-000003", "shard-000005"]
    assert make_cache(*job, Share(0, 2))
    assert files(folder) == files(whole)


def test_under_torchrun_the_first_process_waits_for_the_others(
    whole: Path, scene_folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (scene_folder, load_backbone(str(tiny_model)), tiny_model, tmp_path / "cache", CacheSettings())
    waited: list[bool] = []

    def second(seconds: float) -> None:
        waited.append(make_cache(*job, Share(1, 2, together=True)))

    monkeypatch.setattr("apexflow.data.workers.time.sleep", second)
    assert make_cache(*job, Share(0, 2, together=True)) and len(waited) == 1
    assert files(tmp_path / "cache") == files(whole)


def test_processes_that_finish_together_leave_each_others_files_alone(
    whole: Path, scene_folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (scene_folder, load_backbone(str(tiny_model)), tiny_model, tmp_path / "cache", CacheSettings())
    make_cache(*job, Share(1, 2))
    waits, others = Event(), list[Future[bool]]()
    monkeypatch.setattr(console, "print", lambda text: waits.set())

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        """As the first writes the last tensors, the second comes to its end, or to where it waits for the first."""
        save_file(tensors, path)
        if path.name.startswith(".null") and not others:
            others.append(pool.submit(make_cache, *job, Share(1, 2)))
            while not (others[0].done() or waits.is_set()):
                time.sleep(0.01)

    monkeypatch.setattr(cache_files, "save_file", slow)
    with ThreadPoolExecutor(1) as pool:
        assert make_cache(*job, Share(0, 2))
    assert others[0].result() and files(tmp_path / "cache") == files(whole)


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert worker_device("auto") == torch.device("cuda", 0) and worker_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="this machine has 1 GPUs: start torchrun with --nproc-per-node=1"):
        worker_device("cuda")
    assert worker_device("cuda:0") == torch.device("cuda", 0)


def test_damage_is_found_named_and_mended(whole: Path, copy: Path, scene_folder: Path, tiny_model: Path) -> None:
    assert verify(copy) == {"cache": str(copy), "shards": 6, "rows": 48}
    shard = copy / "shard-000002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000002\.safetensors differs from its checksum"):
        verify(copy)
    for number, content in ((3, None), (4, (copy / "shard-000004.json").read_text().replace("red", "blue"))):
        beside = copy / f"shard-00000{number}.json"
        before = beside.read_text()
        beside.write_text(content) if content else beside.unlink()
        shutil.copy(whole / shard.name, shard)
        with pytest.raises(UserError, match=rf"shard-00000{number}\.json differs from its checksum"):
            verify(copy)
        beside.write_text(before)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000002\.safetensors is missing or truncated"):
        CachedSet(copy)
    cached(scene_folder, tiny_model, copy)
    assert files(copy) == files(whole)
    (copy / "null.safetensors").unlink()
    for read in (CachedSet, verify):
        with pytest.raises(UserError, match=r"null\.safetensors is missing\): make it again .*apexflow cache"):
            read(copy)
    cached(scene_folder, tiny_model, copy)
    assert files(copy) == files(whole)
    os.truncate(shard, 100)
    with pytest.raises(UserError, match="truncated"):
        CachedSet(copy)
    (copy / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged \(cache\.json"):
        CachedSet(copy)


def test_a_cache_without_checksums_of_its_captions_gets_them(
    whole: Path, copy: Path, scene_folder: Path, tiny_model: Path
) -> None:
    index = json.loads((copy / "cache.json").read_text())
    for entry in index["shards"]:
        del entry["captions"]
    (copy / "cache.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match=r"is an older one without checksums of its captions: delete cache\.json and make"
    ):
        verify(copy)
    (copy / "cache.json").unlink()
    made = (copy / "shard-000000.json").stat().st_mtime_ns
    cached(scene_folder, tiny_model, copy)
    assert files(copy) == files(whole) and (copy / "shard-000000.json").stat().st_mtime_ns == made


@pytest.mark.parametrize("field", ["made_by", "pictures", "latent_shapes", "null", "shards", "rows"])
@pytest.mark.parametrize("value", [1.5, {}])
def test_a_damaged_index_is_named(copy: Path, field: str, value: object) -> None:
    index = json.loads((copy / "cache.json").read_text())
    (copy / "cache.json").write_text(json.dumps(index | {field: value}))
    with pytest.raises(UserError, match=r"is damaged \(cache\.json"):
        CachedSet(copy)


def test_a_damaged_sidecar_is_named_and_made_anew(
    whole: Path, copy: Path, scene_folder: Path, tiny_model: Path
) -> None:
    beside = copy / "shard-000001.json"
    record = json.loads(beside.read_text())
    beside.write_text(json.dumps({key: value for key, value in record.items() if key != "rows"}))
    with pytest.raises(UserError, match=r"is damaged \(shard-000001\.json: lacks rows\)"):
        CachedSet(copy).captions([WINDOW])
    cached(scene_folder, tiny_model, copy)
    assert files(copy) == files(whole)


def test_a_damaged_claim_is_named(copy: Path, scene_folder: Path, tiny_model: Path) -> None:
    (copy / "cache.json").unlink()
    (copy / "made-by.json").write_text("[]")
    with pytest.raises(UserError, match=r"made-by\.json cannot be read"):
        cached(scene_folder, tiny_model, copy)


def test_a_full_disk_keeps_the_shards_before(
    scene_folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        if "shard-000002" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(cache_files, "save_file", full)
        with pytest.raises(UserError, match=r"shard-000002.*No space left.*run the same command to resume"):
            cached(scene_folder, tiny_model, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert len(cached(scene_folder, tiny_model, tmp_path / "cache")) == 48


def pictures(folder: Path, bad: tuple[int, ...]) -> Path:
    """24 captioned pictures, some of them with an empty caption."""
    folder.mkdir()
    for index, scene in enumerate(scenes(24)):
        render(scene.things).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(" " if index in bad else scene.caption)
    return folder


def test_too_many_unusable_records_stop_early_and_mended_data_are_read_anew(tiny_model: Path, tmp_path: Path) -> None:
    source, folder = pictures(tmp_path / "pictures", (8, 10)), tmp_path / "cache"
    with pytest.raises(
        UserError, match=r"2 of 24 records .*more than the limit of 0.05; first: .*08\.png: caption empty"
    ):
        cached(source, tiny_model, folder)
    kept = {path.name for path in folder.glob("shard-*")}  # the one that skipped is forgotten, the last was never made
    assert kept == {"shard-000000.json", "shard-000000.safetensors"}
    (source / "08.txt").write_text("a red star")
    (source / "10.txt").write_text("a red star")
    assert cached(source, tiny_model, folder).captions([8]) == ["a red star"]
    (source / "00.txt").write_text(" ")
    data = cached(source, tiny_model, tmp_path / "borne", skip_limit=0.2)
    assert len(data) == 23 and data.index["skipped"] == {str(source / "00.png"): "caption empty"}


@pytest.mark.parametrize("bad", [(0,), (23,), (0, 1), (22, 23), (0, 23)])
def test_what_is_borne_depends_on_no_order_and_no_number_of_processes(
    tiny_model: Path, tmp_path: Path, bad: tuple[int, ...]
) -> None:
    source, backbone = pictures(tmp_path / "pictures", bad), load_backbone(str(tiny_model))
    for world in (1, 3):
        folder, verdicts = tmp_path / str(world), list[bool | str]()
        for rank in range(world):
            try:
                verdicts.append(make_cache(source, backbone, tiny_model, folder, CacheSettings(), Share(rank, world)))
            except UserError as error:
                verdicts.append(str(error).partition(" of ")[0])
        assert (folder / "cache.json").is_file() == (len(bad) == 1)  # 1 of 24 lies below the share 0.05, 2 above it
        assert "2" in verdicts if len(bad) == 2 else verdicts[-1] is True


def test_a_set_that_is_refused_leaves_the_shards_of_other_processes(tiny_model: Path, tmp_path: Path) -> None:
    source, folder = pictures(tmp_path / "pictures", (0, 1, 8)), tmp_path / "cache"
    job = (source, load_backbone(str(tiny_model)), tiny_model, folder, CacheSettings())
    make_cache(*job, Share(1, 3))
    (folder / "shard-000002.json").write_text("[")
    with pytest.raises(UserError, match="2 of 24 records"):
        make_cache(*job, Share(0, 3))
    assert {path.name for path in folder.glob("shard-*.json")} == {"shard-000001.json", "shard-000002.json"}


def test_a_folder_of_something_else_is_left_alone(scene_folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a cache"):
        cached(scene_folder, tiny_model, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
