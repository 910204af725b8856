"""GenEval without mmdet: the prompts, the detector, the colours and the scoring rules of the official script."""

from __future__ import annotations

from apexflow.evaluation.geneval.color import ColorClassifier, color_crop, color_prompts
from apexflow.evaluation.geneval.convert import save_detector
from apexflow.evaluation.geneval.detector import Mask2FormerDetector, postprocess
from apexflow.evaluation.geneval.prompt_set import COLORS, NAMES, PROMPTS_SHA256, prompts
from apexflow.evaluation.geneval.scoring import (
    evaluate_image,
    filter_detections,
    kept_indices,
    overall_error,
    relative_position,
    summarize,
)

__all__ = [
    "COLORS",
    "NAMES",
    "PROMPTS_SHA256",
    "ColorClassifier",
    "Mask2FormerDetector",
    "color_crop",
    "color_prompts",
    "evaluate_image",
    "filter_detections",
    "kept_indices",
    "overall_error",
    "postprocess",
    "prompts",
    "relative_position",
    "save_detector",
    "summarize",
]
