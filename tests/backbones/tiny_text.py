"""Tiny tokenizers and text encoders with random weights, for the pipelines of `tiny`."""

from __future__ import annotations

import json

from diffusers import QwenImagePipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = [chr(code) for code in range(33, 127)]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}no thoughts\n{% endif %}{% endif %}"
)


# -- Tokenizers --------------------------------------------------------------------------------------------------------


def gemma_tokenizer() -> GemmaTokenizer:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(vocab=vocabulary, add_bos_token=True)


def clip_tokenizer() -> CLIPTokenizer:
    pieces = ["<|startoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -3.0) for letter in LETTERS)], extra_ids=0)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE that knows each word of the Qwen-Image template, whose opening then has its true 34 tokens."""
    none = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
    text = QwenImagePipeline(**none).prompt_template_encode
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([text] * 5 + [": user system assistant"], trainer)
    learned = json.loads(learner.to_str())["model"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image|>", "<|video|>", "<|vision|>", "<|vision_end|>"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, additional_special_tokens=special)
    tokenizer.chat_template = CHAT
    return tokenizer


# -- Text encoders -----------------------------------------------------------------------------------------------------


def gemma() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            max_position_embeddings=4096,
        )
    ).eval()


def clip(width: int = 16, projection: int | None = None) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection or width,
        eos_token_id=2,
    )
    return (CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)).eval()


def t5(width: int = 32) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=128, feed_forward_proj="gated-gelu", **sizes)).eval()


def qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    names = {"image": "<|image|>", "video": "<|video|>", "vision_start": "<|vision|>", "vision_end": "<|vision_end|>"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    return Qwen3Model(qwen3_config(tokenizer, layers=3)).eval()


def qwen3_with_head(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """FLUX.2 reads the states of its layers 9, 18 and 27."""
    return Qwen3ForCausalLM(qwen3_config(tokenizer, layers=28, tie_word_embeddings=True)).eval()


def qwen3_config(tokenizer: Qwen2Tokenizer, layers: int, **more: object) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        **more,
    )
