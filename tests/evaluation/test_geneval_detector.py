"""The detector's half of GenEval: the converted checkpoint, the pre-processing, and the official post-processing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate, unfold
from transformers import Mask2FormerForUniversalSegmentation

from apexflow.errors import UserError
from apexflow.evaluation import geneval
from apexflow.evaluation.geneval.convert import UNUSED, convert_mmdet_state_dict, detector_config
from apexflow.evaluation.geneval.detector import Mask2FormerDetector, preprocess, resize_linear

# Every tensor of mmdet 2.x's mask2former_swin-s instance checkpoint, as name and shape, written from its modules.
DIMS, DEPTHS, HEADS = (96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def ffn(name: str, size: int, hidden: int) -> Shapes:
    return linear(f"{name}.layers.0.0", size, hidden) | linear(f"{name}.layers.1", hidden, size)


def backbone() -> Shapes:
    shapes: Shapes = {"backbone.patch_embed.projection.weight": (96, 3, 4, 4)}
    shapes |= {"backbone.patch_embed.projection.bias": (96,)} | norm("backbone.patch_embed.norm", 96)
    for stage, (dim, depth, heads) in enumerate(zip(DIMS, DEPTHS, HEADS, strict=True)):
        for block in range(depth):
            root = f"backbone.stages.{stage}.blocks.{block}"
            shapes |= norm(f"{root}.norm1", dim) | norm(f"{root}.norm2", dim) | ffn(f"{root}.ffn", dim, 4 * dim)
            shapes |= linear(f"{root}.attn.w_msa.qkv", dim, 3 * dim) | linear(f"{root}.attn.w_msa.proj", dim, dim)
            shapes[f"{root}.attn.w_msa.relative_position_bias_table"] = (169, heads)
            shapes[f"{root}.attn.w_msa.relative_position_index"] = (49, 49)
        if stage < 3:
            root = f"backbone.stages.{stage}.downsample"
            shapes |= {f"{root}.reduction.weight": (2 * dim, 4 * dim)} | norm(f"{root}.norm", 4 * dim)
        shapes |= norm(f"backbone.norm{stage}", dim)
    return shapes


def conv(name: str, inputs: int, kernel: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.conv.weight": (256, inputs, kernel, kernel)} | norm(f"{name}.gn", 256)
    return shapes | ({f"{name}.conv.bias": (256,)} if bias else {})


def pixel_decoder() -> Shapes:
    root = "panoptic_head.pixel_decoder"
    shapes: Shapes = {f"{root}.level_encoding.weight": (3, 256)}
    for index, dim in enumerate((768, 384, 192)):
        shapes |= conv(f"{root}.input_convs.{index}", dim, 1, bias=True)
    for layer in range(6):
        name = f"{root}.encoder.layers.{layer}"
        attention = f"{name}.attentions.0"
        shapes |= linear(f"{attention}.sampling_offsets", 256, 192) | linear(f"{attention}.attention_weights", 256, 96)
        shapes |= linear(f"{attention}.value_proj", 256, 256) | linear(f"{attention}.output_proj", 256, 256)
        shapes |= ffn(f"{name}.ffns.0", 256, 1024) | norm(f"{name}.norms.0", 256) | norm(f"{name}.norms.1", 256)
    shapes |= conv(f"{root}.lateral_convs.0", 96, 1, bias=False) | conv(f"{root}.output_convs.0", 256, 3, bias=False)
    return shapes | {f"{root}.mask_feature.weight": (256, 256, 1, 1), f"{root}.mask_feature.bias": (256,)}


def transformer_decoder() -> Shapes:
    root = "panoptic_head.transformer_decoder"
    shapes = norm(f"{root}.post_norm", 256)
    for layer in range(9):
        name = f"{root}.layers.{layer}"
        for attention in (f"{name}.attentions.0.attn", f"{name}.attentions.1.attn"):
            shapes |= {f"{attention}.in_proj_weight": (768, 256), f"{attention}.in_proj_bias": (768,)}
            shapes |= linear(f"{attention}.out_proj", 256, 256)
        shapes |= ffn(f"{name}.ffns.0", 256, 2048)
        for index in range(3):
            shapes |= norm(f"{name}.norms.{index}", 256)
    return shapes


def head() -> Shapes:
    shapes: Shapes = {"panoptic_head.query_embed.weight": (100, 256), "panoptic_head.query_feat.weight": (100, 256)}
    shapes |= {"panoptic_head.level_embed.weight": (3, 256)} | linear("panoptic_head.cls_embed", 256, 81)
    for index in (0, 2, 4):
        shapes |= linear(f"panoptic_head.mask_embed.{index}", 256, 256)
    return shapes


def checkpoint() -> Shapes:
    return backbone() | pixel_decoder() | transformer_decoder() | head()


@pytest.fixture(scope="module")
def live() -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(detector_config())
    return {name: value.shape for name, value in model.state_dict().items()}


def test_every_live_weight_of_the_full_model_is_covered(live: dict[str, torch.Size]) -> None:
    tensors = {name: torch.empty(shape, device="meta") for name, shape in checkpoint().items()}
    assert sum(not name.endswith("relative_position_index") for name in tensors) == 625
    converted = convert_mmdet_state_dict(tensors)
    assert len(converted) == 757
    assert {name: value.shape for name, value in converted.items()} == {
        name: shape for name, shape in live.items() if not name.endswith(UNUSED)
    }


def test_fused_projections_split_in_order() -> None:
    fused = torch.arange(12.0).reshape(6, 2)
    root = "panoptic_head.transformer_decoder.layers.3.attentions"
    converted = convert_mmdet_state_dict(
        {f"{root}.1.attn.in_proj_weight": fused, f"{root}.0.attn.in_proj_weight": fused}
    )
    layer = "model.transformer_module.decoder.layers.3"
    for index, part in enumerate("qkv"):
        assert torch.equal(converted[f"{layer}.self_attn.{part}_proj.weight"], fused[2 * index : 2 * index + 2])
    assert torch.equal(converted[f"{layer}.cross_attn.in_proj_weight"], fused)


def test_patch_merging_order_by_its_effect() -> None:
    """mmdet: unfold, norm, reduction; Swin: the four neighbours concatenated, norm, reduction. Same result."""
    x = torch.randn(1, 3, 4, 6)
    root, target = "backbone.stages.0.downsample", "model.pixel_level_module.encoder.swin.encoder.layers.0.downsample"
    weight, scale = torch.randn(6, 12), torch.randn(12)
    converted = convert_mmdet_state_dict({f"{root}.reduction.weight": weight, f"{root}.norm.weight": scale})
    official = (unfold(x, 2, stride=2).transpose(1, 2) * scale) @ weight.T
    last = x.permute(0, 2, 3, 1)
    neighbours = [last[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    merged = torch.cat(neighbours, dim=-1).flatten(1, 2)
    ours = (merged * converted[f"{target}.norm.weight"]) @ converted[f"{target}.reduction.weight"].T
    torch.testing.assert_close(ours, official)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(UserError, match="bbox_head"):
        convert_mmdet_state_dict({"bbox_head.fc.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="weights do not fit"):
        geneval.save_detector({"backbone.norm0.weight": torch.zeros(96)}, "unused")


def plain_postprocess(classes: torch.Tensor, masks: torch.Tensor, image: tuple, original: tuple, padded: tuple) -> list:
    """The official rules one detection at a time: (class index, [x1, y1, x2, y2], score, mask)."""
    full = interpolate(masks[None], padded, mode="bilinear", align_corners=False)[:, :, : image[0], : image[1]]
    full = interpolate(full, original, mode="bilinear", align_corners=False)[0]
    probabilities = torch.softmax(classes, -1)
    pairs = [(float(probabilities[q, c]), q, c) for q in range(len(classes)) for c in range(classes.shape[1] - 1)]
    found = []
    for probability, query, label in sorted(pairs, reverse=True)[:100]:
        rows, columns = torch.nonzero(full[query] > 0, as_tuple=True)
        box, mask_score = [0, 0, 0, 0], 0.0
        if len(rows):
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            mask_score = float(torch.sigmoid(full[query][rows, columns]).sum() / (len(rows) + 1e-6))
        found.append((label, [int(side) for side in box], probability * mask_score, full[query] > 0))
    return found


@pytest.mark.parametrize(
    ("grid", "image", "original", "padded"),
    [
        ((24, 40), (90, 150), (61, 101), (96, 160)),
        ((40, 24), (150, 96), (300, 192), (160, 96)),
        ((8, 8),) + ((32, 32),) * 3,
    ],
)
def test_postprocess_agrees_with_a_plain_reading(grid: tuple, image: tuple, original: tuple, padded: tuple) -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(12, 81, generator=generator) * 3
    masks = torch.randn(12, *grid, generator=generator) * 2 - 3
    masks[0] = -5  # an empty mask
    classes[0, 7] = 20
    detections, binary = geneval.postprocess(classes, masks, image, original, padded)
    assert list(detections) == list(geneval.NAMES) and sum(map(len, detections.values())) == 100
    expected = plain_postprocess(classes, masks, image, original, padded)
    for index, name in enumerate(geneval.NAMES):
        wanted = sorted((entry for entry in expected if entry[0] == index), key=lambda entry: -entry[2])
        order = np.argsort(-detections[name][:, 4], kind="stable")
        assert len(order) == len(wanted) and detections[name].dtype == np.float32
        for row, (_, box, score, mask) in zip(order, wanted, strict=True):
            assert detections[name][row, :4].tolist() == box
            assert detections[name][row, 4] == pytest.approx(score, rel=1e-5, abs=1e-9)
            assert np.array_equal(binary[name][row], mask.numpy())
    empty = detections[geneval.NAMES[7]]
    assert (empty[~binary[geneval.NAMES[7]].any(axis=(1, 2))] == 0).all() and len(empty)


def test_resize_is_two_tap_bilinear() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    for size in ((80, 111), (20, 30), (37, 53)):
        exact = interpolate(tensor, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
        assert np.abs(resize_linear(pixels, size) - exact).max() <= 1
    flat = np.full((10, 10, 3), 255, np.uint8)
    assert (resize_linear(flat, (33, 17)) == 255).all()


def test_preprocess_sizes_padding_and_colours() -> None:
    pixels, size = preprocess(Image.new("RGBA", (512, 512), (255, 0, 0, 0)))
    assert (tuple(pixels.shape), size) == ((1, 3, 800, 800), (800, 800))
    expected = (torch.tensor([255.0, 0, 0]) - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
        [58.395, 57.12, 57.375]
    )
    torch.testing.assert_close(pixels[0, :, 400, 400], expected)
    pixels, size = preprocess(Image.new("RGB", (300, 100), "white"))
    assert (tuple(pixels.shape[2:]), size) == ((448, 1344), (444, 1333))
    assert (pixels[:, :, 444:] == 0).all() and (pixels[:, :, :, 1333:] == 0).all()
    assert (pixels[:, :, :444, :1333] != 0).all()


def test_detector_from_a_local_folder(detector_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("apexflow.evaluation.geneval.detector.SHORT_SIDE", "apexflow.evaluation.geneval.detector.LONG_SIDE"):
        monkeypatch.setattr(module, 96)
    detector = Mask2FormerDetector.load(detector_folder)
    assert "not comparable" in detector.source
    detections, masks = detector.detect(Image.new("RGB", (48, 30), "green"))
    assert sum(map(len, detections.values())) == 100
    assert all(masks[name].shape == (len(rows), 30, 48) for name, rows in detections.items())


def test_detector_folder_mistakes(detector_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no detector folder"):
        Mask2FormerDetector.load(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot load"):
        Mask2FormerDetector.load(tmp_path)
    with pytest.raises(UserError, match=r"lacks \d+ weights|cannot load"):
        Mask2FormerDetector.load(clip_folder)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(
        detector_folder, num_labels=133, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="133 labels"):
        Mask2FormerDetector.load(tmp_path)
