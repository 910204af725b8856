"""The LoRA file in the stock pipelines: every key lands, and one step gives our averaged student's latents."""

from __future__ import annotations

import json
import re

import diffusers
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from stock import largest_difference, load_stock, one_step
from stock_runs import PROMPTS, SIZE, noise, our_latents, stock_latents
from tiny import BUILDERS

from apexflow.backbones import load_backbone
from apexflow.errors import UserError
from apexflow.export import AnyStepScheduler, save_lora
from apexflow.sampler import time_grid
from apexflow.training.adapters import LoraRoles
from apexflow.training.config import Tuning
from apexflow.training.saving import save_adapter

RANK = 3
LOADERS = [name for name in BUILDERS if not name.startswith("pixart")]


def tuned(folder, alpha=None):
    """Roles whose averaged adapter is random, and other than the student's."""
    roles = LoraRoles(load_backbone(str(folder)), Tuning(kind="lora", rank=RANK, alpha=alpha))
    generator = torch.Generator().manual_seed(1)
    for average in roles.average.values():
        average.copy_(0.3 * torch.randn(average.shape, generator=generator))
    return roles


def landed(network):
    """The adapter tensors in a network that a stock pipeline loaded them into, named as in the file."""
    found = {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            module, part, adapter, weight = re.fullmatch(r"(.*)\.(lora_\w+)\.(\w+)\.(\w+)", name).groups()
            assert adapter == "default_0"
            found[f"{module}.{part}.{weight}"] = parameter
    return found


@pytest.mark.parametrize("name", LOADERS)
def test_every_key_lands_and_the_output_is_ours(name, tmp_path, folder_of):
    roles = tuned(folder_of(name))
    path = save_lora(roles, tmp_path)
    assert path == tmp_path / "pytorch_lora_weights.safetensors" and list(tmp_path.iterdir()) == [path]
    part = "unet" if name.startswith("sdxl") else "transformer"
    file = {key.removeprefix(f"{part}."): value for key, value in load_file(path).items()}
    assert set(file) == set(roles.average) and len(load_file(path)) == len(file)

    pipeline = load_stock(folder_of(name))
    z = noise(roles.backbone)
    before = one_step(name, pipeline, PROMPTS, z, SIZE, "latent")
    pipeline.load_lora_weights(tmp_path)
    network = getattr(pipeline, part)
    inside = landed(network)
    assert set(inside) == set(file)  # zero missing, zero unexpected
    for key, value in file.items():
        assert torch.equal(inside[key], value), key
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            assert layer.r["default_0"] == RANK and layer.scaling["default_0"] == 1.0

    after = one_step(name, pipeline, PROMPTS, z, SIZE, "latent")
    with roles.shipped():
        ours = our_latents(roles.backbone, z, time_grid(1))
    assert largest_difference(after, ours) < 1e-5
    assert largest_difference(after, before) > 1e-3  # the adapter did something


def test_alpha_lies_in_the_weights(tmp_path, folder_of):
    """Programs that read no metadata scale by 1: a file whose alpha is not its rank would come out wrong there."""
    roles = tuned(folder_of("qwen_image"), alpha=2 * RANK)
    path = save_lora(roles, tmp_path / "new" / "folder")
    file = load_file(path)
    for key, average in roles.average.items():
        assert torch.equal(file[f"transformer.{key}"], average * (2 if ".lora_B." in key else 1))
    with safe_open(path, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == RANK
    assert metadata["transformer.target_modules"] == sorted(roles.backbone.lora_targets)
    pipeline, z = load_stock(folder_of("qwen_image")), noise(roles.backbone)
    pipeline.load_lora_weights(path.parent)
    pipeline.scheduler = AnyStepScheduler()
    with roles.shipped():
        ours = our_latents(roles.backbone, z, time_grid(2))
    assert largest_difference(stock_latents("qwen_image", pipeline, z, 2), ours) < 1e-5


# What ComfyUI maps onto its own FLUX, whose projections are fused: names under the prefix "transformer.".
DOUBLE = r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
FLUX = rf"transformer_blocks\.\d+\.({DOUBLE})|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"


@pytest.mark.parametrize("name", ["qwen_image", "flux_schnell", "flux_dev"])
def test_keys_fit_comfyui(name, tmp_path, folder_of):
    roles = tuned(folder_of(name))
    network = load_backbone(str(folder_of(name))).transformer
    for key in load_file(save_lora(roles, tmp_path)):
        module = re.fullmatch(r"transformer\.(.+)\.lora_[AB]\.weight", key).group(1)
        # ComfyUI's Qwen-Image has the module names of diffusers.
        assert network.get_submodule(module) is not None
        assert name == "qwen_image" or re.fullmatch(FLUX, module), module


def test_a_family_without_a_loader(tmp_path, folder_of):
    with pytest.raises(UserError, match="cannot load a LoRA"):
        save_lora(tuned(folder_of("pixart_sigma")), tmp_path)
    save_adapter(tuned(folder_of("pixart_sigma")), tmp_path)  # at the end of a training
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [save_lora, save_adapter])
def test_a_full_disk_leaves_the_file_before(tmp_path, folder_of, monkeypatch, save):
    roles = tuned(folder_of("sana"))
    path = save_lora(roles, tmp_path)
    whole = path.read_bytes()

    def full(folder, weight_name, **_):
        (folder / weight_name).write_bytes(whole[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers.SanaPipeline, "save_lora_weights", full)
    with pytest.raises(UserError, match="No space left"):
        save(roles, tmp_path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
