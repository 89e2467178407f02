"""Prompts of any length. A text is split into chunks of 75 tokens. Each chunk is encoded alone, between its own begin and
end tokens, and the embeddings are concatenated for cross-attention; the pooled vector is that of the first chunk. Other
tools do the same, in training and in drawing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode(pipe: Any, text: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Embeddings `[chunks * 77, channels]` and, for SDXL, the pooled vector `[channels]`. A text of one chunk is encoded as
    the pipeline does it: SD1.5 and SD2.1 use the last hidden state, SDXL uses the last but one of both encoders, and the
    pooled vector of the second."""
    parts = [(pipe.tokenizer, pipe.text_encoder)]
    if second := getattr(pipe, "text_encoder_2", None):
        parts.append((pipe.tokenizer_2, second))  # type: ignore[union-attr]
    count = max(len(chunks(tokenizer, text)) for tokenizer, _ in parts)
    embeds, pooled = list[Tensor](), None
    for tokenizer, encoder in parts:
        ids = torch.tensor([_framed(tokenizer, one) for one in chunks(tokenizer, text, count)], device=device)
        output: Any = encoder(ids, output_hidden_states=True)  # type: ignore[misc]
        embeds.append((output.hidden_states[-2] if second else output[0]).flatten(0, 1))
        pooled = output[0][0] if encoder is second else None
    return torch.cat(embeds, -1), pooled


def chunks(tokenizer: Any, text: str, least: int = 1) -> list[list[int]]:
    """The tokens of a text in chunks of the encoder's length, without begin and end. Empty chunks are added up to
    `least`."""
    ids, size = tokenizer(text, add_special_tokens=False).input_ids, tokenizer.model_max_length - 2
    found = [ids[i : i + size] for i in range(0, len(ids), size)]
    return found + [[] for _ in range(max(least, 1) - len(found))]


def remarks(pipe: Any, texts: Sequence[str]) -> list[str]:
    """A remark for each prompt that is longer than one chunk."""
    found_long = []
    for text in dict.fromkeys(texts):
        found = chunks(pipe.tokenizer, text)
        if len(found) > 1:
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            found_long.append(
                f"a long prompt, {sum(map(len, found))} tokens, is read in {len(found)} chunks of {len(found[0])}: {shown}"
            )
    return found_long


def _framed(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    framed = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return framed + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(framed))
