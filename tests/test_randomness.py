"""Random numbers that belong to rows: independent of micro-batches, distinct between rows, steps and seeds."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from apexflow.randomness import RowRandom, mix


def test_a_row_gets_the_same_numbers_in_any_micro_batch() -> None:
    whole, piece = RowRandom(3, 5, range(6)), RowRandom(3, 5, [4, 1])
    assert torch.equal(whole.normal((2, 3))[[4, 1]], piece.normal((2, 3)))
    assert torch.equal(whole.uniform()[[4, 1]], piece.uniform())


def test_marked_rows_alone_draw_and_the_others_stand_still() -> None:
    where = torch.tensor([False, True, True])
    random, fresh = RowRandom(0, 0, range(3)), RowRandom(0, 0, range(3))
    drawn = random.normal((4,), where)
    later, first = random.normal((4,)), fresh.normal((4,))
    assert torch.equal(drawn, first[1:])
    assert torch.equal(later[0], first[0]) and not torch.equal(later[1], first[1])


def test_a_row_is_the_same_whether_or_not_its_neighbours_are_marked() -> None:
    some, every = RowRandom(0, 0, range(3)), RowRandom(0, 0, range(3))
    assert torch.equal(some.uniform(torch.tensor([False, True, False])), every.uniform(torch.ones(3).bool())[1:2])


def test_no_marked_row_draws_nothing_of_the_right_shape() -> None:
    random, nobody = RowRandom(0, 0, range(3)), torch.zeros(3, dtype=torch.bool)
    assert random.normal((2, 5), nobody).shape == (0, 2, 5) and random.uniform(nobody).shape == (0,)


def test_marks_must_name_every_row() -> None:
    with pytest.raises(ValueError):
        RowRandom(0, 0, range(3)).uniform(torch.tensor([True, False]))


def test_seeds_steps_and_rows_all_matter() -> None:
    drawn = {tuple(RowRandom(*key[:2], [key[2]]).normal((2,))[0].tolist()) for key in product(range(3), repeat=3)}
    assert len(drawn) == 27


def test_draws_have_their_moments_across_rows_and_steps() -> None:
    randoms = [RowRandom(0, step, range(100)) for step in range(20)]
    normal = torch.stack([random.normal(()) for random in randoms])  # (steps, rows), one number each
    uniform = torch.stack([random.uniform() for random in randoms])
    assert abs(normal.mean()) < 0.08 and abs(normal.var() - 1) < 0.1
    assert abs(uniform.mean() - 0.5) < 0.025 and uniform.min() >= 0 and uniform.max() < 1
    assert abs((normal[:, 1:] * normal[:, :-1]).mean()) < 0.08 and abs((normal[1:] * normal[:-1]).mean()) < 0.08


def test_mixed_seeds_are_distinct_ordered_and_fit_63_bits() -> None:
    mixed = [mix(*key) for key in product(range(12), repeat=3)]
    assert len(set(mixed)) == 12**3
    assert min(mixed) >= 0 and max(mixed) < 2**63
    assert mix(1, 2) != mix(2, 1) and mix(1) != mix(1, 0)


def test_mixed_seeds_are_what_saved_runs_rely_on() -> None:
    state = 0x9E3779B97F4A7C15 ^ 7
    state = state * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    assert mix(7) == (state ^ (state >> 31)) // 2


def test_large_and_negative_numbers_are_allowed() -> None:
    assert len({mix(2**70 + 1), mix(-1), mix(1)}) == 2  # taken modulo 2^64
    assert RowRandom(-1, 10**12, [2**40]).normal((1,)).isfinite().all()
