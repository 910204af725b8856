"""FID against closed forms and the textbook square root; the resizes that name a protocol."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm

from apexflow.errors import UserError
from apexflow.evaluation.fid import RunningStatistics, clean_resize, fid_from_statistics, sana_resize, statistics

RNG = np.random.default_rng(0)


def fid_from_features(a: np.ndarray, b: np.ndarray) -> float:
    return fid_from_statistics(*statistics(a), *statistics(b))


def covariance(size: int, rows: int) -> np.ndarray:
    return np.cov(RNG.standard_normal((rows, size)) * np.linspace(0.1, 2, size), rowvar=False)


def test_commuting_covariances_have_a_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 2.0])
    expected = 3 * 2.0**2 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert fid_from_statistics(np.zeros(3), np.diag(a), np.full(3, 2.0), np.diag(b)) == pytest.approx(
        expected, rel=1e-12
    )


def test_agrees_with_the_matrix_square_root() -> None:
    s1, s2, mu1, mu2 = covariance(40, 200), covariance(40, 300), RNG.standard_normal(40), RNG.standard_normal(40)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert fid_from_statistics(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)
    assert fid_from_statistics(mu2, s2, mu1, s1) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_the_eigenvalues_of_the_product_without_full_rank() -> None:
    for rows, size in ((20, 64), (64, 64), (3, 40)):
        a, b = (
            RNG.standard_normal((rows, size)) * np.linspace(0.01, 3, size),
            RNG.standard_normal((rows + 5, size)) + 0.3,
        )
        s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).sum().real
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
        assert fid_from_features(a, b) == pytest.approx(expected, rel=1e-6)


def test_features_and_rank_deficient_sets() -> None:
    a, b = RNG.standard_normal((20, 64)), RNG.standard_normal((30, 64)).astype(np.float32) + 1
    assert fid_from_features(a, a) == pytest.approx(0, abs=1e-9)
    assert fid_from_features(a, b) == pytest.approx(fid_from_features(b, a), rel=1e-7)
    assert fid_from_features(a, a + 0.5) == pytest.approx(64 * 0.25, rel=1e-9)
    assert fid_from_features(a[:, :1], a[:, :1]) == pytest.approx(0, abs=1e-12)
    flat = np.ones((5, 3))
    assert fid_from_features(flat, flat + 1) == pytest.approx(3)


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="two images"):
        fid_from_features(np.zeros((1, 4)), np.zeros((5, 4)))
    with pytest.raises(UserError, match="NaN"):
        fid_from_features(np.full((3, 4), np.nan), np.zeros((5, 4)))
    with pytest.raises(UserError, match="same feature network"):
        fid_from_features(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(UserError, match="finite"):
        fid_from_statistics(np.zeros(2), np.full((2, 2), np.inf), np.zeros(2), np.eye(2))


def test_running_statistics_in_any_batches() -> None:
    rows = RNG.standard_normal((50, 6)) + 1e4
    running = RunningStatistics(6)
    for part in (rows[:1], rows[1:20], rows[20:]):
        running.add(part)
    mean, sigma = running.result()
    np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-10)
    with pytest.raises(UserError):
        RunningStatistics(2).result()


def test_clean_resize_is_unrounded_and_antialiased() -> None:
    pixels = RNG.integers(0, 256, (64, 48, 3), dtype=np.uint8)
    resized = clean_resize(Image.fromarray(pixels), 17)
    assert resized.shape == (17, 17, 3) and resized.dtype == np.float32
    assert resized.min() >= 0 and resized.max() <= 255 and (resized % 1 != 0).any()
    rounded = np.asarray(Image.fromarray(pixels).resize((17, 17), Image.Resampling.BICUBIC), dtype=float)
    assert 0 < np.abs(rounded - resized).max() < 2  # 8 bits round between the two passes and after them
    np.testing.assert_array_equal(clean_resize(Image.fromarray(pixels[:48]), 48), pixels[:48])
    assert clean_resize(Image.new("L", (4, 4), 7), 8) == pytest.approx(7)


def test_sana_resize_crops_the_centre() -> None:
    wide = Image.new("RGBA", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    square = sana_resize(wide, 50)
    assert (square.size, square.mode) == ((50, 50), "RGB")
    assert square.getpixel((25, 25)) == (0, 0, 255)
