"""Teaching the miniature's text encoder to read, in place of the language pretraining that real ones come with.

Without it the words of a caption stay strangers to each other: trained through pictures alone, the embedding of "triangle"
hardly tells whether a pink or a yellow one was asked for, and the pictures mix the colours up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apexflow.data.scenes import COLORS, NUMBERS, RELATIONS, SHAPES, scenes
from apexflow.progress import Progress

# What a reader knows after each word: shape and colour of both things, how many, and how they stand. 0 is "nothing yet".
WORDS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "number": tuple(NUMBERS.values()),
    "relation": tuple(relation.split()[0] for relation in RELATIONS),
}
FACTS = ("shape 1", "color 1", "number", "relation", "shape 2", "color 2")


def fit_text_encoder(text_encoder: Any, tokenizer: Any, steps: int, seed: int, batch: int = 64) -> float:
    """Train in place so that a linear map reads every fact stated so far off every token; the share read right at the end."""
    torch.manual_seed(seed)
    sizes = [len(WORDS[fact.split()[0]]) + 1 for fact in FACTS]
    readout = nn.Linear(text_encoder.config.hidden_size, sum(sizes))
    text_encoder.requires_grad_(True).train()
    parameters = [*text_encoder.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    right = torch.tensor(0.0)
    with Progress("training the text encoder", steps) as progress:
        for step in range(steps):
            captions = [scene.caption for scene in scenes(batch, seed=seed + 1_000, start=step * batch)]
            tokens = tokenizer(captions, padding="longest", return_tensors="pt")
            hidden = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
            loss, right = reading_loss(readout(hidden), known(captions, hidden.shape[1]), tokens.attention_mask, sizes)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(note=f"accuracy {right.item():.3f}")
    text_encoder.requires_grad_(False).eval()
    return float(right)


def known(captions: Sequence[str], length: int) -> Tensor:
    """(B, length, 6): what is known after each token (the first is the start token), as an index into each fact's words."""
    return torch.tensor([_facts(caption.split(), length) for caption in captions])


def _facts(words: Sequence[str], length: int) -> list[list[int]]:
    facts = [0] * len(FACTS)
    rows = [list(facts)]
    color, things = 0, 0
    for word in words:
        singular = word if word in SHAPES else word.removesuffix("s").removesuffix("e" if word.endswith("sses") else "")
        if word in COLORS:
            color = WORDS["color"].index(word) + 1
        elif singular in SHAPES:
            facts[4 if things else 0] = SHAPES.index(singular) + 1
            facts[5 if things else 1] = color
            color, things = 0, things + 1
        elif word in WORDS["number"]:
            facts[2] = WORDS["number"].index(word) + 1
        elif word in WORDS["relation"]:
            facts[3] = WORDS["relation"].index(word) + 1
        rows.append(list(facts))
    return rows + [[0] * len(FACTS)] * (length - len(rows))


def reading_loss(logits: Tensor, facts: Tensor, mask: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the real tokens, and the share of tokens of which every fact is read right."""
    losses, right = [], mask.bool()
    for index, part in enumerate(logits.split(list(sizes), dim=-1)):
        losses.append(nn.functional.cross_entropy(part[mask.bool()], facts[..., index][mask.bool()]))
        right = right & (part.argmax(-1) == facts[..., index])
    return torch.stack(losses).sum(), right.sum() / mask.sum()
