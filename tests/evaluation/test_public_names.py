"""The names and parameters by which outside code calls the scoring functions."""

from __future__ import annotations

import inspect

import pytest

from apexflow.evaluation import dpg, fid, geneval, wise

SIGNATURES = {
    geneval.prompts: "",
    geneval.filter_detections: "detections metadata threshold counting_threshold max_objects max_overlap position_threshold",
    geneval.evaluate_image: "kept metadata color_of threshold counting_threshold max_objects max_overlap position_threshold",
    geneval.iou: "a b",
    geneval.relative_position: "a b position_threshold",
    geneval.color_crop: "image box mask",
    geneval.color_prompts: "class_name",
    geneval.summarize: "rows",
    geneval.postprocess: "class_logits mask_logits image_size original_size padded_size",
    geneval.convert_mmdet_state_dict: "state_dict",
    dpg.score: "rows answers images pic_num mode",
    wise.parse: "reply protocol",
    wise.wiscore: "consistency realism aesthetic_quality",
    wise.aggregate: "rows protocol category",
    wise.judge_messages: "root protocol record image",
    fid.fid_from_features: "a b",
    fid.fid_from_statistics: "mu1 sigma1 mu2 sigma2",
    fid.clean_resize: "image size",
}
DEFAULTS = {
    (geneval.filter_detections, "threshold"): 0.3,
    (geneval.filter_detections, "counting_threshold"): 0.9,
    (geneval.filter_detections, "max_objects"): 16,
    (geneval.filter_detections, "max_overlap"): 1.0,
    (geneval.relative_position, "position_threshold"): 0.1,
    (dpg.score, "pic_num"): 4,
    (dpg.score, "mode"): "official",
    (wise.aggregate, "category"): "all",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signature(function: object) -> None:
    parameters = inspect.signature(function).parameters
    assert list(parameters) == SIGNATURES[function].split()
    for name, parameter in parameters.items():
        if (function, name) in DEFAULTS:
            assert parameter.default == DEFAULTS[function, name]
