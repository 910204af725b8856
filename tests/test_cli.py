"""The command line as a user meets it: every command does its work, and never over what is there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from command_line import Run, generate, refused, write
from PIL import Image

import apexflow
from apexflow.cli import app
from apexflow.data.captioned import Skipped, read_captioned
from apexflow.data.command import listed
from apexflow.demo import demo_recipe, holds_demo
from apexflow.drawing import _write_each
from apexflow.evaluation.suites import SUITES
from apexflow.options import read_sides, show
from apexflow.training.config import short_recipe


def test_generate_writes_the_same_picture_for_the_same_seed(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        code, out, _ = run(
            "generate", "a photo of a red star", "--model", tiny_model, "--steps", 1, "-o", tmp_path / name, "--json"
        )
        assert code == 0 and json.loads(out)["evaluations"] == 2  # the tiny model's own guidance takes two
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    run("generate", "a photo of a red star", "--model", tiny_model, "--steps", 1, "--seed", 1, "-o", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(
    ("prompt", "warns"),
    [("zebra xylophone", True), ("", True), (" ", True), ("红星 !", True), ("a red star " * 400, True)],
)
def test_odd_prompts_still_give_a_picture(run: Run, tiny_model: Path, tmp_path: Path, prompt: str, warns: bool) -> None:
    code, _, errors = run("generate", prompt, "--model", tiny_model, "--steps", 1, "-o", tmp_path / "o.png")
    assert code == 0 and Image.open(tmp_path / "o.png").size == (64, 64)
    assert ("warning" in errors) == warns


@pytest.mark.parametrize("name", ["drawn", "drawn.png/"])
def test_a_folder_gets_a_picture_of_each_that_reads_back_as_a_set(
    run: Run, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    folder, prompts = tmp_path / name, ["a red star", "a blue ring"]
    common = ("generate", *prompts, "--model", tiny_model, "--steps", 1, "--count", 2)
    code, out, _ = run(*common, "-o", f"{tmp_path}/{name}", "--json")
    files = [folder / f"{number:04d}.png" for number in range(4)]
    assert code == 0 and json.loads(out)["files"] == [str(file) for file in files]
    captions = [record.caption for record in read_captioned(folder, Skipped())]
    assert captions == [prompt for prompt in prompts for _ in range(2)]
    assert run(*common, "-o", tmp_path / "grid.png")[0] == 0
    grid = Image.open(tmp_path / "grid.png")
    for number, file in enumerate(files):
        corner = (66 * (number % 2), 66 * (number // 2))
        assert grid.crop((*corner, corner[0] + 64, corner[1] + 64)).tobytes() == Image.open(file).tobytes()
    before = files[0].read_bytes()
    again = ("generate", "a star", "--model", tiny_model, "--steps", 1, "--seed", 9, "-o", f"{tmp_path}/{name}")
    refused(run(*again), "exists", "--force")
    assert files[0].read_bytes() == before
    code, _, errors = run(*again, "--force")
    assert code == 0 and files[0].read_bytes() != before
    assert errors.count("\n") == 1 and "3 pictures of an earlier call, from 0001.png on" in errors and files[1].exists()
    assert len(list(read_captioned(folder, Skipped()))) == 1


def test_a_stop_in_overwriting_a_folder_leaves_no_caption_of_an_earlier_picture(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0000.png", "text": "an earlier one"}\n')
    with pytest.raises(KeyboardInterrupt):
        _write_each([Image.new("RGB", (4, 4)), Stopping()], ["a star", "a star"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0000.png"]


class Stopping:
    """A picture at whose writing the user asks for a stop."""

    def save(self, *_: object, **__: object) -> None:
        raise KeyboardInterrupt


def test_a_size_is_one_side_or_width_and_height(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = copytree(tiny_model, tmp_path / "m")
    config = model / "transformer" / "config.json"
    write(config, json.dumps(json.loads(config.read_text()) | {"interpolation_scale": None}))  # no square of positions
    for size, sides in (("64", (64, 64)), ("64x96", (64, 96)), ("96X64", (96, 64))):
        assert generate(run, model, "--size", size, "-o", tmp_path / "o.png")[0] == 0
        assert Image.open(tmp_path / "o.png").size == sides
    refused(generate(run, model, "--size", "96x65", "-o", tmp_path / "o.png"), "size 96x65", "multiples")
    assert read_sides("64x64") == read_sides("64") == 64 and read_sides("768x512") == (512, 768)


@pytest.mark.parametrize("size", ["x", "64x", "x64", "64x64x64", "64,64", "0x64", "64x8193", "-64", "6" * 5000, "٦٤x"])
def test_a_size_that_is_none_is_told(run: Run, size: str) -> None:
    for command in (("generate", "a star"), ("synthesize", "prompts.txt", "-o", "never")):
        refused(run(*command, "--model", "none", "--size", size), f"--size is '{size[:80]}", "WIDTHxHEIGHT", "8192")


def test_scenes_evaluate_and_train_speak_json(run: Run, tiny_model: Path, recipe_file: Path, tmp_path: Path) -> None:
    code, out, _ = run("data", "scenes", tmp_path / "d", "--count", 5, "--json")
    assert code == 0 and json.loads(out)["scenes"] == 5
    code, out, _ = run("evaluate", "--model", tiny_model, "--steps", 1, "--limit", 12, "--per-prompt", 2, "--json")
    report = json.loads(out)
    assert code == 0 and report["complete"] is False and set(report["tasks"]) and report["diversity"] > 0
    code, out, _ = run("train", recipe_file, "steps=1", "--json")
    told = json.loads(out)
    assert code == 0 and Path(told["report"]).is_file() and told["cost"]["steps"] == 1 and told["cost"]["peak_gib"] > 0


def test_compare_takes_a_recipe_and_speaks_json(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    few = ["--images", 4, "--nfe", "1", "--rates", "1e-4", "--seeds", 1, "--per-prompt", 1, "--limit", 2]
    few += ["--runs", 2]
    folder = tmp_path / "compared"
    code, output, errors = run("compare", "flow_matching", "-o", folder, "--recipe", recipe_file, *few, "--json")
    assert code == 0, errors
    result = json.loads(output)
    assert result["rows"]["flow_matching"]["budgets"]["images"]["images"] == 4
    assert [run["seed"] for run in result["rows"]["flow_matching"]["runs"]] == [0, 1]
    assert Path(result["report"]).is_file() and (folder / "results.md").is_file()


def test_compare_under_torchrun_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(run("compare", "-o", tmp_path / "compared"), "one process", "torchrun")
    assert not (tmp_path / "compared").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["flow-matching"], ("unknown method 'flow-matching'", "did you mean 'flow_matching'")),
        (["apex", "--nfe", "one"], ("--nfe", "'one'")),
        (["apex", "--runs", "0"], ("--runs", "greater than")),
        (["apex", "--rates", "0"], ("rates", "above 0")),
        (["apex", "--rates", "nan"], ("rates", "finite")),
        (["apex", "--recipe", "nowhere.yaml"], ("nowhere.yaml", "cannot be read")),
    ],
    ids=str,
)
def test_a_comparison_that_cannot_be(run: Run, tmp_path: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    refused(run("compare", *arguments, "-o", tmp_path / "compared"), *words)
    assert not (tmp_path / "compared").exists()


def test_help_of_every_command(run: Run) -> None:
    names = [str(one.name or one.callback.__name__) for one in app.registered_commands if one.callback]
    assert {"generate", "train", "evaluate", "compare", "synthesize", "cache", "export", "bench", "plan", "demo"} <= {
        *names
    }
    for command in ([], ["data"], ["data", "scenes"], *([name] for name in names)):
        code, out, _ = run(*command, "--help")
        assert code == 0 and "Usage" in out
        assert command in ([], ["data"], ["convert-detector"]) or "--json" in out
    told = "".join(run("evaluate", "--help")[1].replace("│", "").split())  # lines may break within a name
    assert all(name in told for name in SUITES)


def test_no_command_at_all_shows_what_there_is(run: Run) -> None:
    code, output, errors = run()
    assert code == 2 and "generate" in output + errors and "Traceback" not in errors


def test_the_version_is_told(run: Run) -> None:
    assert run("--version")[:2] == (0, f"{apexflow.__version__}\n")


def test_the_package_is_the_command(run: Run) -> None:
    code, out, _ = run("--help")
    module = subprocess.run([sys.executable, "-m", "apexflow", "--help"], capture_output=True, text=True)
    assert code == module.returncode == 0 and "Usage: apexflow [OPTIONS] COMMAND" in out
    assert module.stdout == out
    module = subprocess.run([sys.executable, "-m", "apexflow", "nothing"], capture_output=True, text=True)
    refused((module.returncode, module.stdout, module.stderr), "No such command 'nothing'")


# -- Outputs ------------------------------------------------------------------------------------------------------------


def test_an_existing_output_is_never_overwritten(run: Run, recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert run("train", recipe_file, "steps=1")[0] == 0
    refused(run("train", recipe_file, "steps=1"), "exists", "--resume")
    write(tmp_path / "mine.txt", "mine")
    refused(run("train", recipe_file, "--resume", f"output={tmp_path}"), str(tmp_path), "is not the output of a run")
    picture = write(tmp_path / "o.png", "mine")
    refused(run("generate", "a star", "--model", tiny_model, "-o", picture), "o.png", "--force")
    assert picture.read_text() == "mine"
    (tmp_path / "folder.png").mkdir()
    refused(
        run("generate", "a star", "--model", "no-such-model", "-o", tmp_path / "folder.png", "--force"), "is a folder"
    )
    refused(run("data", "scenes", tmp_path), "exists")
    refused(run("demo", "-o", tmp_path), "exists", "--force")
    taken = tmp_path / "scores"
    (taken / "seed-0").mkdir(parents=True)
    write(taken / "seed-0" / "mine.txt", "mine")
    refused(run("evaluate", "--model", tiny_model, "-o", taken, "--limit", 1, "--steps", 1), "seed-0", "exists")


COMMANDS = {
    "generate": ("a star", "--steps", 1),
    "evaluate": ("--limit", 1, "--steps", 1),
    "cache": ("SCENES",),
    "synthesize": ("SCENES", "--steps", 1),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_the_way_and_a_device_that_is_not_there_are_named(
    run: Run, tiny_model: Path, scene_folder: Path, tmp_path: Path, command: str
) -> None:
    file = write(tmp_path / "file", "mine")
    given = [str(scene_folder) if word == "SCENES" else word for word in COMMANDS[command]]
    common = (command, *given, "--model", tiny_model)
    refused(run(*common, "-o", file / "o.png"), "cannot write", "file")
    refused(run(*common, "-o", tmp_path / "o.png", "--device", "gpu"), "unknown device 'gpu'", "cuda")
    refused(run(*common, "-o", tmp_path / "o.png", "--size", 0), "--size")
    if command != "cache":
        refused(run(*common, "-o", tmp_path / "o.png", "--guidance", "nan"), "guidance is nan")
    assert file.read_text() == "mine"


def test_other_outputs_that_cannot_be(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "file", "mine")
    refused(run("data", "scenes", file), "cannot write", "file")
    refused(run("data", "scenes", file / "below"), "cannot write", "file")
    refused(run("data", "scenes", tmp_path / "s", "--seed", -1), "--seed")
    refused(run("train", recipe_file, "steps=1", f"output={file}"), "cannot write", "file")
    refused(run("generate", "a star", "-o", tmp_path / "picture.gif"), "picture.gif", ".png", "folder")
    refused(run("generate", "a star", "-o", file), "cannot write", "file")
    refused(run("demo", "-o", file), "cannot write", "file")
    refused(run("compare", "apex", "-o", file), "cannot write", "file")
    refused(run("demo", "-o", tmp_path / "d", "--minutes", -1), "--minutes")
    for endless in ("inf", "nan"):
        refused(run("demo", "-o", tmp_path / "d", "--minutes", endless), "--minutes")
    refused(run("cache", tmp_path, "--verify"), "no finished cache")
    refused(run("demo", "-o", tmp_path, "--force"), "delete")  # not a run: --force does not remove it
    assert file.read_text() == "mine"


LONG = "a photo of a red star left of a blue ring, " * 10


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "a star", "-o", f"{LONG}.png"),
        ("generate", "a star", "--model", LONG),
        ("export", LONG, "-o", "o"),
        ("compare", "apex", "-o", LONG),
        ("evaluate", "--images", LONG),
    ],
    ids=lambda command: command[0],
)
def test_a_text_in_the_place_of_a_path_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run(*command), f"cannot use '{LONG[:80]}…'", "too long", "check the path")
    assert not list(tmp_path.iterdir())


def test_a_demo_replaces_an_earlier_one_and_no_other_run(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder / "recipe.json", json.dumps(short_recipe("run", objective={}).to_dict()))
    refused(run("demo", "-o", folder, "--force"), "something other than a demo")
    assert (folder / "recipe.json").is_file()
    write(folder / "recipe.json", json.dumps(demo_recipe(tmp_path / "moved", 2.0).to_dict()))
    assert holds_demo(folder)


def test_a_demo_through_a_link_deletes_nothing(run: Run, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    write(earlier / "recipe.json", "{}")
    (tmp_path / "link").symlink_to(earlier)
    refused(run("demo", "-o", tmp_path / "link", "--force"), "is a link", str(earlier))
    assert (earlier / "recipe.json").is_file() and (tmp_path / "link").is_symlink()


def test_what_would_steer_a_terminal_is_shown_as_it_is_written(
    run: Run, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Strangers name the files of a set, and the kind of a model."""
    write(tmp_path / "\x1b[2Jname\n.png", "no picture")
    code, _, errors = run("cache", tmp_path, "-o", tmp_path / "c", "--model", tiny_model)
    assert code == 2 and "\\x1b[2Jname\\n.png" in errors and "\x1b" not in errors and len(errors.splitlines()) == 1
    assert listed({"\x1b[2Jname\n": "picture missing"}) == "\n  \\x1b[2Jname\\n: picture missing"
    show({}, False, "one line\nand \u202eanother \x9b \ud800 \N{SNOWMAN}\xa0")
    assert capsys.readouterr().out == "one line\nand \\u202eanother \\x9b \\ud800 \N{SNOWMAN}\xa0\n"


