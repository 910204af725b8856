"""What makes the miniature's parts: the reading lesson of its text encoder and the fit of its autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from apexflow.backbones.miniature import build_miniature
from apexflow.data.scenes import COLORS, SHAPES, vocabulary
from apexflow.training.autoencoder import fit_autoencoder, load_images, reconstruction_loss
from apexflow.training.text_encoder import FACTS, fit_text_encoder, known


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of a red star left of a blue ring", ("star", "red", None, "left", "ring", "blue")),
        ("a photo of three pink crosses", ("cross", "pink", "three", None, None, None)),
        ("a photo of a heart and a square", ("heart", None, None, None, "square", None)),
        ("a photo of an orange circle", ("circle", "orange", None, None, None, None)),
    ],
)
def test_the_last_word_knows_the_whole_caption(caption: str, expected: tuple[str | None, ...]) -> None:
    from apexflow.training.text_encoder import WORDS

    last = known([caption], len(caption.split()) + 1)[0, -1].tolist()
    names = [WORDS[fact.split()[0]][index - 1] if index else None for fact, index in zip(FACTS, last, strict=True)]
    assert tuple(names) == expected


def test_no_word_knows_what_comes_after_it() -> None:
    facts = known(["a photo of a red star left of a blue ring"], 12)[0]
    assert facts[4].tolist() == [0] * 6  # "a red": a colour without its shape is no fact yet
    assert facts[6].tolist() == [SHAPES.index("star") + 1, list(COLORS).index("red") + 1, 0, 0, 0, 0]
    assert facts[10].tolist()[3:] == [1, 0, 0]  # "left ... blue": the relation, and no second thing yet
    assert facts[11].tolist()[4:] == [SHAPES.index("ring") + 1, list(COLORS).index("blue") + 1]


def test_the_text_encoder_learns_to_read() -> None:
    backbone = build_miniature(vocabulary(), width=32, depth=1)
    before = {name: p.clone() for name, p in backbone.text_encoder.state_dict().items()}
    early = fit_text_encoder(backbone.text_encoder, backbone.tokenizer, steps=2, seed=0, batch=16)
    late = fit_text_encoder(backbone.text_encoder, backbone.tokenizer, steps=30, seed=0, batch=16)
    assert late > early + 0.2
    assert any(not torch.equal(before[name], p) for name, p in backbone.text_encoder.state_dict().items())
    assert not any(p.requires_grad for p in backbone.text_encoder.parameters())


def test_the_autoencoder_learns_to_see(scene_folder: Path) -> None:
    backbone = build_miniature(vocabulary(), width=32, depth=1)
    x = load_images(scene_folder, (64, 64), 8).float() / 127.5 - 1

    def error() -> float:
        with torch.no_grad():
            return float(reconstruction_loss(backbone.vae, x, torch.Generator().manual_seed(0))[1])

    before = error()
    fit_autoencoder(backbone.vae, [scene_folder], (64, 64), steps=6, seed=0, pictures=16)
    assert error() < before


def test_a_miniature_is_saved_without_bars_of_the_libraries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backbone = build_miniature(vocabulary(), width=32, depth=1)
    transformers.utils.logging.enable_progress_bar()  # as it is before any model was loaded
    backbone.save(tmp_path / "model", backbone.settings)
    assert capfd.readouterr().err == ""
