"""Training reads a cache as it reads its source, and refuses one of another model, other data or other settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from little_shards import cached
from PIL import Image
from safetensors.torch import load_file, save_file

from apexflow.backbones import load_backbone
from apexflow.data.fingerprint import autoencoder_fingerprint, text_fingerprint
from apexflow.errors import UserError
from apexflow.objectives.apex import APEX
from apexflow.training.config import load_recipe
from apexflow.training.loop import start
from apexflow.training.step import make_batch, training_step

# -- Another model, other data, other settings -------------------------------------------------------------------------


def change(model: Path, part: str, target: Path) -> Path:
    """A copy of a model with one part's weights changed."""
    shutil.copytree(model, target)
    path = next((target / part).glob("*.safetensors"))
    tensors = {name: tensor + 0.125 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def test_fingerprints_follow_weights_not_files(tiny_model: Path, tmp_path: Path) -> None:
    settings = load_backbone(str(tiny_model)).settings
    before = autoencoder_fingerprint(tiny_model), text_fingerprint(tiny_model, settings)
    other = Path(shutil.copytree(tiny_model, tmp_path / "split"))
    path = next((other / "vae").glob("*.safetensors"))
    tensors = sorted((name, tensor.clone()) for name, tensor in load_file(path).items())
    parts = {"one.safetensors": dict(tensors[:5]), "two.safetensors": dict(tensors[5:])}
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        save_file(part, path.with_name(file))
    path = path.with_name("one.safetensors")
    assert (autoencoder_fingerprint(other), text_fingerprint(other, settings)) == before
    backbone = load_backbone(str(tiny_model))
    with pytest.warns(UserWarning, match="longer than"):
        backbone.encode_prompts(["a red star " * 40])  # the tokenizer remembers how it cut and padded, and saves that
    (tmp_path / "used").mkdir()
    backbone.save(tmp_path / "used", backbone.settings)
    assert text_fingerprint(tmp_path / "used", settings) == before[1]
    (other / "tokenizer" / "vocab.json").write_text("{}")  # published beside tokenizer.json, and not saved again
    assert text_fingerprint(other, settings) == before[1]
    assert autoencoder_fingerprint(change(tiny_model, "vae", tmp_path / "vae")) != before[0]
    assert text_fingerprint(change(tiny_model, "text_encoder", tmp_path / "text"), settings) != before[1]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="restore it"):
        autoencoder_fingerprint(other)


@pytest.mark.parametrize(("part", "named"), [("vae", "autoencoder"), ("text_encoder", "text encoder")])
def test_a_cache_of_another_model_is_refused(
    whole: Path, recipe_file: Path, tiny_model: Path, tmp_path: Path, part: str, named: str
) -> None:
    model = change(tiny_model, part, tmp_path / "other")
    with pytest.raises(UserError, match=f"another model's {named}: use that model"):
        start(load_recipe(recipe_file, [f"data.source={whole}", f"model={model}"]), resume=False)
    if part == "text_encoder":  # which is trained here, so the cached embeddings are not read
        start(load_recipe(recipe_file, [f"data.source={whole}", f"model={model}", "tuning.text_encoder=true"]), False)


def test_a_cache_with_other_settings_is_refused(
    whole: Path, copy: Path, recipe_file: Path, scene_folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"other settings .*size 64 instead of 32"):
        start(load_recipe(recipe_file, [f"data.source={whole}", "data.size=32"]), resume=False)
    with pytest.raises(UserError, match=r"other settings .*captions \[\] instead of \['txt'\]"):
        cached(scene_folder, tiny_model, copy, captions=("txt",))
    cached(scene_folder, tiny_model, tmp_path / "captions", text=False)
    with pytest.raises(UserError, match=r"other settings \(text False instead of True\)"):
        start(load_recipe(recipe_file, [f"data.source={tmp_path / 'captions'}"]), resume=False)
    with pytest.raises(UserError, match=r"other settings \(text True instead of False\)"):
        cached(scene_folder, tiny_model, copy, text=False)


