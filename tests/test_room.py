"""Drawing on a card too small for a model: what it takes, text encoder and denoiser in turn, and a denoiser in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import four_bit
import numpy as np
import pytest
import torch
from torch import nn

from apexflow import generator as drawing
from apexflow.backbones import BUILT_IN, load_backbone
from apexflow.backbones.room import DENOISERS, InTurn, weight_bytes
from apexflow.backbones.storage import FourBit
from apexflow.errors import UserError
from apexflow.generator import Generator, load

CPU = torch.device("cpu")
PROMPTS = ["a photo of a red star", "a photo of two blue circles"]


def array(pictures: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])


def size_of(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_takes_is_told_from_its_files(tiny_model: Path, dtype: torch.dtype) -> None:
    backbone = load_backbone(str(tiny_model), dtype=dtype)
    networks = [backbone.transformer, backbone.text_encoder, backbone.vae]
    assert {network.dtype for network in networks} == {dtype}
    assert weight_bytes(tiny_model, dtype) == sum(map(size_of, networks))
    narrow = weight_bytes(tiny_model, dtype, "fp8")
    assert narrow == sum(map(size_of, networks[1:])) + size_of(networks[0]) / dtype.itemsize
    assert weight_bytes(tiny_model, dtype, "nf4") < narrow and backbone.network_part in DENOISERS


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_text_encoder_and_denoiser_are_never_on_the_card_together(tiny_model: Path, guidance: float) -> None:
    backbone = load_backbone(str(tiny_model))
    usual = array(Generator(backbone).generate(PROMPTS, 2, guidance=guidance))
    moves: list[tuple[str, Any]] = []
    for name in ("transformer", "text_encoder"):
        network = getattr(backbone, name)
        network.to = lambda place, name=name: moves.append((name, place))
    card = torch.device("cpu", 0)  # told from the place beside it, and as good
    pictures = Generator(backbone, InTurn(backbone, card)).generate(PROMPTS, 2, guidance=guidance)
    np.testing.assert_allclose(array(pictures), usual, atol=1)
    turn = [("transformer", "cpu"), ("text_encoder", card), ("text_encoder", "cpu"), ("transformer", card)]
    assert moves == turn  # once, with guidance too


def test_a_text_that_cannot_be_encoded_leaves_the_denoiser_where_it_stood(tiny_model: Path) -> None:
    backbone = load_backbone(str(tiny_model))
    moves: list[Any] = []
    backbone.transformer.to = moves.append

    def fail(prompts: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    backbone.encode_prompts = fail  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        InTurn(backbone, CPU)(PROMPTS)
    assert moves == ["cpu", CPU]


def test_a_model_without_room_is_drawn_in_turn_and_one_with_room_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for room in (True, False):
        monkeypatch.setattr(drawing, "has_room", lambda *_, room=room: room)
        generator = load("mini-student", "cpu", torch.float32)
        seen.append((isinstance(generator.encode, InTurn), len(generator.generate(PROMPTS))))
    assert seen == [(False, 2), (True, 2)]


@pytest.mark.parametrize(("storage", "near"), [("fp8", 8), ("nf4", 16)])
def test_a_denoiser_in_fewer_bits_draws_nearly_the_same(
    storage: Any, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    four_bit.use(monkeypatch)
    whole, narrow = load("mini-student", "cpu"), load("mini-student", "cpu", storage=storage)
    network = narrow.backbone.transformer
    kept = [m for m in network.modules() if isinstance(m, FourBit)] + [
        p for p in network.parameters() if p.dtype == torch.float8_e4m3fn
    ]
    assert kept and weight_bytes(BUILT_IN / "mini-student", torch.float32, storage) < size_of(
        whole.backbone.transformer
    )
    difference = np.abs(array(narrow.generate(PROMPTS)) - array(whole.generate(PROMPTS))).mean()
    assert 0 < difference < near
    assert narrow.backbone.text_encoder.dtype == torch.float32


def test_another_storage_is_refused() -> None:
    with pytest.raises(UserError, match="storage is 'int2': take fp8 or nf4"):
        load("mini-student", storage="int2")  # type: ignore[arg-type]
