"""Text encoder and autoencoder are read when they are called for, and what was not changed is handed on as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apexflow.backbones import load_backbone
from apexflow.data.caching import CacheSettings, make_cache
from apexflow.errors import UserError
from apexflow.training.config import load_recipe
from apexflow.training.loop import finish, start, steps


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_from_a_cache_reads_no_text_encoder(
    recipe_file: Path, tiny_model: Path, scene_folder: Path, tmp_path: Path, reads: list[str], kind: str
) -> None:
    cache = tmp_path / "cache"
    assert make_cache(scene_folder, load_backbone(str(tiny_model)), tiny_model, cache, CacheSettings())
    assert sorted(reads) == ["text_encoder", "vae"]
    reads.clear()
    common = [f"data.source={cache}", f"tuning.kind={kind}", "tuning.rank=4", "precision=bf16", "preview.guidance=2"]
    run = start(load_recipe(recipe_file, [*common, "steps=2"]), resume=False)
    assert reads == []
    steps(run)
    assert reads == ["vae"] and list((run.folder / "previews").iterdir())  # the previews' captions are cached
    model = finish(run)
    for part in ("vae", "text_encoder"):  # byte for byte, whatever the run's precision
        assert weights(model / part) == weights(tiny_model / part) != {}
    load_backbone(str(model)).encode_prompts(["a red star"])


def test_an_encoder_that_made_a_cache_is_let_go(tiny_model: Path, reads: list[str]) -> None:
    backbone = load_backbone(str(tiny_model))
    with backbone.encoders_on(torch.device("cpu")):
        first = backbone.encode_prompts(["a red star"]).embeds
        backbone.encode_prompts(["a blue star"])
        assert reads == ["text_encoder"]
    assert torch.equal(backbone.encode_prompts(["a red star"]).embeds, first)
    assert reads == ["text_encoder", "text_encoder"]


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_that_lack_are_told_before_anything_is_begun(
    recipe_file: Path, tiny_model: Path, tmp_path: Path, part: str
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    next((model / part).glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=f"{part}/ holds no safetensors"):
        start(load_recipe(recipe_file, [f"model={model}", f"output={tmp_path / 'new'}"]), resume=False)
    assert not (tmp_path / "new").exists()


def test_the_average_of_a_trained_text_encoder_is_what_is_saved(recipe_file: Path, tiny_model: Path) -> None:
    overrides = ["tuning.text_encoder=true", "steps=2", "optimizer.learning_rate=0.01", "ema_decay=0.5"]
    run = start(load_recipe(recipe_file, overrides), resume=False)
    steps(run)
    model = finish(run)
    saved = load_file(next((model / "text_encoder").glob("*.safetensors")))
    trained = run.backbone.text_encoder.state_dict()
    average = {name.removeprefix("text_encoder."): tensor for name, tensor in run.roles.average.items()}
    assert saved.keys() <= average.keys() and all(torch.equal(saved[name], average[name]) for name in saved)
    assert any(not torch.equal(saved[name], trained[name]) for name in saved)  # the average, as of the transformer
    assert weights(model / "text_encoder") != weights(tiny_model / "text_encoder")


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_an_encoder_that_was_changed_in_place_is_saved_as_it_is(tiny_model: Path, tmp_path: Path, part: str) -> None:
    backbone = load_backbone(str(tiny_model))
    network = getattr(backbone, part)
    with torch.no_grad():  # one number of many
        next(network.parameters()).flatten()[-5] += 1
    other = ({"vae", "text_encoder"} - {part}).pop()
    getattr(backbone, other)
    backbone.save(tmp_path, backbone.settings)
    saved, held = load_file(next((tmp_path / part).glob("*.safetensors"))), network.state_dict()
    assert saved.keys() <= held.keys() and all(torch.equal(saved[name], held[name]) for name in saved)
    assert weights(tmp_path / other) == weights(tiny_model / other)
    getattr(backbone, other).to(torch.bfloat16)
    backbone.save(tmp_path / "narrow", backbone.settings)
    saved = load_file(next((tmp_path / "narrow" / other).glob("*.safetensors")))
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize("own", [(), ("a photo of two red stars", "a circle", "a photo of two red stars")])
def test_previews_draw_what_the_text_encoder_would_say(recipe_file: Path, own: tuple[str, ...]) -> None:
    run = start(load_recipe(recipe_file, ["preview.count=5", f"preview.prompts={json.dumps(own)}"]), resume=False)
    shown = run.shown
    assert shown.captions == (list(own[:2]) if own else run.data.captions([0, 16, 32]))
    assert shown.pictures == (4 if own else 5) and shown.encode is not None
    for prompts in (shown.captions[::-1], [""]):
        looked_up, fresh = shown.encode(prompts), run.backbone.encode_prompts(prompts)
        assert looked_up.embeds.shape == fresh.embeds.shape
        mask = 1 if fresh.mask is None else fresh.mask[..., None]
        assert ((looked_up.embeds - fresh.embeds) * mask).abs().max() < 1e-5
