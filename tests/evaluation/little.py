"""Random scorers of the real kinds, as small as these allow, and benchmark files of the real shapes, in folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from apexflow.evaluation.judge import picture_url
from apexflow.evaluation.runner import EvaluationSettings

WORDS = [
    "<|startoftext|>",
    "<|endoftext|>",
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz-"),
]


def detector(folder: Path) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4)
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_attention_heads": 2, "num_queries": 5}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=80, **sizes, **layers)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def clip(folder: Path, activation: str = "quick_gelu") -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["hidden_act"] = activation
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, merges=[]).save_pretrained(folder)
    return folder


def judge(folder: Path) -> Path:
    """A random LLaVA. Every word that it can say means "yes" to DPG-Bench, and a score to WISE's verified protocol."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    words = [*special, *(f"yes Score: {index % 2} w{index}" for index in range(6))]
    plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, extra_special_tokens={"image_token": "<image>"}, **names
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=len(words), num_hidden_layers=1, max_position_embeddings=512, pad_token_id=3, **sizes)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, num_hidden_layers=2, **sizes)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    )
    model.lm_head.weight.data[:5] = 0  # special words are never the likeliest
    model.lm_head.weight.data[5:8] = -model.lm_head.weight.data[8:]
    model.save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
        "{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pixels, tokenizer, 8, "default", chat_template=template, image_token="<image>", num_additional_image_tokens=1
    )
    processor.save_pretrained(folder)
    return folder


Widths = dict[str, tuple[int, int, int, int]]  # name -> outputs, inputs, height, width


def inception_widths(divide: int = 1) -> Widths:
    """Every convolution of Inception v3 up to its pooled features, as name and shape."""
    found: Widths = {}

    def chain(root: str, inputs: int, *steps: tuple) -> int:
        for name, outputs, *kernel in steps:
            height, width = (*kernel, *kernel, 1, 1)[:2]
            found[root + name] = (outputs // divide, inputs if inputs == 3 else inputs // divide, height, width)
            inputs = outputs
        return inputs

    stem = [("1a_3x3", 32, 3), ("2a_3x3", 32, 3), ("2b_3x3", 64, 3), ("3b_1x1", 80), ("4a_3x3", 192, 3)]
    x = chain("Conv2d_", 3, *stem)
    for letter, pool in zip("bcd", (32, 64, 64), strict=True):
        root, twice = f"Mixed_5{letter}.branch", "3x3dbl_"
        parts = [chain(root, x, ("1x1", 64)), chain(root, x, ("5x5_1", 48), ("5x5_2", 64, 5))]
        parts.append(chain(root, x, (f"{twice}1", 64), (f"{twice}2", 96, 3), (f"{twice}3", 96, 3)))
        x = sum(parts) + chain(root, x, ("_pool", pool))
    root = "Mixed_6a.branch"
    x += chain(root, x, ("3x3", 384, 3)) + chain(root, x, ("3x3dbl_1", 64), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3))
    for letter, c in zip("bcde", (128, 160, 160, 192), strict=True):
        root, many = f"Mixed_6{letter}.branch", "7x7dbl_"
        parts = [chain(root, x, ("1x1", 192)), chain(root, x, ("_pool", 192))]
        parts.append(chain(root, x, ("7x7_1", c), ("7x7_2", c, 1, 7), ("7x7_3", 192, 7, 1)))
        steps = [(f"{many}1", c), (f"{many}2", c, 7, 1), (f"{many}3", c, 1, 7), (f"{many}4", c, 7, 1)]
        x = sum(parts) + chain(root, x, *steps, (f"{many}5", 192, 1, 7))
    root = "Mixed_7a.branch"
    steps = [("7x7x3_1", 192), ("7x7x3_2", 192, 1, 7), ("7x7x3_3", 192, 7, 1), ("7x7x3_4", 192, 3)]
    x += chain(root, x, ("3x3_1", 192), ("3x3_2", 320, 3)) + chain(root, x, *steps)
    for letter in "bc":
        root = f"Mixed_7{letter}.branch"
        first, second = chain(root, x, ("3x3_1", 384)), chain(root, x, ("3x3dbl_1", 448), ("3x3dbl_2", 384, 3))
        parts = [chain(root, x, ("1x1", 320)), chain(root, x, ("_pool", 192))]
        for name, inputs in (("3x3_2", first), ("3x3dbl_3", second)):
            parts += [chain(root, inputs, (f"{name}a", 384, 1, 3)), chain(root, inputs, (f"{name}b", 384, 3, 1))]
        x = sum(parts)
    return found


