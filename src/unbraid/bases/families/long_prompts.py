"""Prompts of any length: in chunks of 75 tokens, each encoded by itself between its own begin and end, one after the other in
cross-attention; the pooled vector is the first chunk's. So the community's tools read them, in training and drawing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode(pipe: Any, text: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """`[chunks * 77, channels]` and, of SDXL, `[channels]`: as the pipeline encodes a text of one chunk. SD1.5 and SD2.1: the last
    hidden state; SDXL: the last but one of both encoders, and the second one's pooled vector."""
    parts = [(pipe.tokenizer, pipe.text_encoder)]
    if second := getattr(pipe, "text_encoder_2", None):
        parts.append((pipe.tokenizer_2, second))  # type: ignore[union-attr]
    count = max(len(chunks(tokenizer, text)) for tokenizer, _ in parts)
    embeds, pooled = list[Tensor](), None
    for tokenizer, encoder in parts:
        ids = torch.tensor([_framed(tokenizer, one) for one in chunks(tokenizer, text, count)], device=device)
        told: Any = encoder(ids, output_hidden_states=True)  # type: ignore[misc]
        embeds.append((told.hidden_states[-2] if second else told[0]).flatten(0, 1))
        pooled = told[0][0] if encoder is second else None
    return torch.cat(embeds, -1), pooled


def chunks(tokenizer: Any, text: str, least: int = 1) -> list[list[int]]:
    """The tokens of a text, as many at a time as the encoder reads beside begin and end; `least`: further ones are empty."""
    ids, size = tokenizer(text, add_special_tokens=False).input_ids, tokenizer.model_max_length - 2
    found = [ids[i : i + size] for i in range(0, len(ids), size)]
    return found + [[] for _ in range(max(least, 1) - len(found))]


def remarks(pipe: Any, texts: Sequence[str]) -> list[str]:
    """What is to be said of prompts that are longer than one chunk."""
    told = []
    for text in dict.fromkeys(texts):
        found = chunks(pipe.tokenizer, text)
        if len(found) > 1:
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            told.append(
                f"a long prompt, {sum(map(len, found))} tokens, is read in {len(found)} chunks of {len(found[0])}: {shown}"
            )
    return told


def _framed(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    framed = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return framed + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(framed))
