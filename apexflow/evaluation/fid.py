"""FID between feature sets, and the image resizes that name a protocol. Pure functions: features in, number out.

Source: Heusel et al. 2017 (the distance), Sana's metrics (protocol "sana"), GaParmar/clean-fid (protocol "clean").
The numbers of two protocols cannot be compared, nor can those of two image sizes: print both beside the score.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from apexflow.data.pictures import square
from apexflow.errors import UserError

Array = NDArray[np.float64]


def statistics(features: ArrayLike) -> tuple[Array, Array]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64."""
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] < 2:
        raise UserError(f"FID features have shape {rows.shape}: give (N, D) with at least two images")
    if not np.isfinite(rows).all():
        raise UserError("FID features hold NaN or infinity: an image or the feature network is broken")
    return rows.mean(axis=0), np.cov(rows, rowvar=False).reshape(rows.shape[1], rows.shape[1])


def fid_from_statistics(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) for means (D,) and covariances (D, D), at least 0.

    The trace of the root is the sum of the roots of the eigenvalues of S1 S2. These are the eigenvalues of the
    symmetric R^T S2 R with S1 = R R^T, which are real, cheaper, and exist where a covariance has no full rank (fewer
    images than features), so no epsilon on the diagonal is needed.
    """
    mean1, mean2 = _finite(mu1, "mean", 1), _finite(mu2, "mean", 1)
    cov1, cov2 = _finite(sigma1, "covariance", 2), _finite(sigma2, "covariance", 2)
    size = mean1.shape[0]
    if mean2.shape != (size,) or cov1.shape != (size, size) or cov2.shape != (size, size):
        shapes = ", ".join(str(part.shape) for part in (mean1, cov1, mean2, cov2))
        raise UserError(f"FID statistics have shapes {shapes}: both sets need the same feature network")
    root = _factor(cov1)  # (D, rank)
    eigenvalues = np.linalg.eigvalsh(root.T @ cov2 @ root)
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    difference = mean1 - mean2
    distance = difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root
    return max(float(distance), 0.0)


def _factor(covariance: Array) -> Array:
    """R (D, rank) with covariance = R R^T; directions below the rounding error of the largest are left out."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def _finite(values: ArrayLike, what: str, dimensions: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or not np.isfinite(array).all():
        raise UserError(f"the FID {what} of shape {array.shape} is not a finite {dimensions}-dimensional array")
    return array


class RunningStatistics:
    """Mean and covariance of features that arrive in batches, in float64: 30000 images without keeping 30000 rows.

    Each batch is centred before its products are summed (Chan et al. 1979), so a large mean costs no precision.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean: Array = np.zeros(size)
        self._scatter: Array = np.zeros((size, size))

    def add(self, features: ArrayLike) -> None:
        """features: (n, D), at least one row."""
        rows = np.asarray(features, dtype=np.float64)
        batch_mean = rows.mean(axis=0)
        centred, shift = rows - batch_mean, batch_mean - self.mean
        total = self.count + len(rows)
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.count = total

    def result(self) -> tuple[Array, Array]:
        """Mean (D,) and unbiased covariance (D, D) of everything added. UserError below two rows."""
        if self.count < 2:
            raise UserError(f"FID needs at least two images, not {self.count}")
        return self.mean, self._scatter / (self.count - 1)


def clean_resize(image: Image.Image, side: int) -> NDArray[np.float32]:
    """clean-fid's resize: (side, side, 3) float32 in [0, 255], antialiased bicubic, channel by channel, unrounded."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    # In float mode pillow neither rounds nor clips between its two passes, which is what "clean" stands for.
    size = (side, side)
    channels = [Image.fromarray(pixels[..., index]).resize(size, Image.Resampling.BICUBIC) for index in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)


def sana_resize(image: Image.Image, size: int) -> Image.Image:
    """Sana's resize: shortest side to size (bilinear), centre crop, 8 bits."""
    return square(image, size, Image.Resampling.BILINEAR)
