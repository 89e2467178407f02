"""LoRA key names: what every tool calls a module, and the one name that unbraid has for it.

A key is a module's name and a suffix. `split_key` takes the suffix off, `canonical` gives the module its
diffusers path with the component in front: `unet.mid_block.attentions.0.proj_in`,
`text_encoder.text_model.encoder.layers.0.mlp.fc1`, `transformer.transformer_blocks.0.attn.to_q`.
Dots and underscores are read alike: a name is cut into words and put together by a vocabulary.
Pure Python, no torch: `doctor` and `inspect` answer from a file's header alone.
"""

import re
from dataclasses import dataclass
from functools import cache

from unbraid.formats.blocks import from_ldm
from unbraid.formats.kinds import SUFFIXES as KIND_SUFFIXES

SUFFIXES: tuple[tuple[re.Pattern[str], str], ...] = (
    tuple(
        (re.compile(pattern), part)
        for pattern, part in (
            (r"\.lora_down\.weight$|\.lora\.down\.weight$|\.lora_linear_layer\.down\.weight$", "down"),
            (r"\.lora_up\.weight$|\.lora\.up\.weight$|\.lora_linear_layer\.up\.weight$", "up"),
            (r"_lora\.down\.weight$", "down"),  # attention processors: `….processor.to_q_lora.down.weight`
            (r"_lora\.up\.weight$", "up"),
            (r"_lora1\.down\.weight$", "down1"),  # XLabs: 1 = image, 2 = text
            (r"_lora1\.up\.weight$", "up1"),
            (r"_lora2\.down\.weight$", "down2"),
            (r"_lora2\.up\.weight$", "up2"),
            (r"\.lora_A(\.(?!weight$)(?P<adapter>[^.]+))?(\.weight)?$", "down"),
            (r"\.lora_B(\.(?!weight$|bias$)(?P<adapter>[^.]+))?(\.weight)?$", "up"),
            (r"\.lora_mid\.weight$", "mid"),
            (r"\.alpha$", "alpha"),
            (r"\.lora\.weight$", "dense"),  # ziplora-pytorch: the whole d×k change
            (r"\.oft_\w+(\.weight)?$|\.(oft_|boft_)[\w.]+$", "OFT"),
            (r"\.[ab][12]\.weight$", "GLoRA"),
            (r"\.on_input$", "IA3"),
            (r"\.lora_B(\.[^.]+)?\.bias$|\.bias$", "bias"),
        )
    )
    + KIND_SUFFIXES
)
KINDS = ("OFT", "GLoRA", "IA3", "full weights", "bias")  # recognised, not read; those that are: unbraid.formats.kinds

PREFIXES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), component)
    for pattern, component in (
        (r"lora_unet_(?=double_blocks_|single_blocks_|joint_blocks_)", "transformer"),
        (r"(model\.)?diffusion_model\.(?=double_blocks|single_blocks|joint_blocks)", "transformer"),
        (
            r"lora_unet_(?=img_in|txt_in|time_in|vector_in|guidance_in|final_layer|x_embedder|context_embedder)",
            "transformer",
        ),
        (r"(lora_|lycoris_)?transformer[._](?!blocks[._])", "transformer"),
        (r"lycoris_(?=transformer_blocks_|single_transformer_blocks_)", "transformer"),
        (
            r"(?=transformer_blocks\.|single_transformer_blocks\.|double_blocks\.|single_blocks\.|joint_blocks\.)",
            "transformer",
        ),
        (r"lora_unet_|lycoris_(unet_)?|(model\.)?diffusion_model\.", "unet"),
        (r"(unet\.)+", "unet"),
        (r"(?=(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\.)", "unet"),
        (r"lora_te1?_|(text_encoder\.)+|text_encoders\.clip_l\.(transformer\.)?|clip_l\.", "text_encoder"),
        (r"lora_te2_|(text_encoder_2\.)+|text_encoders\.clip_g\.(transformer\.)?|clip_g\.", "text_encoder_2"),
        (r"lora_te3_|(text_encoder_3\.)+|text_encoders\.t5xxl\.(transformer\.)?|t5xxl\.", "text_encoder_3"),
        (r"(?=text_model\.)", "text_encoder"),
    )
)

VOCABULARY = """
down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers conv transformer_blocks attn1 attn2 to_q to_k
to_v to_out ff net proj proj_in proj_out norm norm1 norm2 norm3 conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj
time_embedding add_embedding linear_1 linear_2 conv_norm_out
input_blocks middle_block output_blocks op in_layers out_layers emb_layers skip_connection time_embed label_emb out
text_model encoder layers layer_norm1 layer_norm2 final_layer_norm self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection embeddings token_embedding
position_embedding block layer SelfAttention DenseReluDense wi_0 wi_1 wi wo q k v o shared
single_transformer_blocks attn add_q_proj add_k_proj add_v_proj to_add_out ff_context norm1_context norm_out linear
proj_mlp x_embedder context_embedder time_text_embed timestep_embedder text_embedder guidance_embedder pos_embed
double_blocks single_blocks img_attn txt_attn qkv img_mlp txt_mlp img_mod txt_mod lin linear1 linear2 modulation img_in
txt_in time_in vector_in guidance_in in_layer out_layer final_layer adaLN_modulation
joint_blocks x_block context_block
""".split()
_WORDS: dict[tuple[str, ...], str] = {tuple(word.split("_")): word for word in VOCABULARY}
_LONGEST = max(map(len, _WORDS))


@dataclass(frozen=True)
class Key:
    """A tensor's key, cut up: the module as the file calls it, the part, and PEFT's adapter name if any."""

    module: str
    part: str
    adapter: str = ""


def split_key(key: str) -> Key | None:
    """`lora_unet_mid_block_….lora_up.weight` → (`lora_unet_mid_block_…`, up). None: no known suffix."""
    for pattern, part in SUFFIXES:
        found = pattern.search(key)
        if found:
            return Key(key[: found.start()], part, found.groupdict().get("adapter") or "")
    return None


@cache
def canonical(module: str) -> str | None:
    """The diffusers path of a module that a file calls `module`, or None where it is not known.

    Fused Flux and SD3 modules keep their original names (`transformer.double_blocks.0.img_attn.qkv`):
    `unbraid.formats.fused` splits them. Both namings of SD1.5's and SDXL's UNets come out the same.
    """
    while module.startswith("base_model.model."):
        module = module[len("base_model.model.") :]
    for pattern, component in PREFIXES:
        found = pattern.match(module)
        if found:
            return _canonical_in(component, module[found.end() :])
    return None


def _canonical_in(component: str, rest: str) -> str | None:
    path = _path(re.sub(r"(^|[._])processor[._]", r"\1", rest))
    if path is None:
        # Other diffusion transformers: their dotted names are taken as they are.
        dotted = component == "transformer" and re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)+", rest)
        return f"transformer.{rest}" if dotted else None
    if component == "unet":
        path = from_ldm(path)
        if path is None:
            return None
    if path.endswith(("attn1.to_out", "attn2.to_out", "attn.to_out")):
        path += ".0"  # the attention processors' name for it
    if component.startswith("text_encoder") and path.startswith("encoder.layers."):
        path = "text_model." + path  # transformers 5 flattened CLIPTextModel: no tool loads the short name
    return f"{component}.{path}"


def _path(name: str) -> str | None:
    """Words joined by dots or underscores → a dotted path, by the longest vocabulary entries."""
    words = re.split(r"[._]", name)
    out: list[str] = []
    i = 0
    while i < len(words):
        if words[i].isdigit():
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
