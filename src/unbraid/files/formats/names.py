"""Names of LoRA keys: from the names that all tools use to the one that unbraid uses.

A key is a module's name and a suffix. `split_key` separates them; `canonical` turns the module's name into its
diffusers path after the component: `unet.mid_block.attentions.0.proj_in`,
`text_encoder.text_model.encoder.layers.0.mlp.fc1`, `transformer.transformer_blocks.0.attn.to_q`.
Names joined by underscores are split into words and joined to path elements with a vocabulary; dotted names stay as they are. For
transformers see `unbraid.files.formats.recognise`. Matching takes time linear in the key's length. Pure Python.
"""

import re
from dataclasses import dataclass
from functools import cache

from unbraid.files.formats.blocks import from_ldm
from unbraid.files.formats.kinds import KIND, LOHA, LOKR

_CLIPS = (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5xxl", "text_encoder_3"))
KINDS = ("OFT", "GLoRA", "IA3", "full weights", "bias")  # recognised but not supported; kinds.py has those that are
_WHICH = {"down": "down", "up": "up", "mid": "mid"}

# prefixes, the longest first; TEXT with the component that each stands for
UNET = ("lora_unet_", "lycoris_unet_", "lycoris_", "model.diffusion_model.", "diffusion_model.", "unet.", "")
TRANSFORMER = ("lora_transformer_", "lycoris_transformer_", "lora_unet_", "lycoris_unet_", "lycoris_", "transformer.")
TRANSFORMER += ("model.diffusion_model.", "diffusion_model.", "")
TEXT: tuple[tuple[str, str], ...] = (
    *((f"lora_te{i}_", name) for i, name in (("", "text_encoder"), ("1", "text_encoder"))),
    *((f"lora_te{i}_", f"text_encoder_{i}") for i in "23"),
    *((f"text_encoders.{x}.{y}", n) for x, n in _CLIPS for y in ("transformer.", "")),
    *((f"{x}.", n) for x, n in _CLIPS),
    *((f"text_encoder{i}.", f"text_encoder{i}") for i in ("_3", "_2", "")),
)
UNET_TOPS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")

VOCABULARY = """
down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers conv transformer_blocks attn1 attn2 to_q to_k
to_v to_out ff net proj proj_in proj_out norm norm1 norm2 norm3 conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj
time_embedding add_embedding linear_1 linear_2 conv_norm_out
input_blocks middle_block output_blocks op in_layers out_layers emb_layers skip_connection time_embed label_emb out
text_model encoder layers layer_norm1 layer_norm2 final_layer_norm self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection embeddings token_embedding
position_embedding block layer SelfAttention DenseReluDense wi_0 wi_1 wi wo q k v o shared
""".split()
_WORDS: dict[tuple[str, ...], str] = {tuple(word.split("_")): word for word in VOCABULARY}
_LONGEST = max(map(len, _WORDS))


@dataclass(frozen=True)
class Key:
    """A tensor's key, separated: the file's name of the module, the part, and the name of PEFT's adapter, if any."""

    module: str
    part: str
    adapter: str = ""


def split_key(key: str) -> Key | None:
    """`lora_unet_mid_block_….lora_up.weight` → (`lora_unet_mid_block_…`, up). None for an unknown suffix."""
    head, dot, last = key.rpartition(".")
    if not dot:
        return None
    if last == "alpha":
        return Key(head, "alpha")
    if last in ("weight", "bias"):
        found = _with_weight(head, last)
        return found or (Key(head, "bias") if last == "bias" else None)
    return _ab(key.split(".")) or _other(head, last)


def _with_weight(head: str, last: str) -> Key | None:
    """A key without its last `.weight` or `.bias`."""
    parts = head.split(".")
    ab = _ab(parts)
    if ab:
        return ab if last == "weight" else Key(ab.module, "bias")
    stem, _, end = head.rpartition(".")
    if not stem or last != "weight":
        return None
    if end.startswith("lora_") and end[5:] in _WHICH:
        return Key(stem, end[5:])
    if end == "lora":
        return Key(stem, "dense")  # ziplora-pytorch: the whole d×k change
    if end in ("a1", "a2", "b1", "b2"):
        return Key(stem, "GLoRA")
    if end in ("down", "up"):
        for middle in (".lora", ".lora_linear_layer"):
            if stem.endswith(middle):
                return Key(stem[: -len(middle)], end)
        for tail, side in (
            ("_lora", ""),
            ("_lora1", "1"),
            ("_lora2", "2"),
        ):  # attention processors; XLabs: 1 image, 2 text
            if stem.endswith(tail):
                return Key(stem[: -len(tail)], end + side)
    return _other(stem, end)


def _ab(parts: list[str]) -> Key | None:
    """A key that ends in PEFT's `.lora_A` or `.lora_A.NAME` (the `.weight` is removed already), else None."""
    for place, adapter in ((len(parts) - 1, ""), (len(parts) - 2, parts[-1])):
        if place > 0 and parts[place] in ("lora_A", "lora_B"):
            return Key(".".join(parts[:place]), "down" if parts[place] == "lora_A" else "up", adapter)
    return None


def _other(head: str, last: str) -> Key | None:
    """A key of another kind than LoRA. Some kinds have PEFT's adapter name after the part; unsupported ones may have two more words."""
    tail = ""
    for words in range(3):
        part = _part(last)
        if part in KINDS or (part and (not words or (words == 1 and part in _NAMED))):
            return Key(head, part, "" if part in KINDS else tail)
        if part or not head:
            return None
        head, _, last, tail = *head.rpartition("."), last
    return None


_NAMED = frozenset((*LOHA, *LOKR, "dora_scale"))


def _part(word: str) -> str:
    """The part that a word of a key names, or the kind if it is not supported; "" for other words."""
    if word in KIND:
        return word
    if word == "lora_magnitude_vector":
        return "dora_scale"
    if word.startswith(("oft_", "boft_")):
        return "OFT"
    return {"on_input": "IA3", "set_weight": "full weights"}.get(word, "")


def bare(module: str) -> str:
    """A module's name without PEFT's prefix `base_model.model.`."""
    while module.startswith("base_model.model."):
        module = module[len("base_model.model.") :]
    return module


@cache
def canonical(module: str) -> str | None:
    """The diffusers path of a module of a UNet or text encoder, from a file's name for it; None if it is unknown.

    LDM and diffusers names of SD1.5's and SDXL's UNets give the same path. Names with dots must match exactly.
    """
    module = bare(module)
    for prefix, component in TEXT:
        if module.startswith(prefix):
            rest = module[len(prefix) :]
            while rest.startswith(prefix) and prefix.endswith("."):
                rest = rest[len(prefix) :]
            return _text(component, _read(rest, "." in prefix))
    if module.startswith("text_model."):
        return _text("text_encoder", _read(module, True))
    prefix = next(prefix for prefix in UNET if module.startswith(prefix))
    rest = module[len(prefix) :]
    while prefix == "unet." and rest.startswith("unet."):
        rest = rest[5:]
    path = _read(rest, not prefix or "." in prefix)
    path = from_ldm(path) if path else None
    if not path or not path.startswith(UNET_TOPS):
        return None
    if path.endswith(("attn1.to_out", "attn2.to_out")):
        path += ".0"  # the attention processors' name for it
    return f"unet.{path}"


def _text(component: str, path: str | None) -> str | None:
    if path and path.startswith("encoder.layers."):
        path = "text_model." + path  # transformers 5 removed `text_model`, but no tool reads the short name
    return f"{component}.{path}" if path else None


def _read(rest: str, dotted: bool) -> str | None:
    for word in (".processor.", "_processor_"):
        rest = rest.replace(word, word[0])
    path = _path(rest)
    return None if path != rest and dotted else path


def transformer_path(module: str) -> tuple[str, bool]:
    """(a transformer module's name without the prefix, whether its words are joined by dots)."""
    module = bare(module)
    prefix = next(prefix for prefix in TRANSFORMER if module.startswith(prefix))
    if prefix.endswith("transformer_") and module[len(prefix) :].startswith("blocks_"):
        prefix = prefix.removesuffix("transformer_")
    return module[len(prefix) :], not prefix or prefix.endswith(".")


def _path(name: str) -> str | None:
    """Words joined by dots or underscores → a dotted path, made of the longest matching entries of the vocabulary."""
    words = re.split(r"[._]", name)
    out: list[str] = []
    i = 0
    while i < len(words):
        if words[i].isdigit():
            if len(words[i]) > 4 or not words[i].isascii():
                return None
            out.append(words[i])
            i += 1
            continue
        for n in range(min(_LONGEST, len(words) - i), 0, -1):
            word = _WORDS.get(tuple(words[i : i + n]))
            if word:
                out.append(word)
                i += n
                break
        else:
            return None
    return ".".join(out)
