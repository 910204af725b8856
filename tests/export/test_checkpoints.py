"""A checkpoint is handed over as its run would be if it had ended there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import Run, refused, write
from little_runs import assert_same
from safetensors.torch import load_file

from apexflow.backbones import load_backbone, second_time
from apexflow.errors import UserError
from apexflow.export import export
from apexflow.training import recall, roles
from apexflow.training.checkpoint import checkpoints
from apexflow.training.config import load_recipe
from apexflow.training.loop import train
from apexflow.training.recall import export_checkpoint

METHODS = ("apex", "meanflow")  # without and with a second time


@pytest.fixture(scope="module")
def ended(tiny_model: Path, scene_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a finished run, by its way of tuning and method, each trained once."""
    made: dict[tuple[str, str, str], Path] = {}

    def run(kind: str, method: str = "apex", text_encoder: str = "false") -> Path:
        if (kind, method, text_encoder) not in made:
            home = tmp_path_factory.mktemp("run")
            recipe = write(
                home / "recipe.yaml",
                f"output: {home / 'run'}\nmodel: {tiny_model}\ndata: {{source: {scene_folder}}}\nmethod: {method}\n"
                f"tuning: {{kind: {kind}, rank: 2, text_encoder: {text_encoder}}}\n"
                "steps: 4\nbatch: 4\ncheckpoint_every: 2\nkeep: 2\n"
                "preview: {every: 100, count: 2}\noptimizer: {warmup: 2}\n",
            )
            train(load_recipe(recipe))
            made[kind, method, text_encoder] = home / "run"
        return made[kind, method, text_encoder]

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "transformer").glob("*.safetensors")))


def content(path: Path) -> bytes:
    """The bytes of a file; of safetensors with a sorted header, whose own order is by chance."""
    whole = path.read_bytes()
    if path.suffix != ".safetensors":
        return whole
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.dumps(json.loads(whole[8:end]), sort_keys=True).encode() + whole[end:]


