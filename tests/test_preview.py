"""Previews: who decodes them, where the autoencoder stands before and after, and what a full GPU changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from apexflow.backbones import load_backbone
from apexflow.generator import Generator
from apexflow.reporting.report import LOOKS
from apexflow.training import loop, preview
from apexflow.training.config import load_recipe
from apexflow.training.loop import start
from apexflow.training.preview import appearance, decoded, in_pairs
from apexflow.training.step import training_step

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Wandering:
    """An autoencoder that notes where it is put, on devices that need not be there."""

    def __init__(self, fails: bool = False) -> None:
        self.places, self.fails = [CPU], fails

    def parameters(self) -> Any:
        return iter([torch.empty(0, device=self.places[-1])])

    def to(self, device: torch.device) -> Wandering:
        self.places.append(device)
        if self.fails and device == GPU:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return self


class OnGpu:
    """A backbone whose denoiser stands on a GPU, and whose pictures say where they were decoded."""

    device = GPU

    def __init__(self, fails_on: tuple[torch.device, ...] = ()) -> None:
        self.decoded: list[tuple[torch.device, int]] = []
        self.fails_on, self.place = fails_on, CPU

    def autoencoder_on(self, device: torch.device) -> OnGpu:
        self.place = device
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append((self.place, len(latents)))
        if self.place in self.fails_on:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return latents


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, place, *more: self if place == GPU else to(self, place, *more))


@pytest.mark.parametrize("fails", [False, True])
def test_the_autoencoder_goes_back_to_where_it_stood(tiny_model: Path, fails: bool) -> None:
    backbone = load_backbone(str(tiny_model))
    vae = backbone.vae = Wandering(fails)
    with pytest.raises(RuntimeError), backbone.autoencoder_on(GPU):
        assert vae.places == [CPU, GPU]
        raise RuntimeError("decoding fails")
    assert vae.places == [CPU, GPU, CPU]


@pytest.mark.usefixtures("no_gpu_needed")
def test_pictures_are_decoded_one_by_one_where_the_denoiser_stands() -> None:
    backbone, latents = OnGpu(), torch.arange(3.0).view(3, 1, 1, 1)
    assert torch.equal(decoded(backbone, latents), latents)
    assert backbone.decoded == [(GPU, 1)] * 3


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_gpu_without_room_leaves_it_to_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(preview.console, "print", lines.append)
    backbone, latents = OnGpu(fails_on=(GPU,)), torch.arange(2.0).view(2, 1, 1, 1)
    assert torch.equal(decoded(backbone, latents), latents)
    assert backbone.decoded == [(GPU, 1), (CPU, 1), (CPU, 1)]
    (line,) = lines
    assert "could not be decoded on cuda (CUDA out of memory.): the CPU does it" in line
    with pytest.raises(torch.OutOfMemoryError):  # there is no other place left
        decoded(OnGpu(fails_on=(GPU, CPU)), latents)


def test_only_who_writes_a_preview_decodes_it(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    run = start(load_recipe(recipe_file, ["tuning.kind=lora", "tuning.rank=4"]), resume=False)
    calls: list[int] = []
    decode = run.backbone.decode
    monkeypatch.setattr(run.backbone, "decode", lambda latents: calls.append(len(latents)) or decode(latents))
    for module in (preview, loop):
        monkeypatch.setattr(module, "leads", lambda: False)
    monkeypatch.setattr(loop, "Sharded", type(run.engine))  # whose networks all processes ask together
    before, asked = len(reads), []
    velocity = run.backbone.velocity
    monkeypatch.setattr(run.backbone, "velocity", lambda *given: asked.append(1) or velocity(*given))
    loop.preview(run)
    assert calls == [] and asked and len(reads) == before and not (run.folder / "previews").exists()
    monkeypatch.setattr(preview, "leads", lambda: True)
    loop.preview(run)
    assert calls == [1, 1]
    (path,) = (run.folder / "previews").glob("*.png")
    width, height = Image.open(path).size
    assert width == 2 * 64 < height // 2 + 1  # one caption, from two noises: one above the other, at twice their size
    assert set(json.loads(path.with_suffix(".json").read_text())) == {*LOOKS}


def picture(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (red, green, blue))


def test_what_pictures_look_like() -> None:
    grey, red, black = picture(128, 128, 128), picture(255, 0, 0), picture(0, 0, 0)
    halves = black.copy()
    halves.paste(picture(255, 255, 255), (0, 4))
    assert appearance([grey], 1) == pytest.approx({"brightness": 128 / 255, "contrast": 0, "saturation": 0}, abs=1e-5)
    assert appearance([red], 1) == pytest.approx({"brightness": 0.2126, "contrast": 0, "saturation": 1}, abs=1e-5)
    assert appearance([black], 1) == {"brightness": 0, "contrast": 0, "saturation": 0}
    assert appearance([halves], 1) == pytest.approx({"brightness": 0.5, "contrast": 0.5, "saturation": 0})


def test_diversity_is_between_pictures_of_one_caption() -> None:
    grey, black, white = picture(128, 128, 128), picture(0, 0, 0), picture(255, 255, 255)
    assert "diversity" not in appearance([grey, black], 2)
    assert appearance([black, white, black, white], 2)["diversity"] == 0
    assert appearance([black, white, white, black], 2)["diversity"] == 1
    assert appearance([black, white, grey], 2)["diversity"] == pytest.approx(128 / 255, abs=1e-5)  # of the pair alone


def test_the_second_picture_of_a_caption_lies_below_the_first() -> None:
    first, second = [picture(10 * i, 0, 0) for i in range(5)], [picture(10 * i, 0, 9) for i in range(4)]
    reds = [one.getpixel((0, 0))[::2] for one in in_pairs(first + second, 5, 2)]
    blank = (255, 255)
    expected = [(0, 0), (10, 0), (0, 9), (10, 9), (20, 0), (30, 0), (20, 9), (30, 9), (40, 0), blank]
    assert reds == expected  # the last has one picture
    assert in_pairs(first[:1], 1, 1) == first[:1]


def test_a_preview_draws_each_caption_from_two_noises(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(load_recipe(recipe_file, ["preview.count=5"]), resume=False)
    drawn: list[list[str]] = []
    generate = preview.Generator.generate
    monkeypatch.setattr(
        preview.Generator,
        "generate",
        lambda own, prompts, *more, **named: drawn.append(prompts) or generate(own, prompts, *more, **named),
    )
    first = loop.preview(run)
    assert [len(set(prompts)) for prompts in drawn] == [3] and drawn[0][:2] == drawn[0][3:]
    assert first == loop.preview(run) and first["diversity"] > 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_previews_are_drawn_by_the_average_as_the_recipe_says(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = ["preview.steps=2", "preview.guidance=1.5", "preview.count=4", "ema_decay=0.5"]
    run = start(load_recipe(recipe_file, [f"tuning.kind={kind}", "tuning.rank=4", *options]), resume=False)
    for _ in range(2):
        training_step(run)
    x, t, c = run.data.latents([0, 1]), torch.tensor([0.3, 1.0]), run.data.condition([0, 1])
    asked: list[Any] = []
    generate = Generator.generate

    def note(self: Generator, prompts: Any, steps: Any, seed: Any, size: Any, guidance: Any) -> Any:
        asked.append((list(prompts), steps, guidance))
        asked.append(self.backbone.velocity(self.backbone.transformer, x, t, c))
        return generate(self, prompts, steps, seed, size, guidance=guidance)

    monkeypatch.setattr(Generator, "generate", note)
    with torch.no_grad():
        loop.preview(run)
        average, student = (field(x, t, c) for field in (run.networks.reference, run.networks.student))
    assert asked[0] == (run.data.captions([0, 24]) * 2, 2, 1.5)  # spread over all 48
    assert torch.equal(asked[1], average) and not torch.equal(asked[1], student)
