"""`apexflow export --rank`: a LoRA out of a model that was tuned whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock import largest_difference, load_stock, one_step
from stock_runs import PROMPTS, SIZE, noise, our_latents
from test_lora import RANK, tuned
from tiny import BUILDERS

from apexflow.backbones import load_backbone
from apexflow.backbones.lora_targets import target_modules
from apexflow.errors import UserError
from apexflow.export import export, save_lora
from apexflow.export.factors import factor, nearest
from apexflow.lora.merge import FILE
from apexflow.sampler import time_grid


def planted(base, folder, **settings):
    """A whole model whose difference to its base has the rank RANK, and the roles that it is of."""
    roles = tuned(base)
    backbone, tuning = roles.backbone, roles.backbone.transformer
    backbone.transformer = roles.final()
    backbone.save(folder, replace(backbone.settings, **settings))
    backbone.transformer = tuning
    return roles


def randomly_changed(base, folder):
    """A whole model that differs from its base in every weight of the denoiser."""
    backbone = load_backbone(str(base))
    torch.manual_seed(0)
    for parameter in backbone.transformer.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    backbone.save(folder, backbone.settings)
    return backbone


@pytest.mark.parametrize("name", BUILDERS)
def test_the_targets_are_where_adapters_lie(name, folder_of):
    trained = tuned(folder_of(name)).trained
    targets = target_modules(load_backbone(str(folder_of(name)), "meta"))
    assert set(targets) == {key.rpartition(".lora_")[0] for key in trained}
    for module, (out, into, *_) in targets.items():
        assert (len(trained[f"{module}.lora_B.weight"]), trained[f"{module}.lora_A.weight"].shape[1]) == (out, into)


@pytest.mark.parametrize("name", ["sana", "qwen_image", "sdxl"])
def test_a_planted_difference_comes_back_exactly(name, folder_of, tmp_path):
    base, student = folder_of(name), tmp_path / "student"
    roles = planted(base, student)
    result = export(str(student), tmp_path / "out", base=str(base), rank=RANK)
    with safe_open(tmp_path / "out" / FILE, "pt") as opened:  # as of a run's LoRA
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert said[f"{roles.backbone.network_part}.target_modules"] == sorted(roles.backbone.lora_targets)
    assert result["kind"] == "lora" and result["kept"] == pytest.approx(1, abs=1e-6) and result["outside"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {FILE, "README.md", "apexflow.json"}
    pipeline, z = load_stock(base), noise(roles.backbone)
    before = one_step(name, pipeline, PROMPTS, z, SIZE, "latent")
    pipeline.load_lora_weights(tmp_path / "out")
    after = one_step(name, pipeline, PROMPTS, z, SIZE, "latent")
    with roles.shipped():
        ours = our_latents(roles.backbone, z, time_grid(1))
    assert largest_difference(after, ours) < 1e-5 and largest_difference(after, before) > 1e-3
    # And is read and merged as any other LoRA.
    export(str(tmp_path / "out"), tmp_path / "merged", merge=True, base=str(base))
    part = roles.backbone.network_part
    merged, whole = (
        load_file(next((folder / part).glob("*.safetensors"))) for folder in (tmp_path / "merged", student)
    )
    assert all(torch.allclose(merged[key], tensor, atol=1e-5) for key, tensor in whole.items())


def test_what_it_keeps_and_what_lies_outside(run, folder_of, tmp_path):
    base, student = folder_of("sana"), tmp_path / "student"
    tuned_whole = randomly_changed(base, student)
    arguments = ("export", student, "--base", base, "--rank", 4, "-o")
    code, out, errors = run(*arguments, tmp_path / "out", "--json")
    assert code == 0, errors
    told = json.loads(out)
    ours, original = (load_file(next((folder / "transformer").glob("*.safetensors"))) for folder in (student, base))
    inside = outside = kept = 0.0
    targets = target_modules(tuned_whole)
    for name, tensor in ours.items():
        difference = tensor.double() - original[name].double()
        if name.removesuffix(".weight") in targets and name.endswith(".weight"):
            values = torch.linalg.svdvals(difference.flatten(1))
            inside, kept = inside + float(difference.square().sum()), kept + float(values[:4].square().sum())
        else:
            outside += float(difference.square().sum())
    assert told["kept"] == pytest.approx(kept / inside, rel=1e-3) and 0.1 < told["kept"] < 0.9
    assert told["outside"] == pytest.approx(outside / (inside + outside), rel=1e-3) and told["outside"] > 0
    assert "is not in it" in told["told"] and told["told"] in (tmp_path / "out" / "README.md").read_text()
    assert told["told"] in run(*arguments, tmp_path / "again")[1]
    one, other = (load_file(tmp_path / folder / FILE) for folder in ("out", "again"))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    # More than the rank of a weight is no more than all of it.
    result = export(str(student), tmp_path / "all", base=str(base), rank=1000)
    assert result["kept"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(300, 400), (90, 20, 3, 3)])
def test_the_nearest_pair_is_as_near_as_the_exact_one(shape):
    difference = torch.randn(*shape, generator=torch.Generator().manual_seed(0))  # a flat spectrum: the worst case
    pair, kept = nearest(difference, 16)
    assert pair.fits(shape) and len(pair.down) == 16
    best = float(torch.linalg.svdvals(difference.flatten(1))[:16].square().sum())
    assert 0.99 * best < kept <= best * (1 + 1e-5)
    rest = float((difference - pair.delta(shape)).square().sum())
    assert rest == pytest.approx(float(difference.square().sum()) - kept, rel=1e-4)  # the share that is told is true


def test_a_run_knows_its_base(folder_of, tmp_path):
    folder, base = tmp_path / "run", folder_of("sana")
    recipe = {"model": str(base), "tuning": {"kind": "full"}}
    folder.mkdir()
    planted(base, folder / "model", card={"recipe": recipe})
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert export(str(folder), tmp_path / "out", rank=RANK)["kept"] > 0.999
    assert f"from_pretrained({str(base)!r}" in (tmp_path / "out" / "README.md").read_text()
    refused(("records its base", "leave out --base"), str(folder), tmp_path / "o", rank=RANK, base=str(base))
    recipe["tuning"]["text_encoder"] = True
    (folder / "model" / "apexflow.json").write_text(json.dumps({"card": {"recipe": recipe}}))
    refused(("text encoder", "leave out --rank"), str(folder), tmp_path / "o", rank=RANK)


@pytest.mark.parametrize(("named", "wrong"), [("sana", "none to extract"), ("sana_sprint", "names or shapes")])
def test_a_run_that_holds_no_lora_is_told_a_mend_that_runs_take(named, wrong, folder_of, tmp_path):
    """One whose weights are still those of its base, and one that has more of them, as of a deeper student."""
    folder, base = tmp_path / "run", folder_of("sana")
    recipe = {"model": str(folder_of(named)), "tuning": {"kind": "full"}}
    shutil.copytree(base, folder / "model")
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match=f"{wrong}.*leave out --rank") as caught:
        export(str(folder), tmp_path / "o", rank=RANK)
    assert "--base" not in str(caught.value)


def test_what_has_no_lora_to_be_taken_out(folder_of, tmp_path):
    base, student, output = str(folder_of("sana")), tmp_path / "student", tmp_path / "o"
    roles = planted(folder_of("sana"), student)
    refused(("--base",), str(student), output, rank=RANK)
    refused(("no LoRA to merge", "--merge"), str(student), output, rank=RANK, base=base, merge=True)
    refused(("none to extract", "--base"), base, output, rank=RANK, base=base)
    refused(("names or shapes", "--base"), str(student), output, rank=RANK, base=str(folder_of("sana_sprint")))
    file = save_lora(roles, tmp_path / "lora")
    refused(("a LoRA already", "--rank"), str(file), output, rank=RANK, base=base)
    pixart = str(folder_of("pixart_sigma"))
    refused(("cannot load a LoRA",), pixart, output, rank=RANK, base=pixart)
    weights = next((student / "transformer").glob("*.safetensors"))
    broken = {name: tensor * float("nan") for name, tensor in load_file(weights).items()}
    save_file(broken, weights)
    refused(("not finite", "student"), str(student), output, rank=RANK, base=base)
    with pytest.raises(UserError, match="incomplete"):
        factor(tmp_path / "lora", tmp_path / "lora", (), 1, "")


def refused(words, *arguments, **named):
    with pytest.raises(UserError) as caught:
        export(*arguments, **named)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
    assert not arguments[1].exists()
