"""Training with a second time: full and LoRA, resumed exactly, saved for us and for stock diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from interrupted import train_in_parts
from safetensors.torch import load_file

from apexflow.backbones import load_backbone, read_settings
from apexflow.backbones.second_time import FILE, attach, save, second_time_of
from apexflow.generator import load
from apexflow.training import loop
from apexflow.training.checkpoint import checkpoints, load_checkpoint
from apexflow.training.config import load_recipe
from apexflow.training.loop import start, train
from apexflow.training.step import training_step

KINDS = pytest.mark.parametrize("kind", ["full", "lora"])
# Both times differ in every row, and large steps, so that three of them wake the second time.
JUMPS = ["method=meanflow", "objective.share=1", "optimizer.learning_rate=1e-2", "tuning.rank=4", "ema_decay=0.5"]


@KINDS
def test_the_second_time_is_trained_averaged_and_resumed(recipe_file: Path, tmp_path: Path, kind: str) -> None:
    common = [*JUMPS, f"tuning.kind={kind}", "steps=4", "preview.every=100", "checkpoint_every=100"]
    train(load_recipe(recipe_file, [*common, f"output={tmp_path / 'whole'}"]))
    parts = load_recipe(recipe_file, [*common, f"output={tmp_path / 'parts'}"])
    train_in_parts(parts)
    one, other = (load_checkpoint(checkpoints(tmp_path / n / "checkpoints")[-1]).tensors for n in ("whole", "parts"))
    for part in ("trained", "average"):
        names = [name for name in one[part] if "second_time" in name]
        assert len(names) == 2
        assert all(torch.equal(one[part][name], other[part][name]) and one[part][name].any() for name in names)


@KINDS
def test_the_saved_model_jumps_as_the_average_did_and_stock_diffusers_sees_none_of_it(
    recipe_file: Path, kind: str
) -> None:
    from diffusers import SanaTransformer2DModel

    run = start(load_recipe(recipe_file, [*JUMPS, f"tuning.kind={kind}", "sampling_steps=4"]), resume=False)
    x, t, c = run.data.latents([0, 1]), torch.tensor([0.4, 0.9]), run.data.condition([0, 1])
    s = torch.tensor([0.2, 0.5])
    for _ in range(4):
        training_step(run)
    with torch.no_grad():
        roles = run.roles.networks(None)
        average, jump = roles.reference(x, t, c), roles.reference(x, t, c, s)
        student = roles.student(x, t, c, s)
    assert not torch.equal(average, jump) and not torch.equal(student, jump)
    folder = loop.finish(run)
    generator = load(str(folder))
    assert second_time_of(generator.backbone.transformer) is not None and (folder / FILE).is_file()
    assert generator.backbone.settings.steps == 4
    if kind == "lora":  # which alone cannot jump to a time
        assert read_settings(folder.parent / "lora").steps == 1
    weights = load_file(next((folder / "transformer").glob("*.safetensors")))
    stock, information = SanaTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert set(weights) == set(stock.state_dict()) and not information["unexpected_keys"]
    with torch.no_grad():
        network = generator.backbone.transformer
        assert (generator.backbone.velocity(network, x, t, c) - average).abs().max() < 1e-5
        assert (generator.backbone.velocity(stock, x, t, c) - average).abs().max() < 1e-5
    one, four = (generator.generate(["a photo of a red star"], steps, guidance=1.0)[0] for steps in (1, 4))
    assert generator.evaluations == 4 and one.tobytes() != four.tobytes()


def test_lora_answers_of_teacher_and_average_have_their_own_second_time(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file, [*JUMPS, "tuning.kind=lora"]), resume=False)
    networks = run.roles.networks(None)
    x, t, c = run.data.latents([0, 1]), torch.tensor([0.4, 0.9]), run.data.condition([0, 1])
    with torch.no_grad():
        base = networks.teacher(x, t, c)
        assert torch.equal(networks.student(x, t, c, t), base)
    for _ in range(3):
        training_step(run)
    with torch.no_grad():
        assert torch.equal(networks.teacher(x, t, c), base) and torch.equal(networks.teacher(x, t, c, t), base)
        assert not torch.equal(networks.student(x, t, c, t), networks.student(x, t, c, 0 * t))


def test_a_lora_in_half_precision_takes_up_a_trained_second_time_as_it_is(
    recipe_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    second = attach(load_backbone(str(model)).transformer)
    torch.nn.init.normal_(second.embedders["default"][-1].weight)
    save(second, model)
    options = [*JUMPS, "tuning.kind=lora", "precision=bf16", f"model={model}"]
    roles = start(load_recipe(recipe_file, options), resume=False).roles
    saved = load_file(model / FILE)
    for states in (roles.trained, roles.average):
        for name, tensor in saved.items():
            assert not torch.equal(tensor, tensor.bfloat16().float())
            assert torch.equal(states[f"second_time.embedders.{name}"].data, tensor)
    assert {p.dtype for name, p in roles.backbone.transformer.named_parameters() if ".base_layer." in name} == {
        torch.bfloat16
    }


def test_a_method_without_goes_on_from_a_model_with_a_second_time(recipe_file: Path, tmp_path: Path) -> None:
    first = train(load_recipe(recipe_file, [*JUMPS, "steps=2"]))
    second = train(
        load_recipe(recipe_file, ["method=flow_matching", "steps=1", f"model={first}", f"output={tmp_path / 'on'}"])
    )
    assert (first / FILE).is_file() and not (second / FILE).is_file()


def test_samplers_jump_to_the_next_time_or_to_data_where_noise_follows() -> None:
    from apexflow.sampler import sample, time_grid

    asked: list[float] = []

    def velocity(x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        asked.append(float(s[0]))
        return x_t

    z, times = torch.ones(1, 2), time_grid(2)
    sample(velocity, z, times, jumps=True)
    sample(velocity, z, times, rho=1.0, generator=torch.Generator(), jumps=True)
    assert asked == [0.5, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="order 1"):
        sample(velocity, z, times, order=2, jumps=True)
