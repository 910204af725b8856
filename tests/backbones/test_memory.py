"""Activations counted on shapes against those that the real tiny networks keep, for networks of several kinds."""

from __future__ import annotations

import pytest
import torch

from apexflow.backbones import load_backbone
from apexflow.errors import UserError
from apexflow.training.config import Recipe, Tuning
from apexflow.training.memory import _count_captions as count_captions
from apexflow.training.memory import activations, example_inputs, kept_for_backward
from apexflow.training.passes import Pass
from apexflow.training.roles import make_roles

PASSES = [Pass("student", 4, True), Pass("teacher", 4, False), Pass("student", 2, True)]
TOKENS = 16


@pytest.mark.parametrize(
    ("name", "kind", "checkpointing"),
    [
        ("qwen_image", "lora", True),
        ("qwen_image", "full", False),
        ("flux_dev", "lora", False),
        ("flux2", "lora", True),
        ("sdxl", "full", True),
        ("lumina2", "full", False),
    ],
)
def test_counted_on_shapes_is_what_is_really_kept(name, kind, checkpointing, folder_of):
    tuning = Tuning(kind=kind, rank=4, checkpointing=checkpointing)
    recipe = Recipe(output="x", model=name, tuning=tuning, precision="bf16")
    backbone, real = load_backbone(str(folder_of(name)), "meta"), load_backbone(str(folder_of(name)))
    shape = backbone.latent_shape((32, 64))
    found = activations(backbone, recipe, PASSES, shape, TOKENS)
    make_roles(real, recipe, ())
    with kept_for_backward([real.transformer]) as kept, torch.autocast("cpu", torch.bfloat16):
        alive = [
            real.velocity(real.transformer, *example_inputs(real, made.rows, shape, TOKENS))
            for made in PASSES
            if made.graph
        ]
    assert len(alive) == 2 and found.kept == pytest.approx(kept.bytes, rel=0.02)
    assert (found.block > 0) == checkpointing


@pytest.mark.parametrize(
    ("name", "parts"),
    [("sana", {"SanaTransformerBlock"}), ("sdxl", {"ResnetBlock2D", "BasicTransformerBlock"})],
)
def test_what_is_computed_again_is_the_largest_checkpointed_part(name, parts, folder_of):
    """Of a transformer a block; of a UNet a residual block or a block of one of its transformers."""
    backbone, real = load_backbone(str(folder_of(name)), "meta"), load_backbone(str(folder_of(name)))
    network, held, shape = real.transformer.requires_grad_(True), [], backbone.latent_shape((32, 64))
    with kept_for_backward([network]) as kept:
        for module in network.modules():
            if type(module).__name__ in parts:
                module.register_forward_pre_hook(lambda *_: held.append(-kept.bytes))
                module.register_forward_hook(lambda *_: held.append(held.pop() + kept.bytes))
        alive = real.velocity(network, *example_inputs(real, 4, shape, TOKENS))
    recipe = Recipe(output="x", tuning=Tuning(checkpointing=True))
    found = activations(backbone, recipe, PASSES[:1], shape, TOKENS)
    assert alive.requires_grad and found.block == pytest.approx(max(held), rel=0.02)


def test_captions_longer_than_clip_reads_are_counted(folder_of):
    """Stable Diffusion 3 has 77 tokens of CLIP before T5's, and each CLIP reads no more than these."""
    backbone = load_backbone(str(folder_of("sd3")), "meta")
    short, long = (count_captions(backbone, 2, tokens) for tokens in (77, 100))
    assert 0 < short < long < 100 / 77 * short


def test_a_network_that_reads_numbers_is_named(folder_of):
    backbone = load_backbone(str(folder_of("sana")), "meta")
    backbone.velocity = lambda network, x_t, t, c: x_t * float(t.sum())
    with pytest.raises(UserError, match="sana cannot be counted"):
        activations(backbone, Recipe(output="x"), PASSES, backbone.latent_shape((32, 32)), TOKENS)
