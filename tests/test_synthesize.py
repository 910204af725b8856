"""A set drawn from a model: the same for the same seed, whatever was killed or shared, and read back like any other."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from threading import Event

import numpy as np
import pytest
import torch
from command_line import Run, refused
from safetensors.torch import save_file

from apexflow import cli, load
from apexflow.data import shards as shards_module
from apexflow.data import synthesize as module
from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.readers import kinds, recognise
from apexflow.data.synthesize import Synthesis, synthesize
from apexflow.data.workers import Share
from apexflow.errors import UserError
from apexflow.progress import console

PROMPTS = [f"a photo of a {color} {shape}" for color in ("red", "blue") for shape in ("star", "ring", "heart", "cross")]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 3)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def draw(prompts: Path, folder: Path, model: Path, rank: int = 0, world: int = 1, **settings: object) -> dict:
    chosen = Synthesis(**({"steps": 1, "guidance": 1.0} | settings))  # type: ignore[arg-type]
    return synthesize(prompts, folder, load(str(model), "cpu"), chosen, Share(rank, world))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.mark.parametrize("sampler", [{}, {"steps": 3, "kappa": 0.5, "rho": 0.4}, {"steps": 2, "order": 2}], ids=str)
def test_pictures_are_what_generate_draws_and_read_back_like_any_set(
    prompts: Path, tiny_model: Path, tmp_path: Path, sampler: dict[str, float]
) -> None:
    result = draw(prompts, tmp_path / "set", tiny_model, seed=5, **sampler)
    assert result["pictures"] == 8 and result["complete"] and len(shards(tmp_path / "set")) == 3
    assert recognise(tmp_path / "set").kind == kinds()["webdataset"]
    records = list(read_captioned(tmp_path / "set", Skipped()))
    assert [record.caption for record in records] == PROMPTS
    expected = load(str(tiny_model), "cpu").generate(PROMPTS, **({"steps": 1, "seed": 5, "guidance": 1.0} | sampler))
    for record, picture in zip(records, expected, strict=True):
        # Batches differ, and with them the last bits.
        assert np.abs(np.asarray(record.image, int) - np.asarray(picture, int)).max() <= 1


def test_workers_and_a_lost_shard_end_in_the_same_set(prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    draw(prompts, tmp_path / "whole", tiny_model)
    shared = tmp_path / "shared"
    first = draw(prompts, shared, tiny_model, 1, 2)
    assert not first["complete"] and list(shards(shared)) == ["pictures-000001.tar"]
    assert draw(prompts, shared, tiny_model, 0, 2)["complete"]
    assert shards(shared) == shards(tmp_path / "whole")
    (shared / "pictures-000001.tar").unlink()
    kept = (shared / "pictures-000000.tar").stat().st_mtime_ns
    draw(prompts, shared, tiny_model)
    assert shards(shared) == shards(tmp_path / "whole")
    assert (shared / "pictures-000000.tar").stat().st_mtime_ns == kept


def test_processes_that_meet_at_a_shard_write_it_one_after_the_other(
    prompts: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One works alone, one was started beside it as the second of two: the locks of their shares are not the same."""
    draw(prompts, tmp_path / "whole", tiny_model)
    folder, add, waits = tmp_path / "set", shards_module._add, Event()
    monkeypatch.setattr(console, "print", lambda text: waits.set())
    others = list[Future[dict]]()

    def slow(tar: object, name: str, content: bytes) -> None:
        """In the middle of a shard the second comes to its end, or to where it waits for the first."""
        add(tar, name, content)  # type: ignore[arg-type]
        if name == "0000004.png" and not others:
            others.append(pool.submit(draw, prompts, folder, tiny_model, 1, 2))
            while not (others[0].done() or waits.is_set()):
                time.sleep(0.01)

    monkeypatch.setattr(shards_module, "_add", slow)
    with ThreadPoolExecutor(1) as pool:
        assert draw(prompts, folder, tiny_model)["complete"]
    assert others[0].result() and shards(folder) == shards(tmp_path / "whole")
    assert not list(tmp_path.rglob(".*"))