# -- Training reads it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["source", "cache"])
def test_training_on_a_finished_cache_equals_training_on_its_source_and_calls_no_encoder(
    whole: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    direct = start(load_recipe(recipe_file, [f"output={tmp_path / 'direct'}"]), resume=False)
    expected = [training_step(direct) for _ in range(2)]
    kind = type(direct.backbone)

    def never(*_: object) -> None:
        raise AssertionError("an encoder was called")

    monkeypatch.setattr(kind, "encode_prompts", never)
    monkeypatch.setattr(kind, "encode_images", never)
    recipe = tmp_path / "cached.yaml"
    recipe.write_text(recipe_file.read_text().replace("source: ", "source_was: ").replace("data: {", "#"))
    overrides = [f"data.{key}={whole}", f"output={tmp_path / 'cached'}"]
    run = start(load_recipe(recipe, overrides), resume=False)
    assert [training_step(run) for _ in range(2)] == expected


def test_prompts_alone_are_spread_over_the_buckets(any_aspect: Path, recipe_file: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a photo of {number} stars\n" for number in range(60)))
    overrides = [f"data.source={prompts}", "data.buckets=true", f"model={any_aspect}", "steps=12", "objective.share=1"]
    recipe = load_recipe(recipe_file, [*overrides, "objective.path_weight=0", "preview.every=100"])
    run = start(recipe, resume=False)
    counts = {name: sum(count for _, count in spans) for name, spans in run.data.buckets.items()}
    assert len(counts) > 2 and sum(counts.values()) == 60 and max(counts.values()) < 30
    for name, spans in run.data.buckets.items():
        side = [int(one) for one in name.split("x")]
        assert tuple(run.data.latents([spans[0][0]]).shape[1:]) == run.backbone.latent_shape(tuple(side))
    shapes = set()
    for _ in range(12):
        shapes.add(tuple(make_batch(run, torch.arange(4)).x.shape[1:]))
        assert training_step(run)["skipped"] == 0
    assert len(shapes) > 2


def test_buckets_train(any_aspect: Path, recipe_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    for index in range(12):
        Image.new("RGB", (64, 64) if index % 3 else (64, 128), "red").save(source / f"{index}.png")
        (source / f"{index}.txt").write_text("a red square")
    overrides = [f"data.source={source}", "data.buckets=true", f"model={any_aspect}"]
    run = start(load_recipe(recipe_file, overrides), resume=False)
    shapes = set()
    for _ in range(5):
        shapes.add(tuple(make_batch(run, torch.arange(4)).x.shape[1:]))
        training_step(run)
    assert len(shapes) == 2 and run.bad == 0


def test_prompts_alone_train_what_starts_from_noise_and_nothing_else(recipe_file: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a red star\na photo of two rings\n" * 4)
    source = f"data.source={prompts}"
    both = ["objective.share=1", "objective.path_rows=all"]
    for index, objective in enumerate((["objective.path_weight=0"], both)):
        run = start(load_recipe(recipe_file, [source, *objective, f"output={tmp_path / str(index)}"]), resume=False)
        first = training_step(run)
        # No picture is read: the losses are the same whatever stands in their place.
        other = start(load_recipe(recipe_file, [source, *objective, f"output={tmp_path / f'x{index}'}"]), resume=False)
        other.data.latents = lambda rows: torch.full((len(rows), 8, 8, 8), 1e3)  # type: ignore[method-assign]
        second = training_step(other)
        assert first["loss"] == second["loss"] and first["grad_norm"] == second["grad_norm"]
    for overrides in ([], ["method=flow_matching"], ["objective.path_velocity=sample", *both]):
        with pytest.raises(UserError, match=r"only prompts.*starts from pictures.*apexflow synthesize"):
            start(load_recipe(recipe_file, [source, *overrides, f"output={tmp_path / 'no'}"]), resume=False)


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, True),
        ({"path_weight": 0.0}, False),
        ({"share": 1.0, "path_rows": "all"}, False),
        ({"share": 1.0, "path_rows": "all", "path_velocity": "sample"}, True),
        ({"path_weight": 0.0, "path_velocity": "sample"}, False),
        ({"share": 1.0, "path_rows": "all", "endpoint_weight": 0.0}, True),
        ({"path_weight": 0.0, "pairing": "printed"}, True),
    ],
)
def test_which_readings_need_pictures(fields: dict, needs: bool) -> None:
    assert APEX(**fields).needs_pictures is needs
