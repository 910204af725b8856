"""The suites of real pictures and of taste, MJHQ-30K and PickScore, on tiny random models, with no way to a network."""

from __future__ import annotations

import hashlib
from pathlib import Path

import little
import numpy as np
import pytest
import torch
from little import rows_of, settings
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer

from apexflow.errors import UserError
from apexflow.evaluation import features
from apexflow.evaluation.clip import preprocess, tokenize
from apexflow.evaluation.fid import fid_from_statistics, statistics
from apexflow.evaluation.runner import Tools, evaluate, score_folder
from apexflow.generator import Generator

pytestmark = pytest.mark.usefixtures("no_network")


def test_mjhq(
    generator: Generator, inception_file: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apexflow.evaluation.against.CHUNK", 4)
    (tmp_path / "mjhq").mkdir()
    data = little.mjhq_folder(tmp_path / "mjhq")
    tools = Tools(data=data, inception=inception_file, clip=clip_folder)
    report = evaluate(generator, settings("mjhq", limit=5), tmp_path / "e", tools=tools)
    assert sorted(path.name for path in (tmp_path / "e" / "pictures").iterdir()) == [f"id{i}.jpg" for i in range(5)]
    assert "fid (sana, 64 px, 5 pictures)" in report["tasks"] and report["scoring"]["fid_size"] == 64
    assert report["reference_pictures"] == 5 and report["fid"] > 0
    assert report["reference"] == str(data.resolve()) and len(report["scoring"]["reference_sha256"]) == 64
    assert report["clip"] == pytest.approx(np.mean([row["clip"] for row in rows_of(tmp_path / "e")]))
    # The same from the features themselves, and from statistics in a file.
    kept = {
        name: np.concatenate(list(store.chunks(store.keys())))
        for name in ("features", "reference")
        for store in [features.FeatureStore(tmp_path / "e" / name)]
    }
    assert report["fid"] == pytest.approx(
        fid_from_statistics(*statistics(kept["features"]), *statistics(kept["reference"])), rel=1e-6
    )
    mu, sigma = kept["reference"].mean(0, dtype=np.float64), np.cov(kept["reference"].astype(np.float64), rowvar=False)
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=sigma)
    again = Tools(inception=inception_file, reference=tmp_path / "reference.npz", data=data)
    scored = score_folder(tmp_path / "e" / "pictures", settings("mjhq", limit=5), None, "x", again)
    assert scored["fid"] == pytest.approx(report["fid"], rel=1e-6) and "clip" not in scored
    file = hashlib.sha256((tmp_path / "reference.npz").read_bytes()).hexdigest()
    assert scored["scoring"]["reference_sha256"] == file and scored["reference"] == str(tmp_path / "reference.npz")
    # A folder holds one way of scoring: its rows would not fit another.
    with pytest.raises(UserError, match="different clip_weights and reference_sha256"):
        score_folder(tmp_path / "e" / "pictures", settings("mjhq", limit=5), tmp_path / "e", "x", again)
    # Another size and other protocols are other numbers.
    for changes in ({"fid_size": 32}, {"protocol": "clean"}, {"protocol": "torch-fidelity"}):
        other = Tools(data=data, inception=inception_file, **changes)
        found = score_folder(tmp_path / "e" / "pictures", settings("mjhq", limit=5), None, "x", other)
        assert found["fid"] != pytest.approx(report["fid"], rel=1e-3)


def test_mjhq_trouble(inception_file: Path, clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mjhq").mkdir()
    data, pictures = little.mjhq_folder(tmp_path / "mjhq"), tmp_path / "pictures"
    pictures.mkdir()
    for index in range(4):
        Image.effect_noise((64, 64), 30).convert("RGB").save(pictures / f"id{index}.png")
    (pictures / "id3.png").write_bytes(b"x")
    all_of = settings("mjhq", limit=None)
    report = score_folder(pictures, all_of, None, "x", Tools(data=data, inception=inception_file, clip=clip_folder))
    assert (
        report["pictures"] == 3
        and report["missing"] == ["id4.jpg", "id5.jpg"]
        and list(report["failed"]) == ["id3.png"]
    )
    (data / "imgs" / "logo" / "id0.jpg").unlink()
    with pytest.raises(UserError, match="1 of 6 reference pictures"):
        score_folder(pictures, all_of, None, "x", Tools(data=data, inception=inception_file))
    wrong = tmp_path / "wrong.safetensors"
    tensors = little.inception_tensors(16)
    del tensors["Mixed_5b.branch1x1.conv.weight"]
    save_file(tensors, wrong)
    for tools, word in (
        (Tools(data=data), "--inception"),
        (Tools(data=data, inception=tmp_path / "none"), "--inception"),
        (Tools(data=data, inception=wrong), "Mixed_5b.branch1x1"),
        (Tools(data=data, inception=inception_file, protocol="cleaner"), "cleaner"),
        (Tools(data=data, inception=inception_file, protocol="clean", fid_size=64), "--fid-size"),
        (Tools(data=data, clip=clip_folder, fid_size=64), "--inception"),
        (Tools(data=data, inception=inception_file, reference=wrong), "mu"),
        (Tools(inception=inception_file), "--data"),
    ):
        with pytest.raises(UserError, match=word):
            score_folder(pictures, all_of, None, "x", tools)


def test_pickscore(generator: Generator, clip_folder: Path, tmp_path: Path) -> None:
    model, prompts = little.clip(tmp_path / "pickscore", "gelu"), tmp_path / "prompts.txt"
    prompts.write_text("a red star\n\na blue ring\na green heart\n")
    tools = Tools(data=prompts, clip=model)
    report = evaluate(generator, settings("pickscore", limit=None), tmp_path / "e", tools=tools)
    pictures = sorted((tmp_path / "e" / "pictures").iterdir())
    assert [path.name for path in pictures] == ["00000.png", "00001.png", "00002.png"]
    assert report["complete"] and [row["prompt"] for row in rows_of(tmp_path / "e")][1] == "a blue ring"
    # As transformers' own model scores them, scale included.
    texts = tokenize(CLIPTokenizer.from_pretrained(model), ["a red star", "a blue ring", "a green heart"])
    pixels = torch.stack([preprocess(Image.open(path), 32) for path in pictures])
    with torch.no_grad():
        own = CLIPModel.from_pretrained(model)(input_ids=texts, pixel_values=pixels)
    scores = own.logits_per_image.diag()
    assert [row["pickscore"] for row in rows_of(tmp_path / "e")] == pytest.approx(scores.tolist(), rel=1e-5)
    assert report["overall"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert report["overall_se"] == pytest.approx(scores.std().item() / 3**0.5, rel=1e-3)
    pictures[0].write_bytes(b"x")
    pictures[1].unlink()
    again = score_folder(pictures[0].parent, settings("pickscore", limit=None), tmp_path / "s", "x", tools)
    assert (list(again["failed"]), again["missing"], again["complete"]) == (["00000.png"], ["00001.png"], False)
    assert again["overall"] == pytest.approx(scores[2].item(), rel=1e-5) and again["overall_se"] is None
    with pytest.raises(UserError, match="hidden_act gelu"):
        score_folder(pictures[0].parent, settings("pickscore"), None, "x", Tools(data=prompts, clip=clip_folder))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"a red star"\n""\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:2: caption empty"):
        score_folder(pictures[0].parent, settings("pickscore"), None, "x", Tools(data=prompts, clip=model))
