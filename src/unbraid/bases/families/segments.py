"""Several texts in one sequence that cannot read each other, for transformers with joint attention.

UnZipLoRA (arXiv 2412.04465) lets each adapter read its own prompt in cross-attention. In joint attention the blocks change
the tokens of the text, so there is no exact equivalent. Here the text consists of segments, [joint | content | style]. A segment
reads itself and the picture; the picture reads itself and all segments. An adapter acts on its own segment and on the picture
(`unbraid.core.lora.Active.segment`).

Where the picture reads one of n segments, log n is subtracted from the scores. So n equal segments have together the weight of
one text, and a text that is repeated n times gives the same prediction as the text alone, up to rounding.
"""

from collections.abc import Mapping, Sequence
from math import inf, log
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from unbraid.bases.families.family import Prompt

PLUS = "+"  # between the roles of the texts, in the role of a prompt with segments


def segmented(role: str, prompts: Mapping[str, Prompt]) -> Prompt:
    """The prompt `both+content+style` from the prompts `both`, `content` and `style`, which have equal lengths. The pooled
    vector is that of the first."""
    some = [prompts[one] for one in role.split(PLUS)]
    return Prompt(torch.cat([one.embeds for one in some]), some[0].pooled, len(some))


def with_segments(roles: Sequence[str], prompts: Mapping[str, Prompt]) -> dict[str, Prompt]:
    """`prompts`, and those of `roles` that consist of several of them."""
    found = {role: segmented(role, prompts) for role in roles if PLUS in role and role not in prompts}
    return {**prompts, **found}


def rows(prompts: Sequence[Prompt], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, int]]:
    """The embeddings of a batch, `[tokens, channels]` each, and the number of their segments as an argument if it is more than
    one. A prompt with one segment is then repeated, which changes no prediction."""
    most = max(prompt.segments for prompt in prompts)
    texts = [prompt.embeds.to(dtype) for prompt in prompts]
    if most == 1:
        return texts, {}
    repeated = [one.repeat(most // prompt.segments, 1) for one, prompt in zip(texts, prompts, strict=True)]
    return repeated, {"segments": most}


def reading(segments: int, text: int, picture: int, like: Tensor, picture_first: bool = False) -> Tensor:
    """What to add to the scores of joint attention, `[1, 1, tokens, tokens]`: -inf where a segment would read another one, -log n
    where the picture reads one of n segments, else 0. `text`: tokens of all segments. `picture`: tokens of the picture.
    `like`: has the dtype and the device."""
    which = torch.arange(segments, device=like.device).repeat_interleave(text // segments)
    which = F.pad(which, (picture, 0) if picture_first else (0, picture), value=-1)
    query, key = which[:, None], which[None]
    bias = torch.zeros(len(which), len(which), dtype=like.dtype, device=like.device)
    bias.masked_fill_((query >= 0) & (key >= 0) & (query != key), -inf)
    return bias.masked_fill_((query < 0) & (key >= 0), -log(segments))[None, None]


class Joint:
    """SD3's joint attention with `attention_mask`, which diffusers' own processor ignores. Without a mask both are equal. The
    second attention, of the picture alone, is diffusers' own."""

    def __init__(self) -> None:
        self.stock: Any = JointAttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        if encoder_hidden_states is None or attention_mask is None:
            return self.stock(attn, hidden_states, encoder_hidden_states)
        picture, text = hidden_states, encoder_hidden_states
        query = torch.cat(
            [_heads(attn, attn.to_q(picture), attn.norm_q), _heads(attn, attn.add_q_proj(text), attn.norm_added_q)], 2
        )
        key = torch.cat(
            [_heads(attn, attn.to_k(picture), attn.norm_k), _heads(attn, attn.add_k_proj(text), attn.norm_added_k)], 2
        )
        value = torch.cat([_heads(attn, attn.to_v(picture), None), _heads(attn, attn.add_v_proj(text), None)], 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        shown, read = out.split([picture.shape[1], text.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](shown)), read if attn.context_pre_only else attn.to_add_out(read)


def _heads(attn: Any, x: Tensor, norm: Any) -> Tensor:
    """`[b, tokens, heads · d]` as `[b, heads, tokens, d]`, normalised."""
    x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return x if norm is None else norm(x)


def read_masks(transformer: Any) -> None:
    """Let SD3's joint attention take masks."""
    for block in transformer.transformer_blocks:
        if not isinstance(block.attn.processor, Joint):
            block.attn.set_processor(Joint())
            if block.attn2 is not None:
                block.attn2.set_processor(Joint())
