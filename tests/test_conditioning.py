"""The condition, its shift (Eq. 16), rows and padding, and guidance."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from apexflow.conditioning import Condition, guide, guided_answer, pad_tokens


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(rows: int = 4, tokens: int = 3, width: int = 5, pooled: int = 5) -> Condition:
    mask = (torch.arange(tokens) < torch.arange(rows)[:, None]).long()
    return Condition(draw(rows, tokens, width), mask, draw(rows, pooled, seed=1))


def test_floats_shift_text_and_pooled_alike() -> None:
    c = full(pooled=7)
    shifted = c.shift(-0.5, 1.0)
    assert shifted.pooled is not None and c.pooled is not None
    torch.testing.assert_close(shifted.embeds, -0.5 * c.embeds + 1)
    torch.testing.assert_close(shifted.pooled, -0.5 * c.pooled + 1)


def test_a_vector_is_a_diagonal_matrix() -> None:
    c, a, b = full(), draw(5, seed=2), draw(5, seed=3)
    vector, matrix = c.shift(a, b), c.shift(torch.diag(a), b)
    torch.testing.assert_close(vector.embeds, matrix.embeds)
    torch.testing.assert_close(vector.pooled, matrix.pooled)


def test_a_matrix_multiplies_each_token_from_the_left() -> None:
    c, A, b = full(), draw(5, 5, seed=2), draw(5, seed=3)
    shifted = c.shift(A, b)
    torch.testing.assert_close(shifted.embeds[1, 2], A @ c.embeds[1, 2] + b)
    assert shifted.pooled is not None and c.pooled is not None
    torch.testing.assert_close(shifted.pooled[1], A @ c.pooled[1] + b)


@pytest.mark.parametrize(("a", "b"), [(draw(5), 0.0), (1.0, draw(5)), (draw(5, 5), draw(5))], ids=["a", "b", "A"])
def test_pooled_of_another_width_is_left_alone_by_vectors(a: float | Tensor, b: float | Tensor) -> None:
    c = full(pooled=7)
    shifted = c.shift(a, b)
    assert shifted.pooled is c.pooled
    assert not torch.equal(shifted.embeds, c.embeds)


@pytest.mark.parametrize(("a", "b"), [(-0.5, 1.0), (draw(5), draw(5)), (draw(5, 5), 0.0)], ids=["float", "vector", "A"])
def test_shift_keeps_the_mask_and_leaves_the_original_as_it_was(a: float | Tensor, b: float | Tensor) -> None:
    c = full()
    before = c.embeds.clone()
    assert c.shift(a, b).mask is c.mask
    assert torch.equal(c.embeds, before)


def test_the_identity_shift_changes_nothing() -> None:
    c = full()
    assert torch.equal(c.shift(1.0, 0.0).embeds, c.embeds)
    assert torch.equal(c.shift(torch.eye(5), 0.0).embeds, c.embeds)


def test_shift_keeps_the_dtype_of_the_text() -> None:
    c = Condition(draw(4, 3, 5).bfloat16())
    assert c.shift(draw(5, 5), draw(5)).embeds.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([2, 0]), slice(0, 2), [True, False, False, True]], ids=str)
def test_rows_are_taken_from_every_part(rows: Tensor | slice | Sequence[int]) -> None:
    c = full()
    picked = c[rows]
    assert c.mask is not None and c.pooled is not None and picked.mask is not None and picked.pooled is not None
    assert len(picked) == 2
    for part, whole in ((picked.embeds, c.embeds), (picked.mask, c.mask), (picked.pooled, c.pooled)):
        assert torch.equal(part, whole[rows])


def test_no_row_is_an_empty_condition() -> None:
    empty = full()[torch.zeros(4, dtype=torch.bool)]
    assert len(empty) == 0 and empty.embeds.shape == (0, 3, 5)


def test_expand_repeats_the_one_row() -> None:
    c = full()[:1].expand(3)
    assert len(c) == 3 and c.mask is not None and c.mask.shape == (3, 3)
    assert torch.equal(c.embeds[2], c.embeds[0])


def test_padding_never_cuts() -> None:
    text = draw(1, 4, 5)
    assert pad_tokens(text, 2) is text and pad_tokens(text, 6).shape == (1, 6, 5)


def test_guidance_is_a_line_through_both_answers() -> None:
    c, null = draw(2, 3), draw(2, 3, seed=1)
    torch.testing.assert_close(guide(c, null, 1.0), c)
    assert torch.equal(guide(c, null, 0.0), null)
    torch.testing.assert_close(guide(c, null, 2.5), 2.5 * c - 1.5 * null)


@pytest.mark.parametrize("at_once", [False, True])
def test_guidance_everywhere_looks_at_no_time(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU such a look waits for all that was asked before."""
    looks: list[Tensor] = []
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: looks.append(tensor) or True, raising=False)
    x_t, t, c = draw(3, 1, 2, 2), torch.tensor([0.2, 0.5, 0.9]), Condition(draw(3, 5, 4))
    for above in (0.0, 0.5):
        guided_answer(lambda x_t, t, c: x_t, x_t, t, c, c, 3.0, at_once=at_once, above=above)
        assert bool(looks) == (above > 0)


@pytest.mark.parametrize(
    ("embeds", "mask", "pooled", "named"),
    [
        (draw(2, 5), None, None, "embeds"),
        (draw(2, 3, 5), draw(2, 4), None, "mask"),
        (draw(2, 3, 5), None, draw(3, 5), "pooled"),
        (draw(2, 3, 5), None, draw(2, 1, 5), "pooled"),
    ],
    ids=["embeds", "mask", "pooled rows", "pooled axes"],
)
def test_parts_that_do_not_fit_are_refused(
    embeds: Tensor, mask: Tensor | None, pooled: Tensor | None, named: str
) -> None:
    with pytest.raises(ValueError, match=f"{named} must be"):
        Condition(embeds, mask, pooled)
