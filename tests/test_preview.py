"""Previews: who decodes them, where the autoencoder stands before and after, and what a full GPU changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from apexflow.backbones import load_backbone
from apexflow.backbones.sana import Sana
from apexflow.data.caching import CacheSettings, make_cache
from apexflow.generator import Generator
from apexflow.reporting.report import LOOKS, write_report
from apexflow.training import loop, prepare, preview
from apexflow.training.config import load_recipe
from apexflow.training.loop import start
from apexflow.training.preview import appearance, decoded, numbered_grid
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
    assert "could not be decoded on cuda (CUDA out of memory.): the CPU decodes them" in line
    with pytest.raises(torch.OutOfMemoryError):  # there is no other place left
        decoded(OnGpu(fails_on=(GPU, CPU)), latents)


def test_only_who_writes_a_preview_decodes_it(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    run = start(load_recipe(recipe_file, ["tuning.kind=lora", "tuning.rank=4"]), resume=False)
    calls: list[int] = []
    decode = run.backbone.decode
    monkeypatch.setattr(run.backbone, "decode", lambda latents: calls.append(len(latents)) or decode(latents))
    monkeypatch.setattr(preview, "leads", lambda: False)
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
    assert set(json.loads(path.with_suffix(".json").read_text())) == {*LOOKS, "captions"}


def test_a_process_that_draws_no_previews_reads_no_text_encoder_for_them(
    recipe_file: Path, tiny_model: Path, scene_folder: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    cache = recipe_file.parent / "cache"
    make_cache(scene_folder, load_backbone(str(tiny_model)), tiny_model, cache, CacheSettings())
    reads.clear()
    recipe = load_recipe(recipe_file, [f"data.source={cache}", 'preview.prompts=["a red star"]'])
    assert start(recipe, resume=False).shown is not None and reads == ["text_encoder"]
    reads.clear()
    monkeypatch.setattr(prepare, "leads", lambda: False)
    run = start(replace(recipe, output=recipe.output + "-other"), resume=False)
    assert run.shown is None and reads == [] and loop.preview(run) == {}


@pytest.mark.parametrize(("steps", "rho"), [(4, 1.0), (8, 0.0)])
def test_previews_are_sampled_as_the_method_samples(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, steps: int, rho: float
) -> None:
    asked: list[Any] = []

    def generate(own: Generator, *given: Any, **named: Any) -> list[Image.Image]:
        asked.append(own.sampler(given[1], given[4], **named) | {"steps": given[1]})
        return [picture(0, 0, 0)] * len(given[0])

    monkeypatch.setattr(Generator, "generate", generate)
    loop.preview(start(load_recipe(recipe_file, ["method=rcgm", f"preview.steps={steps}"]), resume=False))
    assert asked == [{"steps": steps, "guidance": 1.0, "kappa": 0.0, "rho": rho, "order": 1}]


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


@pytest.mark.parametrize(("half", "count"), [(1, 1), (2, 3), (3, 6), (8, 16), (9, 17), (12, 24)])
def test_the_second_noise_lies_below_the_first_however_many_captions_there_are(half: int, count: int) -> None:
    size, written = 80, list[tuple[int, int, str]]()
    made = [Image.new("RGB", (size, size), (100 + number, 200, 0)) for number in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        note = ImageDraw.ImageDraw.text
        patch.setattr(
            ImageDraw.ImageDraw,
            "text",
            lambda own, place, said, *more, **named: (
                written.append((int(place[0]), int(place[1]), said)) or note(own, place, said, *more, **named)
            ),
        )
        sheet = np.array(numbered_grid(made, half))
    found = {number: np.argwhere((sheet == (100 + number, 200, 0)).all(-1)) for number in range(count)}
    assert all(len(places) == size * size for places in found.values())  # each whole, and none over another
    assert [said for *_, said in written] == [str(number + 1) for number in range(half)]
    for number, (across, down, _) in enumerate(written):
        (top, left), below = found[number][0], found.get(half + number)
        assert left < across < left + size and 0 < top - down < size // 2  # its number stands above it
        assert below is None or tuple(below[0] - found[number][0]) == (size + 2, 0)


def test_the_numbers_of_columns_are_seen_whatever_the_size_of_the_pictures() -> None:
    for size in (64, 512):
        sheet = numbered_grid([Image.new("RGB", (size, size), "white")] * 16, 8)
        dark = np.argwhere(np.array(sheet).max(-1) < 100)
        shown = 1100 / sheet.width  # at the width of the report's page
        assert (dark[:, 0].max() - dark[:, 0].min()) * min(1, shown) >= 8  # pixels


def test_own_prompts_are_encoded_as_many_at_once_as_are_drawn(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode = Sana.encode_prompts
    monkeypatch.setattr(Sana, "encode_prompts", lambda own, prompts: asked.append(len(prompts)) or encode(own, prompts))
    monkeypatch.setattr(preview, "pictures_at_once", lambda size: 2)
    prompts = ["a red star", "a photo of a blue ring left of a green heart", "a star", "two green hearts", "a ring"]
    run = start(load_recipe(recipe_file, [f"preview.prompts={json.dumps(prompts)}"]), resume=False)
    assert asked[-3:] == [2, 2, 1]
    assert run.shown is not None and run.shown.encode is not None
    shown, own = run.shown.encode(prompts), encode(run.backbone, prompts)
    assert own.mask is not None and shown.mask is not None
    assert torch.allclose(shown.embeds[shown.mask.bool()], own.embeds[own.mask.bool()], atol=1e-5)


def test_a_report_lists_the_captions_under_their_numbers(recipe_file: Path) -> None:
    run = start(load_recipe(recipe_file, ['preview.prompts=["a red star", "ein <blauer> Ring"]']), resume=False)
    loop.preview(run)
    page = write_report(run.folder).read_text()
    assert '<ol class="captions"><li>a red star</li><li>ein &lt;blauer&gt; Ring</li></ol>' in page


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


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_large_previews_are_drawn_a_few_at_a_time_and_are_the_same(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    run = start(load_recipe(recipe_file, ["preview.count=5", f"preview.guidance={guidance}"]), resume=False)
    expected, asked = loop.preview(run), []
    velocity = run.backbone.velocity
    monkeypatch.setattr(run.backbone, "velocity", lambda *given: asked.append(len(given[1])) or velocity(*given))
    monkeypatch.setattr(preview, "pictures_at_once", lambda size: 2)
    assert loop.preview(run) == pytest.approx(expected, abs=1e-3)
    assert max(asked) == 2 and sum(asked) == 5 * (2 if guidance != 1 else 1)


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

    def note(self: Generator, prompts: Any, steps: Any, seed: Any, size: Any, guidance: Any, **sampler: Any) -> Any:
        asked.append((list(prompts), steps, guidance))
        asked.append(self.backbone.velocity(self.backbone.transformer, x, t, c))
        return generate(self, prompts, steps, seed, size, guidance, **sampler)

    monkeypatch.setattr(Generator, "generate", note)
    with torch.no_grad():
        loop.preview(run)
        average, student = (field(x, t, c) for field in (run.networks.reference, run.networks.student))
    assert asked[0] == (run.data.captions([0, 24]) * 2, 2, 1.5)  # spread over all 48
    assert torch.equal(asked[1], average) and not torch.equal(asked[1], student)
