"""SANA's own classes at a size that trains on a laptop: builds the folder that everything else loads like any checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from apexflow.backbones import Settings
from apexflow.backbones.sana import Sana


def build_miniature(words: Sequence[str], seed: int = 0, width: int = 192, depth: int = 6) -> Sana:
    """A SANA of about 5 million parameters with random weights, its vocabulary the given words.

    64-pixel pictures, 8 x 8 x 8 latents, 16 image tokens (patch 2), one token a word.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(seed)
    tokenizer = word_tokenizer(words)
    # In this order, which decides what weights each draws.
    networks = {
        "text_encoder": _text_encoder(tokenizer),
        "transformer": _transformer(width, depth),
        "vae": _autoencoder(),
    }
    for network in networks.values():
        network.eval()
    settings = Settings(steps=50, guidance=2.5, instruction=False, max_tokens=32, size=64)
    return Sana(networks | {"tokenizer": tokenizer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=2.0)}, settings)


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            query_pre_attn_scalar=32,
            max_position_embeddings=64,
            sliding_window=64,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
        )
    )


def _transformer(width: int, depth: int) -> Any:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=width // 32,
        attention_head_dim=32,
        num_layers=depth,
        num_cross_attention_heads=width // 32,
        cross_attention_head_dim=32,
        cross_attention_dim=width,
        caption_channels=128,
        sample_size=8,
        patch_size=2,
        interpolation_scale=1.0,
    )


def _autoencoder() -> Any:
    from diffusers import AutoencoderDC

    widths, layers = (16, 32, 64, 128), (0, 1, 1, 1)
    return AutoencoderDC(
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        scaling_factor=1.0,
    )


def word_tokenizer(words: Sequence[str]) -> Any:
    """A fast tokenizer with one token a word, lower case, punctuation dropped, and an unknown token for all else."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9 ]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", padding_side="right"
    )
