"""A second time in every family: silent until trained, silent at s = 0 for good, and saved beside the stock parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import BUILDERS
from torch import Tensor, nn

from apexflow.backbones import Backbone, load_backbone
from apexflow.backbones.second_time import (
    NAME,
    attach,
    detach,
    going_to,
    load,
    save,
    second_time_of,
    time_module,
    without,
)
from apexflow.errors import UserError

Load = Callable[[str], Path]


def ask(backbone: Backbone, s: tuple[float, float] | None) -> Tensor:
    """F at two rows of different points and times."""
    c = backbone.encode_prompts(["a red cube", "a blue ball"])
    x_t = torch.randn(2, *backbone.latent_shape((32, 32)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), going_to(backbone.transformer, None if s is None else torch.tensor(s)):
        return backbone.velocity(backbone.transformer, x_t, torch.tensor([0.4, 0.9]), c)


def wake(network: nn.Module) -> None:
    """Weights as if trained."""
    second = second_time_of(network)
    assert second is not None
    for embedder in second.embedders.values():
        nn.init.normal_(embedder[-1].weight, std=0.5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_fresh_second_time_changes_no_bit_and_a_trained_one_none_at_zero(name: str, folder_of: Load) -> None:
    backbone = load_backbone(str(folder_of(name)))
    before = ask(backbone, None)
    attach(backbone.transformer)
    for s in (None, (0.0, 0.0), (0.4, 0.9), (0.1, -0.9)):
        assert torch.equal(ask(backbone, s), before)
    wake(backbone.transformer)
    assert torch.equal(ask(backbone, None), before) and torch.equal(ask(backbone, (0.0, 0.0)), before)
    one = ask(backbone, (0.3, 0.0))
    assert not torch.equal(one[0], before[0])  # each row hears its own
    assert torch.equal(one[1], before[1])
    assert not torch.equal(ask(backbone, (-0.3, 0.0))[0], one[0])  # and its sign


def test_a_copy_has_a_second_time_of_its_own(folder_of: Load) -> None:
    network = load_backbone(str(folder_of("sana"))).transformer
    attach(network)
    other = copy.deepcopy(network)
    wake(other)
    backbone = load_backbone(str(folder_of("sana")))
    plain = ask(backbone, None)
    backbone.transformer = network
    assert torch.equal(ask(backbone, (0.3, 0.3)), plain)
    backbone.transformer = other
    assert not torch.equal(ask(backbone, (0.3, 0.3)), plain)


def test_without_it_the_network_is_the_stock_one(folder_of: Load) -> None:
    backbone = load_backbone(str(folder_of("sd3")))
    keys, plain = set(backbone.transformer.state_dict()), ask(backbone, None)
    attach(backbone.transformer)
    wake(backbone.transformer)
    with without(backbone.transformer) as second:
        assert second is not None and set(backbone.transformer.state_dict()) == keys
        assert torch.equal(ask(backbone, None), plain)
        with pytest.raises(ValueError, match="no second time"):
            ask(backbone, (0.3, 0.3))
    assert not torch.equal(ask(backbone, (0.3, 0.3)), plain)
    detach(backbone.transformer)
    assert set(backbone.transformer.state_dict()) == keys and not time_module(backbone.transformer)._forward_hooks


def test_it_is_saved_beside_the_parts_and_found_again(folder_of: Load, tmp_path: Path) -> None:
    backbone = load_backbone(str(folder_of("z_image")))
    attach(backbone.transformer)
    wake(backbone.transformer)
    expected = ask(backbone, (0.2, 0.7))
    with without(backbone.transformer) as second:
        backbone.save(tmp_path, backbone.settings)
    assert second is not None
    save(second, tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert torch.equal(ask(loaded, (0.2, 0.7)), expected)
    assert not any(parameter.requires_grad for parameter in loaded.transformer.parameters())


def test_a_further_adapter_goes_on_from_the_second_time_that_is_there(folder_of: Load) -> None:
    backbone = load_backbone(str(folder_of("sana")))
    attach(backbone.transformer)
    wake(backbone.transformer)
    expected = ask(backbone, (0.2, 0.7))
    second = attach(backbone.transformer, ("default", "ema"))
    assert torch.equal(ask(backbone, (0.2, 0.7)), expected) and second is attach(
        backbone.transformer, ("default", "ema")
    )
    second.active = "ema"
    assert torch.equal(ask(backbone, (0.2, 0.7)), expected)
    assert sum(NAME in name for name, _ in backbone.transformer.named_modules() if name == NAME) == 1


def test_a_network_whose_time_is_not_known_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="Linear cannot take a second time"):
        attach(nn.Linear(2, 2))


def test_a_file_of_another_model_is_named(folder_of: Load, tmp_path: Path) -> None:
    other = load_backbone(str(folder_of("flux_dev"))).transformer
    save(attach(other), tmp_path)
    with pytest.raises(UserError, match=r"second_time\.safetensors does not fit"):
        load(load_backbone(str(folder_of("sana"))).transformer, tmp_path)
    (tmp_path / "second_time.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"second_time\.safetensors does not fit"):
        load(load_backbone(str(folder_of("sana"))).transformer, tmp_path)