def test_a_killed_set_goes_on_and_ends_the_same(prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    draw(prompts, tmp_path / "whole", tiny_model)
    folder = tmp_path / "killed"
    # The process is killed while the second shard is half written.
    script = (
        "import time, apexflow.data.shards as s, apexflow.data.synthesize as m; m.SHARD = 3\n"
        "add = s._add\n"
        "def slow(tar, name, content):\n"
        "    add(tar, name, content)\n"
        "    if name == '0000004.png': tar.fileobj.flush(); time.sleep(600)\n"
        "s._add = slow\n"
        "from apexflow.cli import main; main()"
    )
    options = ["--model", tiny_model, "--steps", "1", "--guidance", "1", "--device", "cpu"]
    command = [sys.executable, "-c", script, "synthesize", prompts, "-o", folder, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        not any(half.stat().st_size for half in folder.glob(".pictures-000001.tar.*")) and time.monotonic() < deadline
    ):
        assert process.poll() is None, "the set ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(shards(folder)) == ["pictures-000000.tar"]
    draw(prompts, folder, tiny_model)
    assert shards(folder).keys() == shards(tmp_path / "whole").keys()
    assert not list(folder.glob("*.partial"))
    again = [(r.caption, np.asarray(r.image, int)) for r in read_captioned(folder, Skipped())]
    whole = [(r.caption, np.asarray(r.image, int)) for r in read_captioned(tmp_path / "whole", Skipped())]
    assert len(again) == len(whole) == 8
    # The killed process may have had another number of threads, which moves the last bits.
    assert all(a == b and np.abs(x - y).max() <= 1 for (a, x), (b, y) in zip(again, whole, strict=True))


def test_a_set_knows_how_its_network_was_kept(run: Run, prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    common = ("synthesize", prompts, "-o", tmp_path / "set", "--model", tiny_model, "--steps", 1)
    refused(run(*common, "--storage", "int2"), "int2", "fp8 or nf4")
    assert run(*common, "--storage", "fp8")[0] == 0
    refused(run(*common), "made with other settings", "storage 'fp8'")


def test_a_set_of_a_model_with_a_lora_is_another_set(run: Run, prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    name, random = "transformer.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    sides = {"A": torch.randn(2, 32, generator=random), "B": torch.randn(32, 2, generator=random)}
    save_file({f"{name}.lora_{side}.weight": tensor for side, tensor in sides.items()}, tmp_path / "lora.safetensors")
    common = ("synthesize", prompts, "--model", tiny_model, "--steps", 1, "-o")
    lora = ("--lora", tmp_path / "lora.safetensors")
    assert run(*common, tmp_path / "set")[0] == run(*common, tmp_path / "added", *lora)[0] == 0
    assert shards(tmp_path / "set") != shards(tmp_path / "added")
    assert run(*common, tmp_path / "set", "--lora", f"{lora[1]}:0")[0] == 0  # the same model, so the same set
    refused(run(*common, tmp_path / "set", *lora), "made with other settings", "model ")


def test_other_settings_or_another_folder_are_refused(prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    draw(prompts, folder, tiny_model)
    before = shards(folder)
    others = {
        "seed": (1, 0),
        "steps": (2, 1),
        "guidance": (2.0, 1.0),
        "kappa": (0.3, 0.0),
        "rho": (0.3, 0.0),
        "order": (2, 1),
    }
    for name, (other, own) in others.items():
        with pytest.raises(UserError, match=f"made with other settings.*{name} {own}"):
            draw(prompts, folder, tiny_model, **{name: other})
    claim = folder / "synthesis.json"
    said = json.loads(claim.read_text())
    claim.write_text(json.dumps({key: value for key, value in said.items() if key not in ("kappa", "rho", "order")}))
    draw(prompts, folder, tiny_model)  # as of before sets named their sampler
    claim.write_text(json.dumps(said | {"rho": 1.0}))
    with pytest.raises(UserError, match=r"made with other settings.*rho 1"):
        draw(prompts, folder, tiny_model)
    claim.write_text(json.dumps(said))
    prompts.write_text("a star\n")
    with pytest.raises(UserError, match=r"made with other settings.*prompts"):
        draw(prompts, folder, tiny_model)
    assert shards(folder) == before
    (folder / "synthesis.json").write_text("[]")
    with pytest.raises(UserError, match=r"synthesis\.json cannot be read \(not a JSON object\)"):
        draw(prompts, folder, tiny_model)
    with pytest.raises(UserError, match="exists and is not a dataset"):
        draw(prompts, tmp_path, tiny_model)
    with pytest.raises(UserError, match="steps must be at least 1"):
        draw(prompts, tmp_path / "none", tiny_model, steps=0)
    with pytest.raises(UserError, match="multiples of"):
        draw(prompts, tmp_path / "none", tiny_model, size=50)


def test_a_set_of_oblong_pictures_goes_on(prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = copytree(tiny_model, tmp_path / "m")
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"interpolation_scale": None}))
    draw(prompts, tmp_path / "set", model, size=(64, 96))
    (tmp_path / "set" / "pictures-000001.tar").unlink()
    assert draw(prompts, tmp_path / "set", model, size=(64, 96))["complete"]
    images = [record.image for record in read_captioned(tmp_path / "set", Skipped())]
    assert [image and image.size for image in images] == [(96, 64)] * 8
    with pytest.raises(UserError, match=r"made with other settings \(size \[64, 96\]"):
        draw(prompts, tmp_path / "set", model, size=(96, 64))


def test_a_full_disk_keeps_the_shards_before(
    prompts: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = shards_module._add

    def full(tar: object, name: str, content: bytes) -> None:
        if name == "0000004.png":
            raise OSError(28, "No space left on device")
        add(tar, name, content)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_add", full)
        with pytest.raises(UserError, match=r"pictures-000001\.tar.*No space left"):
            draw(prompts, tmp_path / "set", tiny_model)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["pictures-000000.tar", "synthesis.json"]
    assert draw(prompts, tmp_path / "set", tiny_model)["pictures"] == 8


def test_pictures_that_are_not_finite_are_left_out_counted_and_listed(
    prompts: Path, tiny_model: Path, tmp_path: Path
) -> None:
    generator = load(str(tiny_model), "cpu")
    decode, drawn = generator.backbone.decode, []

    def broken_once(latents: torch.Tensor) -> torch.Tensor:
        images = decode(latents)
        if not drawn:
            images[1, 0, 3, 4] = math.nan
        drawn.extend(images)
        return images

    generator.backbone.decode = broken_once  # type: ignore[method-assign]
    folder, settings = tmp_path / "set", Synthesis(steps=1, guidance=1.0, skip_limit=0.3)
    with pytest.raises(
        UserError, match=r"1 of 3 pictures are not finite, more than the limit of 0\.3.*damaged or overflow"
    ):
        synthesize(prompts, folder, generator, settings)
    assert not shards(folder)
    drawn.clear()
    settings = replace(settings, skip_limit=0.4, seed=1)  # a folder without pictures may be taken for another set
    with pytest.warns(UserWarning, match="not finite"):
        result = synthesize(prompts, folder, generator, settings)
    assert result["pictures"] == 7 and result["complete"] and len(drawn) == 8
    assert result["skipped"] == {"prompts.txt:2": "the picture is not finite"}
    captions = [record.caption for record in read_captioned(folder, Skipped())]
    assert captions == PROMPTS[:1] + PROMPTS[2:]
    assert synthesize(prompts, folder, generator, settings) == result and len(drawn) == 8  # known to a later call


def test_a_broken_model_stops_at_once(prompts: Path, tiny_model: Path, tmp_path: Path) -> None:
    generator = load(str(tiny_model), "cpu")
    with torch.no_grad():
        next(generator.backbone.transformer.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="3 of 3 pictures are not finite"), pytest.warns(UserWarning):
        synthesize(prompts, tmp_path / "set", generator, Synthesis(steps=1, skip_limit=1.0))


@pytest.mark.parametrize("command", ["cache", "synthesize"])
def test_under_torchrun_the_first_process_alone_speaks(
    run: Run, prompts: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(console, "quiet", False)
    options = ("--model", tiny_model, *(("--steps", 1) if command == "synthesize" else ()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    alone = run(command, prompts, "-o", tmp_path / "alone", *options)
    assert alone[0] == 0 and "this process is done" in alone[1]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert run(command, prompts, "-o", tmp_path / "set", *options) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    code, out, _ = run(command, prompts, "-o", tmp_path / "set", *options, "--json")
    result = json.loads(out)
    assert code == 0 and result["complete"] and result["rows" if command == "cache" else "pictures"] == 8


def test_prompts_that_are_none_are_named(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('"a red star"\n{"prompt": " "}\n{"tag": 1}\n[\n"a blue ring"\n')
    with pytest.raises(UserError, match=r"3 of 5 records .*limit of 0\.5.*p\.jsonl:2: caption empty.*skip limit"):
        draw(path, tmp_path / "set", tiny_model, skip_limit=0.5)
    assert not (tmp_path / "set").exists()  # told before the first picture
    result = draw(path, tmp_path / "set", tiny_model, skip_limit=0.6)
    assert result["pictures"] == 2
    assert draw(path, tmp_path / "set", tiny_model, skip_limit=0.7) == result  # the limit is none of the set's settings
    assert result["skipped"].pop("p.jsonl:4").startswith("unreadable (")
    assert result["skipped"] == {"p.jsonl:2": "caption empty", "p.jsonl:3": "caption missing"}
    path.write_text("[" * 100_000 + '\n"a red star"\n')
    assert draw(path, tmp_path / "deep", tiny_model, skip_limit=0.5)["pictures"] == 1
    path.write_text('{"tag": 1}\n')
    with pytest.raises(UserError, match=r"no usable record .*p\.jsonl:1: caption missing; fix or remove"):
        draw(path, tmp_path / "empty", tiny_model)


def test_the_command_speaks_json_and_its_set_trains(
    prompts: Path,
    tiny_model: Path,
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["apexflow", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return capsys.readouterr().out

    call: Callable[..., str] = run
    options = ("--model", tiny_model, "--steps", 1, "--guidance", 1)
    out = call("synthesize", prompts, "-o", tmp_path / "set", *options, "--json")
    assert json.loads(out)["pictures"] == 8
    assert f"data.source={tmp_path / 'set'}" in call("synthesize", prompts, "-o", tmp_path / "set", *options)
    call("train", recipe_file, "steps=1", f"data.source={tmp_path / 'set'}")
    assert "Usage" in call("synthesize", "--help")
