"""A student that starts as a LoRA: who answers as what, who is trained, and that a resumed run reads it no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Run, refused
from safetensors.torch import load_file, save_file

from apexflow.backbones import load_backbone
from apexflow.export import export, save_lora
from apexflow.training.adapters import LoraRoles
from apexflow.training.checkpoint import checkpoints, load_checkpoint
from apexflow.training.config import Tuning, load_recipe
from apexflow.training.loop import start, train
from apexflow.training.step import training_step

RANK = 4


def random_lora(model: Path, folder: Path, rank: int = RANK) -> Path:
    """The file of a LoRA for a model, none of its tensors zero."""
    roles = LoraRoles(load_backbone(str(model)), Tuning(kind="lora", rank=rank, alpha=2 * rank))
    generator = torch.Generator().manual_seed(1)
    for average in roles.average.values():
        average.copy_(0.2 * torch.randn(average.shape, generator=generator))
    return save_lora(roles, folder / "lora")


def options(file: Path, *more: str) -> list[str]:
    return ["tuning.kind=lora", f"tuning.rank={RANK}", f"tuning.start={file}", *more]


def last(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return load_checkpoint(checkpoints(folder / "checkpoints")[-1]).tensors


@pytest.mark.parametrize("method", ["apex", "dmd2"])
def test_a_student_starts_as_the_lora_and_others_as_the_base(
    recipe_file: Path, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    file = random_lora(tiny_model, tmp_path)
    export(str(file), tmp_path / "merged", merge=True, base=str(tiny_model))
    # The folder of a LoRA stands for its file, and another alpha than the file's changes nothing.
    run = start(load_recipe(recipe_file, options(file.parent, "tuning.alpha=10", f"method={method}")), resume=False)
    x, c = run.data.latents([0, 1]), run.data.condition([0, 1])
    t = torch.tensor([0.3, 1.0])
    merged, base = load_backbone(str(tmp_path / "merged")), load_backbone(str(tiny_model))
    networks = run.engine.networks
    with torch.no_grad():
        expected, plain = (one.velocity(one.transformer, x, t, c) for one in (merged, base))
        assert (expected - plain).abs().max() > 0.01
        for asked in (networks.student, networks.reference):
            assert (asked(x, t, c) - expected).abs().max() < 1e-5
        critic = networks.further.get("critic", networks.teacher)  # is like the teacher
        for asked in (networks.teacher, critic):
            assert (asked(x, t, c) - plain).abs().max() < 1e-6
    before = {name: p.detach().clone() for name, p in run.roles.trained.items()}
    frozen = {
        name: p.detach().clone() for name, p in run.backbone.transformer.named_parameters() if ".lora_" not in name
    }
    for _ in range(5 if method == "dmd2" else 1):  # the critic has four steps of five
        training_step(run)
    after = dict(run.backbone.transformer.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    assert all(not torch.equal(before[name], p) for name, p in run.roles.trained.items())


def test_a_resumed_run_does_not_read_it_again(recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    file = random_lora(tiny_model, tmp_path)
    train(load_recipe(recipe_file, options(file, "steps=4", f"output={tmp_path / 'whole'}")))
    parts = options(file, f"output={tmp_path / 'parts'}")
    train(load_recipe(recipe_file, [*parts, "steps=2"]))
    file.unlink()
    train(load_recipe(recipe_file, [*parts, "steps=4"]), resume=True)
    whole, resumed = (last(tmp_path / name) for name in ("whole", "parts"))
    for part in ("trained", "average"):
        assert all(torch.equal(resumed[part][name], tensor) for name, tensor in whole[part].items())
    assert f'"start": "{file}"' in (tmp_path / "parts" / "recipe.json").read_text()


def test_another_rank_or_other_modules_are_refused(
    run: Run, recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    file = random_lora(tiny_model, tmp_path)

    def told(*words: str) -> None:
        refused(run("train", recipe_file, *options(file)), "tuning.start", *words)
        assert not (tmp_path / "run").exists()  # before anything is cached

    tensors = load_file(file)
    module = "transformer.transformer_blocks.0.attn1.to_q"
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(module)}
    save_file(rest, file)
    told("lacks transformer_blocks.0.attn1.to_q", "--merge -o FOLDER")
    more = {f"transformer.proj_out.lora_{side}.weight": torch.ones(RANK, RANK) for side in "AB"}
    save_file(tensors | more, file)
    told("has modules that are not trained", "proj_out", "--merge")
    save_file({name.replace("attn1", "attn9"): tensor for name, tensor in tensors.items()}, file)
    told("another model", "has no transformer_blocks.0.attn9.to_k")
    wide = {f"{module}.lora_A.weight": torch.ones(RANK, 1), f"{module}.lora_B.weight": torch.ones(1, RANK)}
    save_file(tensors | wide, file)
    told("another model", "attn1.to_q")
    mixed = {name: tensor[:2] if ".lora_A." in name else tensor[:, :2] for name, tensor in tensors.items()}
    mixed = {name: tensor.contiguous() for name, tensor in mixed.items()}
    save_file(mixed, file)
    told("rank 2", "set tuning.rank=2")
    save_file(mixed | {name: tensor for name, tensor in tensors.items() if name.startswith(module)}, file)
    told("rank 2, 4", "--merge")
    file.unlink()
    pickled = file.with_suffix(".PT")
    pickled.write_bytes(b"anything")
    refused(run("train", recipe_file, *options(pickled)), str(pickled), "is a pickle", "safetensors")
    told("does not exist", str(file))
    refused(run("train", recipe_file, "tuning.kind=full", f"tuning.start={file}"), "tuning.start", "--merge")


def test_the_plan_does_not_read_it(run: Run, recipe_file: Path) -> None:
    code, told, errors = run("plan", recipe_file, *options(Path("nowhere.safetensors")))
    assert code == 0, errors
    assert run("plan", recipe_file, *options(Path("nowhere.safetensors"))[:2])[1] == told
