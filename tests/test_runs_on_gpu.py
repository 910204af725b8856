"""Whole runs on a GPU: every method, exact resume, DDP and FSDP2 over NCCL, and the commands with no device named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command_line import Run
from interrupted import train_in_parts
from safetensors.torch import load_file

from apexflow.comparison.plan import VARIANTS
from apexflow.objectives import objectives
from apexflow.training import prepare
from apexflow.training.config import load_recipe
from apexflow.training.journal import read_metrics
from apexflow.training.loop import start, train
from apexflow.training.sharding import whole
from apexflow.training.step import accumulate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and benchmarks/on_gpu.sh")
LORA = ("tuning.kind=lora", "tuning.rank=4")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model" / "transformer").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    "options", [(), LORA, ("precision=bf16",), (*LORA, "precision=bf16", "tuning.storage=fp8")], ids=str
)
@pytest.mark.parametrize("method", objectives())
def test_every_method_takes_steps(method: str, options: tuple[str, ...], recipe_file: Path) -> None:
    if hasattr(objectives()[method](), "derivative") and "tuning.storage=fp8" in options:
        options = (*options, "objective.derivative=difference")
    recipe = load_recipe(recipe_file, [f"method={method}", *options, "steps=3"])
    train(recipe)
    lines = read_metrics(Path(recipe.output))
    assert len(lines) == 3 and not any(line["skipped"] for line in lines)
    assert start(recipe, resume=True).device.type == "cuda"


EIGHT = pytest.param(
    ("optimizer.kind=adamw8bit", "precision=bf16"),
    marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra apexflow[8bit]"),
)


@pytest.mark.parametrize("options", [(), LORA, ("precision=bf16", "micro_batch=2"), ("method=dmd2",), EIGHT], ids=str)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    options: tuple[str, ...], recipe_file: Path, tmp_path: Path
) -> None:
    whole_run, parts = (
        load_recipe(recipe_file, [*options, f"output={tmp_path / name}"]) for name in ("whole", "parts")
    )
    train(whole_run)
    train_in_parts(parts)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process over NCCL, in which a run does what it does among several."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(prepare, "world", lambda: 2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "options", [(), LORA, ("precision=bf16",), (*LORA, "precision=bf16"), ("method=dmd2",)], ids=str
)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_over_nccl_are_those_of_one_process(
    parallel: str,
    options: tuple[str, ...],
    recipe_file: Path,
    tmp_path: Path,
    nccl: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = [*options, "tuning.checkpointing=true", f"data.cache={tmp_path / 'cache'}", f"parallel={parallel}"]
    shared = start(load_recipe(recipe_file, [*common, f"output={tmp_path / 'shared'}"]), resume=False)
    assert type(shared.engine).__name__ == {"ddp": "Replicated", "fsdp": "Sharded"}[parallel]
    monkeypatch.undo()
    alone = start(load_recipe(recipe_file, [*common, f"output={tmp_path / 'alone'}"]), resume=False)
    for run in (shared, alone):
        accumulate(run)
    half = "precision=bf16" in options
    compared = {name: parameter.grad for name, parameter in alone.trained.items() if parameter.grad is not None}
    assert len(compared) > 10 and any(bool(gradient.any()) for gradient in compared.values())
    # In bf16 a gradient that is nothing but rounding, as that of a key's bias, is another each time.
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in compared.values()) if half else 1e-5
    for name, gradient in compared.items():
        found = whole(shared.trained[name].grad).to(gradient)
        assert (found - gradient).abs().max() <= (5e-2 if half else 1e-4) * gradient.abs().max() + least, name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_shared_run_saves_and_goes_on(parallel: str, recipe_file: Path, tmp_path: Path, nccl: None) -> None:
    runs = [
        load_recipe(recipe_file, [f"parallel={parallel}", f"output={tmp_path / name}"]) for name in ("whole", "parts")
    ]
    train(runs[0])
    train_in_parts(runs[1])
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_commands_take_the_gpu_unasked(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    def answered(*arguments: object) -> dict:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert arguments[0] == "export" or torch.cuda.max_memory_allocated() > before
        return json.loads(out)

    answered("train", recipe_file)
    model = tmp_path / "run" / "model"
    answered("generate", "a photo of a red star", "--model", model, "--steps", 2, "-o", tmp_path / "o.png")
    answered("evaluate", "--model", model, "--limit", 6, "--per-prompt", 1, "-o", tmp_path / "scores")
    answered("export", model, "-o", tmp_path / "exported")
    answered("bench", f"{model}:1", "--batch", 2, "--train", "lora")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue ring\n")
    answered("synthesize", prompts, "-o", tmp_path / "made", "--model", model, "--steps", 1)
    answered("cache", tmp_path / "made", "-o", tmp_path / "cached", "--model", model)


@pytest.mark.parametrize("name", ["apex", *VARIANTS])
def test_a_comparison(name: str, run: Run, recipe_file: Path, tmp_path: Path) -> None:
    given = ["--recipe", recipe_file, "--images", 8, "--nfe", "1,2", "--seeds", 1, "--per-prompt", 1, "--limit", 4]
    code, out, err = run("compare", name, "-o", tmp_path / "compare", *given, "--rates", "1e-3", "--json")
    assert code == 0, err
    row = json.loads(out)["rows"][name]
    assert row["diverged"].startswith("0/") and set(row["budgets"]["images"]["nfe"]) == {"1", "2"}
