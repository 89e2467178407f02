"""Tiny random CLIP and DINO models, saved as transformers saves them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

SIZE = 28
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VIEW: dict[str, Any] = {**SMALL, "image_size": SIZE, "patch_size": 7}


def save_clip(out: Path, tokenizer_folder: Path) -> Path:
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**SMALL, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    view = {**VIEW, "initializer_factor": 4.0}  # otherwise all pictures would have nearly the same embedding
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=view, projection_dim=16)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(out)
    return out


def save_dino(out: Path) -> Path:
    """Without a pooler, as facebook/dino-vits16 is stored."""
    torch.manual_seed(1)
    ViTModel(ViTConfig(**VIEW, initializer_range=0.3), add_pooling_layer=False).save_pretrained(out)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(out)
    return out