def inception_tensors(divide: int) -> dict[str, torch.Tensor]:
    """Random weights that keep the size of what passes through."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in inception_widths(divide).items():
        tensors[f"{name}.conv.weight"] = torch.randn(shape) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        for part, value in (("weight", 1.0), ("bias", 0.1), ("running_mean", 0.1), ("running_var", 1.0)):
            tensors[f"{name}.bn.{part}"] = value * (0.5 + torch.rand(shape[0]))
    return tensors


def inception(file: Path, divide: int = 16) -> Path:
    save_file(inception_tensors(divide), file)
    return file


def dpg_folder(folder: Path, items: int = 3) -> Path:
    """dpg_bench.csv with three questions an item: one stands alone, the others depend on it."""
    lines = ["item_id,text,proposition_id,dependency,tuple,question_natural_language"]
    lines.append("first,a lost row,1,0,entity - whole (car),Is there a lost car?")
    for item in range(items):
        lines.append(f'{item},"a red car, number {item}",1,0,entity - whole (car),Is there a car?')
        lines.append(f'{item},"a red car, number {item}",2,1,"attribute - color (car, red)",Is the car red?')
        lines.append(f'{item},"a red car, number {item}",3,"1,2","relation - spatial (car, road, on)",Is it on a road?')
    (folder / "dpg_bench.csv").write_text("\n".join(lines) + "\n")
    (folder / "prompts").mkdir()
    (folder / "prompts" / "0.txt").write_text("a red star\n")
    return folder


WISE_SCRIPT = """
def build_evaluation_messages(data, image_base64):
    return [{"role": "user", "content": [
        {"type": "text", "text": f"Grade {data['Prompt']} {data['Explanation']}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
    ]}]
"""


def wise_checkout(root: Path) -> Path:
    """The verified prompts 1 to 1000, and both protocols' scripts."""
    (root / "data_verified").mkdir()
    records = [
        {"Prompt": f"a star {i}", "Explanation": "five points", "Category": "c", "Subcategory": "s", "prompt_id": i}
        for i in range(1, 1001)
    ]
    (root / "data_verified" / "a_verified.json").write_text(json.dumps(records))
    (root / "vllm_eval.py").write_text(WISE_SCRIPT)
    return root


def mjhq_folder(root: Path, count: int = 6) -> Path:
    """meta_data.json and reference pictures, in Playground's layout."""
    meta = {f"id{i}": {"category": "art" if i % 2 else "logo", "prompt": f"a red star {i}"} for i in range(count)}
    (root / "meta_data.json").write_text(json.dumps(meta))
    for index, (name, data) in enumerate(meta.items()):
        place = root / "imgs" / data["category"]
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80, 70), 40 + 10 * index).convert("RGB").save(place / f"{name}.jpg")
    return root


def question(text: str, image: Image.Image | Path) -> list[dict]:
    """What a judge is sent: one user turn with a question about one image."""
    picture = {"type": "image_url", "image_url": {"url": picture_url(image)}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, picture]}]


def settings(suite: str, **changes: object) -> EvaluationSettings:
    """Two prompts in one step."""
    return EvaluationSettings(**{"suite": suite, "steps": 1, "guidance": 1.0, "limit": 2, **changes})


def rows_of(folder: Path) -> list[dict]:
    """What was written of every picture."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
