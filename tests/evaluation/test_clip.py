"""CLIP's preprocessing, truncation and score, and GenEval's colours on a tiny random model from a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from apexflow.errors import UserError
from apexflow.evaluation.clip import Clip, preprocess, tokenize, truncate
from apexflow.evaluation.geneval import COLORS, ColorClassifier


def test_truncation_keeps_the_end_token() -> None:
    assert truncate(range(77)) == list(range(77))
    assert truncate(range(100)) == [*range(76), 99]
    assert truncate([1, 2, 3], 2) == [1, 3]
    rows = tokenize(lambda text, **_: {"input_ids": [8, *range(len(text)), 9]}, ["abc", "", "a" * 50], 6)
    assert rows.tolist() == [[8, 0, 1, 2, 9, 0], [8, 9, 0, 0, 0, 0], [8, 0, 1, 2, 3, 9]]


def test_preprocess_takes_the_centre() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste((0, 0, 255), (100, 0, 200, 100))
    pixels = preprocess(wide, 50)
    blue = (torch.tensor([0.0, 0, 1]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    assert pixels.shape == (3, 50, 50)
    torch.testing.assert_close(pixels[:, 25, 25], blue)
    with pytest.raises(UserError):
        preprocess(wide.crop((0, 0, 0, 0)))


def test_score_reads_the_text_at_its_end(clip_folder: Path) -> None:
    clip = Clip.load(clip_folder)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 33, 3), dtype=np.uint8)) for i in range(2)]
    score = clip.score(images, ["red cat", "a dog"])
    cosine = (clip.encode_images(images) * clip.encode_texts(["red cat", "a dog"])).sum(-1)
    torch.testing.assert_close(score, clip.model.logit_scale.exp() * cosine)
    torch.testing.assert_close(clip.score(images[1:], ["a dog"]), score[1:])  # the batch does not matter
    long = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4
    torch.testing.assert_close(clip.encode_texts([long]), clip.encode_texts([long + "zzz"]))
    assert not torch.allclose(clip.encode_texts([long]), clip.encode_texts(["b " + long]))
    with pytest.raises(UserError, match="one prompt"):
        clip.score(images, ["red cat"])


def test_colours_of_kept_objects(clip_folder: Path) -> None:
    classifier = ColorClassifier(Clip.load(clip_folder))
    weights = classifier.weights("dog")
    assert weights.shape == (10, 8) and torch.allclose(weights.norm(dim=1), torch.ones(10))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    masks = {"dog": np.zeros((3, 40, 40), bool)}
    masks["dog"][2, 5:20, 5:20] = True
    color_of = classifier.color_of(image, masks, {"dog": [2, 0]})
    boxes = np.float32([[5, 5, 20, 20, 0.9], [0, 0, 40, 40, 0.8]])
    alone, both = color_of("dog", boxes[:1]), color_of("dog", boxes)
    assert len(both) == 2 and both[:1] == alone and set(both) <= set(COLORS)
    assert classifier.classify("dog", []) == []
    assert alone == classifier.classify("dog", [image.crop((5, 5, 20, 20))])  # its own mask fills its own box


def test_folder_mistakes(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CLIP folder"):
        Clip.load(tmp_path / "absent")
    model = CLIPModel.from_pretrained(clip_folder)
    model.config.text_config.hidden_act = "gelu"
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="quick_gelu"):
        Clip.load(tmp_path)
    tokenizer = tmp_path / "no tokenizer"
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tokenizer)
    with pytest.raises(UserError, match=r"no tokenizer has \d+ words of"):
        Clip.load(tokenizer)
    part = tmp_path / "part"
    model.save_pretrained(part, state_dict={k: v for k, v in model.state_dict().items() if k != "logit_scale"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a CLIPModel \(such as logit_scale\)"):
        Clip.load(part)
    (part / "model.safetensors").rename(part / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot load .*part"):
        Clip.load(part)  # never unpickled
