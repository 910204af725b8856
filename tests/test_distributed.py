"""Two processes on a CPU: the gradients of one, exact resume, one voice for errors, and nobody left waiting."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import (
    agreements,
    command,
    command_under_torchrun,
    command_with_a_full_disk,
    gradients,
    late_shares,
    launch,
    shares,
    until,
    wait,
)
from safetensors.torch import load_file, save_file
from test_beginning import random_lora
from test_teacher import like

from apexflow.backbones.miniature import build_miniature
from apexflow.backbones.presets import load_shapes
from apexflow.data.scenes import vocabulary
from apexflow.locking import alone_in
from apexflow.training.checkpoint import checkpoints, load_checkpoint
from apexflow.training.config import load_recipe
from apexflow.training.engine import parallel_kind
from apexflow.training.journal import read_metrics
from apexflow.training.loop import start


@pytest.fixture
def recipe(recipe_file: Path) -> Path:
    """The recipe of the other tests, with its cache in a place that several runs share."""
    text = recipe_file.read_text().replace("data: {", f"data: {{cache: {recipe_file.parent / 'cache'}, ")
    recipe_file.write_text(text + "ema_decay: 0.5\nseed: 3\n")
    return recipe_file


def last(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    tensors = load_checkpoint(checkpoints(folder / "checkpoints")[-1]).tensors
    return {
        f"{part}/{name}": tensor
        for part in ("trained", "average", "optimizer")
        for name, tensor in tensors[part].items()
    }


def losses(folder: Path) -> list[float]:
    return [numbers["loss"] for numbers in read_metrics(folder)]


def spoken(errors: Path) -> list[str]:
    """Lines on standard error of both processes."""
    return [
        line for rank in (0, 1) for line in Path(f"{errors}-{rank}").read_text().splitlines() if "apexflow:" in line
    ]


# With one row a micro-batch the processes want different passes: half (or a quarter) of the rows are generated from.
CASES = {
    f"{kind} {parallel}": [f"tuning.kind={kind}", "tuning.rank=4", f"parallel={parallel}", f"objective.share={share}"]
    for kind, parallel, share in (
        ("full", "ddp", 0.5),
        ("full", "fsdp", 0.25),
        ("lora", "ddp", 0.5),
        ("lora", "fsdp", 0.25),
    )
}
# A second time, several kinds of rows, further networks with judges on the critic and on the teacher, a text encoder.
CASES |= {
    "meanflow fsdp": ["method=meanflow", "objective.share=1", "parallel=fsdp"],
    "twinflow lora ddp": ["method=twinflow", "tuning.kind=lora", "tuning.rank=4", "parallel=ddp"],
    "dmd2 ddp": ["method=dmd2", "objective.guidance=2", "parallel=ddp"],
    "dmd2 fsdp": ["method=dmd2", "objective.guidance=2", "parallel=fsdp"],
    "dmd2 lora fsdp": ["method=dmd2", "objective.guidance=2", "tuning.kind=lora", "tuning.rank=4", "parallel=fsdp"],
    "text encoder fsdp": ["tuning.text_encoder=true", "parallel=fsdp", "objective.share=0.5", "data.cache=null"],
    "text encoder ddp": [
        "tuning.text_encoder=true",
        "parallel=ddp",
        "data.cache=null",
        "method=dmd2",
        "objective.guidance=2",
    ],
    "sana_sprint fsdp": ["method=sana_sprint", "parallel=fsdp"],
}


@pytest.fixture
def larger(tiny_model: Path, tmp_path: Path) -> Path:
    """A teacher of its own, of another size than the student."""
    return like(tiny_model, tmp_path / "larger", width=64, depth=2)


def test_gradients_equal_those_of_one_process(
    recipe: Path, tmp_path: Path, larger: Path, tiny_model: Path, scene_folder: Path
) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    own = ["method=dmd2", "objective.guidance=2", f"teacher={larger}"]
    cases = CASES | {f"own teacher {parallel}": [*own, f"parallel={parallel}"] for parallel in ("ddp", "fsdp")}
    started = ["tuning.kind=lora", "tuning.rank=4", f"tuning.start={random_lora(tiny_model, tmp_path)}"]
    cases |= {f"started {parallel}": [*started, f"parallel={parallel}"] for parallel in ("ddp", "fsdp")}
    few = tmp_path / "few.txt"
    few.write_text("a red star\na blue ring\n")
    shares = [f"data.source=[{scene_folder}, {few}]", "data.shares=[1, 2]", f"data.cache={tmp_path / 'mixture'}"]
    cases["mixture"] = [*shares, "objective.path_weight=0", "objective.share=1"]
    split = {name: [*o, "micro_batch=1", "tuning.checkpointing=true"] for name, o in cases.items()}
    both = launch(gradients, 2, recipe, split, tmp_path / "two")
    alone = launch(gradients, 1, recipe, cases, tmp_path / "one")
    assert wait(both) == [0, 0] and wait(alone) == [0]
    for name in cases:
        one, two = (load_file(tmp_path / world / f"{name}.safetensors") for world in ("one", "two"))
        assert one.keys() == two.keys() and any(bool(grad.any()) for grad in one.values())
        for parameter, grad in one.items():
            assert (two[parameter] - grad).abs().max() < 1e-5, (name, parameter)


def test_no_process_reads_or_holds_a_whole_denoiser(recipe: Path, tmp_path: Path) -> None:
    model = tmp_path / "wide"
    backbone = build_miniature(vocabulary(), seed=0, width=96, depth=2)
    backbone.save(model, backbone.settings)
    whole = sum(p.nbytes for p in backbone.transformer.parameters())
    common = [f"model={model}", "parallel=fsdp", "method=flow_matching", "tuning.rank=1"]
    cases = {kind: [*common, f"tuning.kind={kind}"] for kind in ("full", "lora")}
    start(load_recipe(recipe, [*common, f"output={tmp_path / 'cached'}"]), resume=False)
    assert wait(launch(shares, 2, recipe, cases, tmp_path)) == [0, 0]
    for kind, copies in (("full", 2), ("lora", 1)):  # student and average, or a base and its small adapters
        both = [json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in (0, 1)]
        assert sum(each["read"] for each in both) == whole
        for each in both:
            assert each["read"] < 0.51 * whole
            assert each["held"] < (0.5 * copies + 0.25) * whole


def test_weights_of_another_network_are_not_shared_out(recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["proj_out.weight"]
    save_file(tensors, file)
    both = launch(command, 2, "train", str(recipe), f"model={model}", "parallel=fsdp", errors=tmp_path / "errors")
    assert wait(both) == [2, 2]
    (line,) = spoken(tmp_path / "errors")
    assert "1 tensors are missing, such as proj_out.weight" in line and "restore it" in line


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ([], (6, 0, 0)),
        (["tuning.kind=lora"], (1, 0, 0)),
        (["method=dmd2"], (10, 0, 0)),
        (["tuning.text_encoder=true"], (6, 5, 0)),
        (["method=dmd2", "teacher=larger"], (5, 0, 5)),
    ],
)
def test_what_would_fill_half_of_a_gpu_is_sharded(
    recipe: Path, tiny_model: Path, larger: Path, options: list[str], copies: tuple[int, int, int]
) -> None:
    asked = load_recipe(recipe, options)
    models = [load_shapes(str(folder)) for folder in [tiny_model, larger][: 2 if asked.teacher else 1]]
    networks = (models[0].transformer, models[0].text_encoder, models[-1].transformer)
    half = sum(count * p.nbytes for count, one in zip(copies, networks, strict=True) for p in one.parameters())
    for memory, kind in ((2 * half - 2, "fsdp"), (2 * half, "ddp")):
        assert parallel_kind(asked, models, memory) == kind
    assert parallel_kind(asked, models, None) == "ddp"


def test_what_processes_must_agree_on(recipe: Path, tmp_path: Path) -> None:
    assert wait(launch(agreements, 2, recipe, tmp_path)) == [0, 0]


def test_a_process_that_writes_its_share_late_is_waited_for(tmp_path: Path) -> None:
    assert wait(launch(late_shares, 2, tmp_path)) == [0, 0]


EVERYTHING = ["method=dmd2", "objective.student_every=2", "tuning.text_encoder=true", "data.cache=null"]


@pytest.mark.parametrize(
    "options", [["parallel=fsdp", *EVERYTHING], ["parallel=ddp", "tuning.kind=lora", "tuning.rank=4"]]
)
def test_kill_and_resume_on_two_processes_is_exact(
    recipe: Path, tmp_path: Path, larger: Path, options: list[str]
) -> None:
    full = EVERYTHING[2] in options
    common = ["train", str(recipe), *options, *[f"teacher={larger}"] * full, "steps=4", "preview.every=4"]
    assert wait(launch(command, 2, *common, f"output={tmp_path / 'whole'}")) == [0, 0]
    parts = tmp_path / "parts"
    killed = launch(command, 2, *common, f"output={parts}")
    until(lambda: checkpoints(parts / "checkpoints"), killed)
    for process in killed:
        os.kill(process.pid, signal.SIGKILL)
    wait(killed)
    assert wait(launch(command, 2, *common, f"output={parts}", "--resume")) == [0, 0]
    assert losses(parts) == losses(tmp_path / "whole")
    one, two = last(tmp_path / "whole"), last(parts)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (parts / "model" / "model_index.json").is_file() and (parts / "report.html").is_file()
    for part in ("transformer", "text_encoder") if full else ():
        saved = load_file(next((parts / "model" / part).glob("*.safetensors")))
        assert all(torch.equal(saved[name], two[f"average/{part}.{name}"]) for name in saved)
    assert len(list((parts / "tensorboard").iterdir())) <= 2  # one writer a start


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_own_prompts_are_drawn_as_by_one_process(recipe: Path, tmp_path: Path, parallel: str) -> None:
    common = [
        "train",
        str(recipe),
        "steps=1",
        'preview.prompts=["a red star", "a blue circle"]',
        f"parallel={parallel}",
    ]
    looks = []
    for world in (1, 2):
        output = tmp_path / str(world)
        assert wait(launch(command, world, *common, f"output={output}")) == [0] * world
        looks.append(json.loads((output / "previews" / "step-0000001.json").read_text()))
        assert looks[-1].pop("captions") == ["a red star", "a blue circle"]
    assert looks[1] == pytest.approx(looks[0], abs=1e-3) and looks[0]["diversity"] > 0


LORA = ["tuning.kind=lora", "tuning.rank=4", "micro_batch=1"]


@pytest.mark.parametrize("options", [LORA, EVERYTHING], ids=["lora", "everything"])
def test_a_run_goes_on_with_another_number_of_processes(recipe: Path, tmp_path: Path, options: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["train", str(recipe), "parallel=fsdp", "preview.every=100", *options]
    assert wait(launch(command, 1, *common, f"output={whole}")) == [0]
    for world, steps in ((1, 2), (2, 4), (1, 6)):
        more = ["--resume"] if steps > 2 else []
        assert wait(launch(command, world, *common, f"output={parts}", f"steps={steps}", *more)) == [0] * world
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    one, two = last(whole), last(parts)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if not name.startswith("optimizer/"):
            assert (two[name] - tensor).abs().max() < 1e-4, name


def test_sigterm_to_any_process_saves_and_stops_all(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [
        "train",
        str(recipe),
        "parallel=fsdp",
        "steps=100000",
        "checkpoint_every=100000",
        "preview.every=100000",
    ]
    both = launch(command, 2, *arguments, errors=tmp_path / "errors")
    until(lambda: read_metrics(run), both)
    os.kill(both[1].pid, signal.SIGTERM)
    assert wait(both) == [130, 130]
    assert len(checkpoints(run / "checkpoints")) == 1
    (line,) = spoken(tmp_path / "errors")
    assert "--resume" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch=5"], "batch 5 cannot be shared equally by 2 processes: make it a multiple of 2"),
        (["model=nowhere"], "model 'nowhere' not found"),
    ],
)
def test_a_mistake_is_one_line_and_nobody_waits(
    recipe: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    both = launch(command, 2, "train", str(recipe), *overrides, errors=tmp_path / "errors")
    assert wait(both) == [2, 2]
    (line,) = spoken(tmp_path / "errors")
    assert message in line


def test_a_run_in_the_folder_of_another_stops_with_one_line(recipe: Path, tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        both = launch(command, 2, "train", str(recipe), errors=tmp_path / "errors")
        assert wait(both) == [2, 2]
    (line,) = spoken(tmp_path / "errors")
    assert "another apexflow command is using" in line


@pytest.mark.parametrize(
    ("arguments", "devices", "codes", "message"),
    [
        (["cache", "prompts.txt", "--model", "nowhere"], ("cpu", "cpu"), [2, 2], "model 'nowhere' not found"),
        (["synthesize", "nowhere.txt", "--model", "MODEL"], ("cpu", "cpu"), [2, 2], "data 'nowhere.txt' not found"),
        (["evaluate", "--model", "nowhere"], ("cpu", "cpu"), [2, 2], "model 'nowhere' not found"),
        (["cache", "prompts.txt", "--buckets=yes"], ("cpu", "cpu"), [2, 2], "--buckets"),
        (["cache", "prompts.txt", "--model", "MODEL"], ("cpu", "gpu"), [0, 2], "'gpu'"),
    ],
    ids=["cache", "synthesize", "evaluate", "option", "one process alone"],
)
def test_a_mistake_where_processes_share_only_a_disk_is_told_once(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    devices: tuple[str, str],
    codes: list[int],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a photo of a red star\n")
    torchruns = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = [str(tiny_model) if argument == "MODEL" else argument for argument in arguments]
    both = launch(command_under_torchrun, 2, torchruns.port, devices, *given, "-o", "out", errors=tmp_path / "errors")
    assert wait(both) == codes
    (line,) = spoken(tmp_path / "errors")
    assert line.startswith("apexflow: error: ") and message in line


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_fills_on_one_machine_stops_all_and_keeps_the_last_checkpoint(
    recipe: Path, tmp_path: Path, full: int
) -> None:
    common = ["train", str(recipe), "parallel=fsdp", "steps=2", "preview.every=100"]
    assert wait(launch(command, 2, *common)) == [0, 0]
    (good,) = checkpoints(tmp_path / "run" / "checkpoints")
    again = [*common, "steps=4", "--resume"]
    both = launch(command_with_a_full_disk, 2, full, *again, errors=tmp_path / "errors")
    assert wait(both) == [2, 2]
    (line,) = spoken(tmp_path / "errors")
    assert (
        "cannot save" in line
        and "free some space" in line
        and "Traceback" not in Path(f"{tmp_path / 'errors'}-{full}").read_text()
    )
    assert checkpoints(good.parent) == [good] and load_checkpoint(good).state["step"] == 2
