"""A judge looks into the blocks of every family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import BUILDERS

from apexflow.backbones import Backbone
from apexflow.training.further import Judge, Look, blocks_at


@pytest.mark.parametrize("name", BUILDERS)
def test_a_judge_hears_the_picture_and_lets_gradients_through(
    name: str, backbone_of: Callable[[str], Backbone]
) -> None:
    backbone = backbone_of(name)
    network = backbone.transformer
    look = Look(lambda *asked: backbone.velocity(network, *asked), network, blocks_at(network, (0, 0.95)))
    x_t = torch.randn(
        2, *backbone.latent_shape((32, 32)), generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    asked = (x_t, torch.tensor([0.4, 0.9]), backbone.encode_prompts(["a red cube", "a blue ball"]))
    seen = look(*asked)
    assert len(seen) == 2 and all(part.ndim == 3 and len(part) == 2 for part in seen)
    judge = Judge(look, [part.shape[-1] for part in seen])
    logits = judge(*asked)
    assert logits.shape == (2, sum(part.shape[1] for part in seen))
    logits.sum().backward()
    assert x_t.grad is not None and all(row.any() for row in x_t.grad)
    assert not any(block._forward_hooks for block in look.blocks)