def files(folder: Path) -> dict[str, bytes]:
    """What is written, but for what names the folder itself, and a card's device, which a checkpoint does not know."""
    own = {path.relative_to(folder).as_posix(): content(path) for path in folder.rglob("*") if path.is_file()}
    own.pop("README.md")
    settings = json.loads(own.pop("apexflow.json"))
    settings["card"].pop("device", None)
    return own | {"apexflow.json": json.dumps(settings).encode()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_last_checkpoint_is_the_run_to_the_byte(ended, kind: str, method: str, tmp_path: Path) -> None:
    run = ended(kind, method)
    last = checkpoints(run / "checkpoints")[-1]
    expected = export(str(run), tmp_path / "run")
    assert export_checkpoint(last, tmp_path / "checkpoint") | {"output": ""} == expected | {"output": ""}
    assert files(tmp_path / "checkpoint") == files(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_text_encoder_that_was_tuned_is_handed_over_too(ended, tmp_path: Path) -> None:
    run = ended("full", text_encoder="true")
    last = checkpoints(run / "checkpoints")[-1]
    export(str(run), tmp_path / "run")
    export_checkpoint(last, tmp_path / "checkpoint")
    made, expected = files(tmp_path / "checkpoint"), files(tmp_path / "run")
    assert any(name.startswith("text_encoder/") for name in made)
    for of in (made, expected):
        del of["tokenizer/tokenizer.json"]  # which notes how the run padded last
    assert made == expected
    with pytest.raises(UserError, match=f"the text encoder of {re.escape(str(last))} was tuned too"):
        export_checkpoint(last, tmp_path / "lora", rank=2)


def test_an_earlier_checkpoint_is_another_student(ended, tmp_path: Path) -> None:
    run = ended("full")
    first = checkpoints(run / "checkpoints")[0]
    assert first != checkpoints(run / "checkpoints")[-1]
    export_checkpoint(first, tmp_path / "first")
    export(str(run), tmp_path / "last")
    with pytest.raises(AssertionError):
        assert_same(weights(tmp_path / "first"), weights(tmp_path / "last"))


def test_a_lora_of_a_checkpoint_merges(ended, tmp_path: Path) -> None:
    run = ended("lora")
    export_checkpoint(checkpoints(run / "checkpoints")[-1], tmp_path / "merged", merge=True)
    assert_same(weights(tmp_path / "merged"), weights(run / "model"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_second_time_stays_with_the_whole_model(ended, kind: str, tmp_path: Path) -> None:
    run = ended(kind, "meanflow")
    export_checkpoint(checkpoints(run / "checkpoints")[-1], tmp_path / "whole", merge=kind == "lora")
    made, own = (
        second_time.second_time_of(load_backbone(str(f)).transformer) for f in (tmp_path / "whole", run / "model")
    )
    assert_same(dict(made.state_dict()), dict(own.state_dict()))


def test_a_second_time_of_the_base_that_the_method_left_out_is_none_of_the_lora(
    ended, scene_folder: Path, tmp_path: Path
) -> None:
    recipe = write(
        tmp_path / "recipe.yaml",
        f"output: {tmp_path / 'on'}\nmodel: {ended('full', 'meanflow')}\ndata: {{source: {scene_folder}}}\nsteps: 1\nbatch: 4\n"
        "method: flow_matching\ntuning: {kind: lora, rank: 2}\nsampling_steps: 4\npreview: {every: 100, count: 2}\n",
    )
    run = train(load_recipe(recipe)).parent
    expected = export(str(run), tmp_path / "run")
    made = export_checkpoint(checkpoints(run / "checkpoints")[-1], tmp_path / "checkpoint")
    assert made | {"output": ""} == expected | {"output": ""} and made["call"]["num_inference_steps"] == 4
    assert files(tmp_path / "checkpoint") == files(tmp_path / "run")


def test_the_command_takes_a_checkpoint_and_says_so_where_a_model_is_asked_for(ended, run: Run, tmp_path: Path) -> None:
    folder = ended("full")
    last = checkpoints(folder / "checkpoints")[-1]
    refused(run("generate", "a star", "--model", last, "-o", tmp_path / "x.png"), f"apexflow export {last}")
    code, out, _ = run("export", last, "-o", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["kind"] == "model"
    refused(run("export", last, "-o", tmp_path / "out"), "exists")
    refused(run("export", last, "-o", tmp_path / "other", "--base", "mini-teacher"), "leave out --base")
    refused(run("export", last.with_name("step-0000001"), "-o", tmp_path / "gone"), "does not exist", last.name, "keep")


def test_nothing_is_handed_over_into_the_checkpoints_of_a_run(ended, run: Run, tmp_path: Path) -> None:
    folder = ended("full")
    saved = folder / "checkpoints"
    (tmp_path / "link").symlink_to(saved)
    before = sorted(saved.rglob("*"))
    for source in (checkpoints(saved)[-1], folder, "mini-teacher"):
        for output in (saved / "mine", checkpoints(saved)[0] / "mine", tmp_path / "link" / "mine"):
            refused(
                run("export", source, "-o", output), f"output {output} lies among the checkpoints of the run {folder}"
            )
    assert sorted(saved.rglob("*")) == before
    code, _, _ = run("export", folder, "-o", tmp_path / "checkpoints" / "mine")  # of no run
    assert code == 0


def test_a_lora_is_taken_out_of_a_checkpoint_too(ended, tmp_path: Path) -> None:
    run = ended("full")
    last = checkpoints(run / "checkpoints")[-1]
    made = export_checkpoint(last, tmp_path / "checkpoint", rank=2)
    assert made["kind"] == "lora" and made["kept"] == export(str(run), tmp_path / "run", rank=2)["kept"]
    assert files(tmp_path / "checkpoint") == files(tmp_path / "run")


@pytest.mark.parametrize(("kind", "asked"), [("full", {"merge": True}), ("lora", {"rank": 2})])
def test_what_cannot_be_made_of_a_checkpoint_is_told_by_its_name_before_weights_are_read(
    ended, kind: str, asked: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = checkpoints(ended(kind) / "checkpoints")[-1]
    monkeypatch.setattr(recall, "load_backbone", None)
    with pytest.raises(UserError, match=f"^{re.escape(str(last))} .*leave out --{next(iter(asked))}"):
        export_checkpoint(last, tmp_path / "out", **asked)


def test_weights_that_were_tuned_whole_are_held_once(ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of 20 billion weights in float32 a further copy would take 80 GB."""
    monkeypatch.setattr(roles, "hollow", None)  # which makes the copies of a run
    export_checkpoint(checkpoints(ended("full") / "checkpoints")[-1], tmp_path / "out")


def test_a_whole_model_is_written_once(ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 20 billion weights takes 80 GB of disk in float32, and would need as much again beside it."""
    found: list[int] = []

    def note(source: str, *rest: object, **named: object) -> object:
        found.append(file_of(Path(source) / "model").stat().st_ino)
        return export(source, *rest, **named)  # type: ignore[arg-type]

    def file_of(model: Path) -> Path:
        return next((model / "transformer").glob("*.safetensors"))

    monkeypatch.setattr(recall, "export", note)
    export_checkpoint(checkpoints(ended("full") / "checkpoints")[-1], tmp_path / "out")
    assert found == [file_of(tmp_path / "out").stat().st_ino]


def test_what_a_killed_export_left_is_taken_away(ended, tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-out" / "model").mkdir(parents=True)
    write(tmp_path / ".checkpoint-out" / "model" / "left.safetensors", "half of one")
    export_checkpoint(checkpoints(ended("full") / "checkpoints")[-1], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_copy_and_a_link_under_other_names_are_the_checkpoint(ended, tmp_path: Path) -> None:
    last = checkpoints(ended("full") / "checkpoints")[-1]
    export_checkpoint(last, tmp_path / "own")
    shutil.copytree(last, tmp_path / "step-best")
    (tmp_path / "best").symlink_to(last)
    for name in ("step-best", "best"):
        export_checkpoint(tmp_path / name, tmp_path / f"of-{name}")
        assert files(tmp_path / f"of-{name}") == files(tmp_path / "own")


def test_a_damaged_checkpoint_leaves_nothing(ended, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / checkpoints(ended("full") / "checkpoints")[-1].name
    shutil.copytree(checkpoints(ended("full") / "checkpoints")[-1], folder)
    damaged = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(UserError, match="a different size"):
        export_checkpoint(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