def test_a_narrow_output_loses_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr("sys.stdout", narrow)
    show({}, False, "caf\xe9 \N{BLACK STAR}.png: written")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"caf\xe9 \\u2605.png: written\n"  # type: ignore[attr-defined]


def test_a_full_disk_leaves_the_earlier_picture(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = write(tmp_path / "o.png", "mine")

    def full(image: Image.Image, path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    refused(
        run("generate", "a star", "--model", tiny_model, "--steps", 1, "-o", picture, "--force"), "No space", "o.png"
    )
    assert picture.read_text() == "mine" and list(tmp_path.iterdir()) == [picture]


def test_a_network_is_kept_as_asked(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    refused(run("generate", "a star", "--storage", "int2", "-o", tmp_path / "o.png"), "int2", "fp8 or nf4")
    assert generate(run, tiny_model, "--storage", "fp8", "-o", tmp_path / "o.png")[0] == 0


# -- Export ------------------------------------------------------------------------------------------------------------


def test_a_run_is_exported(run: Run, recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    refused(run("export", tmp_path / "run", "-o", tmp_path / "early"), "not found")
    assert run("train", recipe_file, "steps=1", "tuning.kind=lora", "tuning.rank=2")[0] == 0
    code, out, _ = run("export", tmp_path / "run", "-o", tmp_path / "lora", "--json")
    assert code == 0 and json.loads(out)["kind"] == "lora"
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert str(tiny_model) in (tmp_path / "lora" / "README.md").read_text()
    code, out, _ = run("export", tmp_path / "run", "--merge", "--scheduler", "any-step", "-o", tmp_path / "whole")
    assert code == 0 and "README.md" in out
    assert generate(run, tmp_path / "whole", "-o", tmp_path / "o.png")[0] == 0
    assert run("export", tmp_path / "run" / "model", "-o", tmp_path / "copy", "--scheduler", "original")[0] == 0
    refused(run("export", tmp_path / "run", "-o", tmp_path / "lora"), "exists")
    refused(run("export", tmp_path / "run", "-o", tmp_path / "x", "--scheduler", "euler"), "euler", "any-step")


# -- Plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_fits_and_what_to_switch_on(run: Run, recipe_file: Path) -> None:
    code, out, _ = run("plan", recipe_file, "--tokens", 8, "--json")
    result = json.loads(out)
    assert code == 0 and result["fits"] and result["switch_on"] == [] and result["peak_gib"] < 3
    assert set(result["parts_gib"]) >= {"trained weights", "optimizer", "activations", "allowance"}
    code, out, _ = run("plan", recipe_file, "batch=4", "--tokens", 8, "--memory", 0.5)
    assert code == 0 and "does not fit" in out and "tuning.checkpointing=true" in out and "larger GPUs" in out
    assert "rows" in out and "of a run's rows" not in out  # said of several sets alone
    refused(run("plan", recipe_file, "model=someone/else"), "someone/else", "folder")
    refused(run("plan", recipe_file, "data.size=50"), "50")
    refused(run("plan", recipe_file, "batch=1"), "batch 1 is too small", "path objective")
    refused(run("plan", recipe_file, "--tokens", 10**8), "--tokens is 100000000", "at most")


@pytest.mark.parametrize("memory", ["inf", "nan", "1e300"])
def test_a_plan_is_made_for_a_memory_that_can_be(run: Run, recipe_file: Path, memory: str) -> None:
    refused(run("plan", recipe_file, "--memory", memory), "--memory")


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_says_what_the_plan_says(
    run: Run, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise kind("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("apexflow.training.loop.training_step", full)
    refused(run("train", recipe_file), "out of memory", "apexflow plan", "GiB", "tuning.checkpointing=true")
    monkeypatch.setattr("apexflow.generator.noise", full)
    refused(run("generate", "a star", "-o", recipe_file.parent / "o.png"), "out of memory", "fewer or smaller")


def test_out_of_memory_is_said_of_a_model_that_cannot_be_planned(
    run: Run, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("apexflow.training.loop.train", full)
    refused(run("train", recipe_file, "model=someone/else"), "out of memory", "micro_batch", "'someone/else'")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_rank_above_every_matrix_is_refused_before_anything_is_built(
    run: Run, recipe_file: Path, tmp_path: Path, command: str
) -> None:
    asked = run(command, recipe_file, "tuning.kind=lora", "tuning.rank=1000000")
    refused(asked, "tuning.rank is 1000000", "tuning.rank=32 or less")
    assert not (tmp_path / "run").exists()


def test_a_shift_that_the_model_cannot_see_and_a_side_that_it_cannot_take(run: Run, recipe_file: Path) -> None:
    refused(run("train", recipe_file, "data.size=50"), "50", "multiples")
    refused(run("train", recipe_file, "tuning.storage=fp8"), "tuning.storage", "tuning.kind=lora")


def test_threads_are_told_not_to_spin_before_torch_is_there() -> None:
    lines = (
        "import os, sys",
        "from apexflow import cli",
        "sys.argv = ['apexflow', '--version']",
        "try: cli.main()",
        "except SystemExit: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)",
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=environment)
    assert done.stdout.split()[-2:] == ["1000", "False"], done.stderr
