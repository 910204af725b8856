"""From prompts to hidden states as the stock pipelines do it: how a text is cut and padded, and which layer is read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apexflow.backbones.layers import layer_answers


def tokenize(
    encoder: Any,
    tokenizer: Any,
    texts: Sequence[str],
    limit: int,
    padding: str = "longest",
    kept: int | None = None,
    reader: str = "the model",
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (B, L) and where `encoder` lies, padded to the longest text ("longest") or to `limit` tokens
    ("max_length").

    Texts of more than `limit` tokens are cut, with a warning that Python shows once. It says how many of them are `kept` (all, if
    not given), and which `reader` it is whose texts are cut: others may read on.
    """
    texts = list(texts)
    if max(len(ids) for ids in tokenizer(texts).input_ids) > limit:
        most = limit if kept is None else kept
        warnings.warn(
            f"a prompt is longer than the {most} tokens that {reader} reads: the rest is cut off", stacklevel=2
        )
    tokens = tokenizer(texts, padding=padding, max_length=limit, truncation=True, return_tensors="pt")
    device = device_of(encoder)
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)


def clip_states(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """CLIP's penultimate hidden states (B, 77, D) and its pooled vector (B, P), projected if the encoder projects.

    Padding is attended, as in every pipeline that uses CLIP.
    """
    ids, _ = tokenize(encoder, tokenizer, texts, tokenizer.model_max_length, "max_length", reader="CLIP")
    layer = getattr(encoder, "text_model", encoder).encoder.layers[-2]
    (found,), answer = layer_answers([layer], lambda: encoder(ids))
    projected = getattr(answer, "text_embeds", None)
    return _states(found), answer.pooler_output if projected is None else projected


def t5_states(encoder: Any, tokenizer: Any, texts: Sequence[str], limit: int) -> Tensor:
    """T5's last hidden states (B, limit, D); padding is attended (FLUX and SD3 were trained so)."""
    ids, _ = tokenize(encoder, tokenizer, texts, limit, "max_length")
    return encoder(ids)[0]


def masked_t5_states(encoder: Any, tokenizer: Any, texts: Sequence[str], limit: int) -> tuple[Tensor, Tensor]:
    """T5's last hidden states (B, L, D) and their mask (B, L), L tokens of the longest text."""
    ids, mask = tokenize(encoder, tokenizer, texts, limit)
    return encoder(ids, attention_mask=mask)[0], mask


def decoder_states(encoder: Any, tokenizer: Any, texts: Sequence[str], limit: int) -> tuple[Tensor, Tensor]:
    """A language model's last hidden states but one (B, L, D) and their mask (B, L), L tokens of the longest text."""
    ids, mask = tokenize(encoder, tokenizer, texts, limit)
    return layer_states(encoder, ids, mask, [len(encoder.layers) - 1])[0], mask


def layer_states(encoder: Any, ids: Tensor, mask: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """A language model's hidden states (B, L, D) after each of these numbers of layers."""
    chosen = [encoder.layers[layer - 1] for layer in layers]
    found, _ = layer_answers(chosen, lambda: encoder(input_ids=ids, attention_mask=mask, use_cache=False))
    return [_states(answer) for answer in found]


def _states(answer: Any) -> Tensor:
    """A layer's hidden states, which some hand over beside other things."""
    return answer[0] if isinstance(answer, tuple) else answer


def chat(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> list[str]:
    """Each prompt as the one message of a conversation, up to where the model answers, with `thinking` or without."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for prompt in prompts
    ]


def device_of(module: nn.Module) -> torch.device:
    """Where a network's parameters lie."""
    return next(module.parameters()).device


def unknown_words(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts with words of which the tokenizer leaves nothing, or unknown tokens only."""
    unknown = tokenizer.unk_token_id
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if prompt.strip() and all(token == unknown for token in ids):
            found.append(prompt)
    return found


def is_null(prompt: str) -> bool:
    """Whether a prompt stands for the null condition."""
    return not prompt.strip()


def unless_full(mask: Tensor | None) -> Tensor | None:
    """The mask, or None if it hides nothing: attention without a mask may use the fast kernels."""
    return None if mask is None or bool(mask.bool().all()) else mask


def rows_of(embeds: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The valid tokens of each row, [(L_i, D)]; real tokens stand before padding."""
    if mask is None:
        return list(embeds.unbind(0))
    lengths = mask.bool().sum(1).tolist()
    return [row[:length] for row, length in zip(embeds.unbind(0), lengths, strict=True)]
