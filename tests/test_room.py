"""Drawing on a card too small for a model: what it takes, text encoder and denoiser in turn, and a denoiser in fewer bits."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from shutil import copytree
from typing import Any
from warnings import catch_warnings

import four_bit
import numpy as np
import pytest
import torch
from command_line import write
from torch import nn

from apexflow import bench
from apexflow import generator as drawing
from apexflow.backbones import load_backbone
from apexflow.backbones.room import InTurn, room_on, weight_bytes
from apexflow.backbones.storage import FourBit
from apexflow.backbones.text import device_of
from apexflow.errors import UserError
from apexflow.evaluation.runner import evaluate
from apexflow.evaluation.suite import EvaluationSettings
from apexflow.generator import Generator, load

CPU = torch.device("cpu")
PROMPTS = ["a photo of a red star", "a photo of two blue circles"]


def array(pictures: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])


def size_of(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_takes_is_known_before_its_encoders_are_read(tiny_model: Path, dtype: torch.dtype) -> None:
    backbone = load_backbone(str(tiny_model), dtype=dtype)
    told = weight_bytes(backbone)
    networks = [backbone.transformer, backbone.text_encoder, backbone.vae]
    assert {network.dtype for network in networks} == {dtype}
    tables = sum(buffer.nbytes for buffer in backbone.transformer.buffers())
    assert told == sum(map(size_of, networks)) + tables == weight_bytes(backbone)


def test_a_folder_that_is_no_part_of_a_model_is_not_counted(tiny_model: Path, tmp_path: Path) -> None:
    """SDXL's repository has autoencoders for other programs beside its own."""
    model = copytree(tiny_model, tmp_path / "model")
    (model / "vae_decoder").mkdir()
    write(model / "vae_decoder" / "model.onnx", "another program's")
    assert weight_bytes(load_backbone(str(model))) == weight_bytes(load_backbone(str(tiny_model)))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_text_encoder_and_denoiser_are_never_on_the_card_together(tiny_model: Path, guidance: float) -> None:
    backbone = load_backbone(str(tiny_model))
    usual = array(Generator(backbone).generate(PROMPTS, 2, guidance=guidance))
    moves: list[tuple[str, Any]] = []
    for name in ("transformer", "text_encoder"):
        network = getattr(backbone, name)
        network.to = lambda place, name=name: moves.append((name, place))
    encode = backbone.encode_prompts
    backbone.encode_prompts = lambda texts: moves.append(("texts", len(texts))) or encode(texts)  # type: ignore[method-assign]
    card = torch.device("cpu", 0)  # told from the place beside it, and as good
    pictures = Generator(backbone, InTurn(backbone, card)).generate(PROMPTS, 2, guidance=guidance)
    np.testing.assert_allclose(array(pictures), usual, atol=1)
    assert moves[:2] == [("transformer", "cpu"), ("text_encoder", card)]
    assert moves[2:-2] == [("texts", 1)] * 3  # in one turn, with guidance too
    assert moves[-2:] == [("text_encoder", "cpu"), ("transformer", card)]


def turns_of(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The places that the text encoder goes to from now on."""
    moves: list[Any] = []
    monkeypatch.setattr(generator.backbone.text_encoder, "to", moves.append)
    return moves


def test_an_evaluation_encodes_its_prompts_in_one_turn(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(str(tiny_model))
    generator = Generator(backbone, InTurn(backbone, CPU))
    moves = turns_of(generator, monkeypatch)
    monkeypatch.setattr("apexflow.evaluation.drawing.pictures_at_once", lambda size: 2)
    settings = EvaluationSettings(limit=6, per_prompt=1, steps=1, guidance=2.0)
    report = evaluate(generator, settings, tmp_path / "scores")
    assert report["pictures"] == 6 and len(moves) == 2


def test_what_was_encoded_last_is_not_encoded_again(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(str(tiny_model))
    generator = Generator(backbone, InTurn(backbone, CPU))
    moves = turns_of(generator, monkeypatch)
    for prompts, turns in ((PROMPTS, 1), (PROMPTS[:1], 1), (["a photo of a ring"], 2), (PROMPTS, 3)):
        generator.generate(prompts)
        assert len(moves) == 2 * turns


def test_a_long_list_takes_a_turn_for_as_many_prompts_as_are_kept(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(str(tiny_model))
    generator = Generator(backbone, InTurn(backbone, CPU))
    prompts = [f"a photo of {count} stars" for count in range(5)]
    usual = generator.generate(prompts)
    moves = turns_of(generator, monkeypatch)
    monkeypatch.setattr(drawing, "AHEAD", 2)
    generator.encode.known.clear()  # type: ignore[attr-defined]
    np.testing.assert_allclose(array(generator.generate(prompts)), array(usual), atol=1)
    assert len(moves) == 2 * 3 and len(generator.encode.known) <= 3  # type: ignore[attr-defined]


def test_the_text_encoder_is_timed_where_it_takes_turns(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(str(tiny_model))
    generator = Generator(backbone, InTurn(backbone, CPU))
    moves = turns_of(generator, monkeypatch)
    monkeypatch.setattr(bench, "ENOUGH", 0.0)
    bench.sampling_speed({"one": (generator, bench.Case("one", 1, 1.0))}, batch=2)
    assert len(moves) == 2 * 2 * (1 + bench.LEAST)


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
    with_room = load("mini-student", "cpu", torch.float32)
    monkeypatch.setattr(drawing, "room_on", lambda device: weight_bytes(with_room.backbone) - 1)
    with pytest.warns(UserWarning, match="cpu cannot hold all of mini-student"):
        without = load("mini-student", "cpu", torch.float32)
    assert isinstance(without.encode, InTurn) and not isinstance(with_room.encode, InTurn)
    np.testing.assert_array_equal(array(without.generate(PROMPTS)), array(with_room.generate(PROMPTS)))


@pytest.mark.parametrize("room", [0, math.inf])
def test_without_room_the_text_encoder_alone_waits_beside_the_card(
    tiny_model: Path, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "room_on", lambda device: room)
    monkeypatch.setattr(drawing, "pick_device", lambda name: "meta")  # stands in for a card
    with catch_warnings(action="ignore"):
        backbone = load(str(tiny_model), "cuda", torch.float32).backbone
    places = [device_of(network).type for network in (backbone.transformer, backbone.vae, backbone.text_encoder)]
    assert places == ["meta", "meta", "meta" if room else "cpu"]


def test_a_card_has_room_for_most_of_what_is_free_or_kept_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"mem_get_info": (50, 1000), "memory_reserved": 250, "memory_allocated": 200}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert 80 < room_on(torch.device("cuda")) < 100 and room_on(CPU) == math.inf


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
    saved = weight_bytes(whole.backbone) - weight_bytes(narrow.backbone)
    assert kept and saved > size_of(whole.backbone.transformer) / 3
    difference = np.abs(array(narrow.generate(PROMPTS)) - array(whole.generate(PROMPTS))).mean()
    assert 0 < difference < near
    assert narrow.backbone.text_encoder.dtype == torch.float32


def test_another_storage_is_refused() -> None:
    with pytest.raises(UserError, match="storage is 'int2': use fp8 or nf4"):
        load("mini-student", storage="int2")  # type: ignore[arg-type]


def test_four_bits_are_asked_for_before_a_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match="storage nf4 needs bitsandbytes"):
        load("no-such-model", "cpu", storage="nf4")
