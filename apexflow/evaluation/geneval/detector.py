"""Mask2Former as GenEval runs it, through transformers: official pre- and post-processing, written out.

Source: mmdetection 2.x, config mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco (test pipeline, MaskFormerFusionHead,
mask2bbox) and mmcv's imrescale, restated. transformers' own Mask2Former processor is not used: it stretches instead of
padding, antialiases, and merges overlapping objects into one label map. Sizes are (height, width) throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate, pad

from apexflow.errors import UserError
from apexflow.evaluation.geneval.convert import UNUSED
from apexflow.evaluation.geneval.prompt_set import NAMES
from apexflow.evaluation.loading import load_network

Size = tuple[int, int]
Detections = dict[str, NDArray[np.float32]]
Masks = dict[str, NDArray[np.bool_]]

MAX_DETECTIONS = 100
SIZE_DIVISOR = 32
SHORT_SIDE, LONG_SIDE = 800, 1333
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
_CHUNK = 16  # queries resized at a time: bounds the memory at 16 full-size masks


class Mask2FormerDetector:
    """Image in, detections of the 80 classes out. `source` says whether the weights are the official ones.

    model: transformers Mask2FormerForUniversalSegmentation with 80 labels in GenEval's index order.
    """

    def __init__(self, model: Any, device: str | torch.device = "cpu") -> None:
        self.model = model.to(device).eval()
        self.device = torch.device(device)
        self.source: str = getattr(model.config, "apexflow_source", "other weights, not comparable with GenEval's")

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Mask2FormerDetector:
        """From a folder in the transformers layout; no network. UserError when it is missing or has other labels."""
        if not Path(folder).is_dir():
            raise UserError(
                f"no detector folder at {folder}: convert the official checkpoint, or download a converted one there"
            )
        from transformers import Mask2FormerForUniversalSegmentation

        model = load_network(Mask2FormerForUniversalSegmentation, folder, UNUSED)
        if model.config.num_labels != len(NAMES):
            raise UserError(
                f"the detector in {folder} has {model.config.num_labels} labels: GenEval needs a COCO instance model "
                f"with {len(NAMES)}"
            )
        return cls(model, device)

    def detect(self, image: Image.Image) -> tuple[Detections, Masks]:
        """See `postprocess`. The image must stand in its EXIF orientation, as the colours are read from it too."""
        return self.detect_prepared(*preprocess(image), (image.height, image.width))

    @torch.inference_mode()
    def detect_prepared(self, pixels: torch.Tensor, image_size: Size, original_size: Size) -> tuple[Detections, Masks]:
        """See `postprocess`; `pixels` and `image_size` are what `preprocess` returned."""
        output = self.model(pixel_values=pixels.to(self.device))
        return postprocess(
            output.class_queries_logits[0],
            output.masks_queries_logits[0],
            image_size,
            original_size,
            (pixels.shape[-2], pixels.shape[-1]),
        )


def preprocess(image: Image.Image) -> tuple[torch.Tensor, Size]:
    """The network input (1, 3, H, W) float32 and the size of the picture in it, before the padding.

    Keep-ratio resize into 1333 x 800, mean and std, zeros on the right and below up to a multiple of 32.
    """
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    resized = (resize_linear(pixels, size).astype(np.float32) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    tensor = torch.from_numpy(resized).permute(2, 0, 1)[None]
    return pad(tensor, (0, -size[1] % SIZE_DIVISOR, 0, -size[0] % SIZE_DIVISOR)), size


def resize_linear(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """(H, W, C) uint8 to (*size, C): two-tap bilinear without antialiasing, in OpenCV's 11-bit fixed point."""
    if pixels.shape[:2] == size:
        return pixels
    top, bottom, down = _taps(pixels.shape[0], size[0])
    left, right, across = _taps(pixels.shape[1], size[1])
    wide = pixels.astype(np.int32)
    across = across[:, None]
    rows = wide[:, left] * (2048 - across) + wide[:, right] * across  # (H, w, C), 11 fractional bits
    rows >>= 4
    down = down[:, None, None]
    # Each product drops its low bits before the sum, as OpenCV's vertical pass does.
    summed = ((rows[top] * (2048 - down)) >> 16) + ((rows[bottom] * down) >> 16)
    return ((summed + 2) >> 2).astype(np.uint8)


def _taps(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Both source indices of every target pixel, and the weight of the second in 1/2048."""
    centers = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(centers).astype(np.int64)
    weight = np.rint((centers - first.astype(np.float32)) * 2048).astype(np.int32)
    return first.clip(0, source - 1), (first + 1).clip(0, source - 1), weight


def postprocess(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    image_size: Size,
    original_size: Size,
    padded_size: Size,
) -> tuple[Detections, Masks]:
    """Raw detections by the official rules, every class present, in the detector's order.

    class_logits: (Q, 81), the last being "no object"; mask_logits: (Q, h, w). image_size: the resized picture in the
    network input; original_size: the picture itself; padded_size: the network input.

    Returns ({name: (n, 5) float32 [x1, y1, x2, y2, score]}, {name: (n, H, W) bool}). A detection is one of the 100 best
    pairs of query and class, so a query can stand for several classes. An empty mask has a zero box and score.
    """
    probabilities = class_logits.float().softmax(dim=-1)[:, :-1]  # (Q, 80)
    count = min(MAX_DETECTIONS, probabilities.numel())
    best, index = probabilities.flatten().topk(count, sorted=False)
    queries, labels = index // len(NAMES), index % len(NAMES)

    used, position = queries.unique(return_inverse=True)
    chunks = [_read_masks(part, image_size, original_size, padded_size) for part in mask_logits[used].split(_CHUNK)]
    masks, boxes, scores = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    rows = torch.cat([boxes[position], (best * scores[position])[:, None]], dim=1).cpu().numpy()
    every_mask, order, label = masks.cpu().numpy(), position.cpu().numpy(), labels.cpu().numpy()
    of_class = {name: np.flatnonzero(label == number) for number, name in enumerate(NAMES)}
    return (
        {name: rows[chosen] for name, chosen in of_class.items()},
        {name: every_mask[order[chosen]] for name, chosen in of_class.items()},
    )


def _read_masks(
    logits: torch.Tensor, image_size: Size, original_size: Size, padded_size: Size
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask logits (q, h, w) as binary masks (q, H, W), boxes (q, 4) and mask scores (q,) at the original size."""
    logits = interpolate(logits[:, None].float(), size=padded_size, mode="bilinear", align_corners=False)
    logits = logits[..., : image_size[0], : image_size[1]]
    logits = interpolate(logits, size=original_size, mode="bilinear", align_corners=False)[:, 0]
    masks = logits > 0
    inside = masks.flatten(1).float()
    scores = (logits.flatten(1).sigmoid() * inside).sum(dim=1) / (inside.sum(dim=1) + 1e-6)
    return masks, _boxes(masks), scores


def _boxes(masks: torch.Tensor) -> torch.Tensor:
    """(q, H, W) bool to (q, 4) float32 [x1, y1, x2, y2], x2 and y2 exclusive; zeros for an empty mask."""
    sides = []
    for axis in (1, 2):  # columns first: x, then y
        line = masks.any(dim=axis).float()  # (q, side)
        low = line.argmax(dim=1)
        high = line.shape[1] - line.flip(1).argmax(dim=1)
        sides.append((low, high))
    (x1, x2), (y1, y2) = sides
    boxes = torch.stack([x1, y1, x2, y2], dim=1).float()
    return boxes * masks.flatten(1).any(dim=1)[:, None]
