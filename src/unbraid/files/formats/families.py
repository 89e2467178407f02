"""SD3, Qwen-Image, Z-Image, and the table of all families of diffusion transformers."""

from unbraid.files.formats.blocks import Family
from unbraid.files.formats.design import Design, many, pairs
from unbraid.files.formats.design_flux import ADD, CHROMA, FF, FLUX, FLUX2, JOINT, LAST, NET, QKV, TIME
from unbraid.files.formats.design_kept import KEPT

_QKV2 = QKV.replace("attn.", "attn2.")
SD3 = Design(
    "sd3",
    "stable-diffusion-3-m",
    (
        *many("transformer_blocks", f"{JOINT} {_QKV2} attn2.to_out.0 {FF} norm1.linear norm1_context.linear"),
        *TIME[:4],
        "pos_embed.proj",
        "context_embedder",
        "norm_out.linear",
        "proj_out",
    ),
    pairs(
        "joint_blocks",
        "transformer_blocks",
        {"x_block.attn.qkv": QKV, "x_block.attn2.qkv": _QKV2, "context_block.attn.qkv": ADD}
        | {"x_block.attn.proj": "attn.to_out.0", "x_block.attn2.proj": "attn2.to_out.0"}
        | {"context_block.attn.proj": "attn.to_add_out", "x_block.adaLN_modulation.1": "norm1.linear"}
        | {"context_block.adaLN_modulation.1": "norm1_context.linear"}
        | {"x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2"}
        | {"context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2"},
    )
    | {
        "x_embedder.proj": ("pos_embed.proj",),
        "final_layer.linear": ("proj_out",),
        "context_embedder": ("context_embedder",),
    }
    | {
        f"{old}_embedder.mlp.{j}": (f"time_text_embed.{new}_embedder.linear_{i}",)
        for old, new in (("t", "timestep"), ("y", "text"))
        for i, j in ((1, 0), (2, 2))
    }
    | LAST,
    blocks={"transformer_blocks": 38, "joint_blocks": 38},
    widths=(1536, 2432),
    kohya="original",
)
_MLPS = " ".join(f"{part}_mlp.{leaf}" for part in ("img", "txt") for leaf in NET.split())
QWEN = Design(
    "qwen-image",
    "Qwen-Image",
    (
        *many("transformer_blocks", f"{JOINT} {_MLPS} img_mod.1 txt_mod.1"),
        *TIME[:2],
        "img_in",
        "txt_in",
        "norm_out.linear",
        "proj_out",
    ),
    blocks={"transformer_blocks": 60},
    widths=(3072,),
    kohya="diffusers",
)
_STREAMS = "layers noise_refiner context_refiner"
_FF3 = "feed_forward.w1 feed_forward.w2 feed_forward.w3"
_ZQKV = "attention.to_q attention.to_k attention.to_v"
Z_IMAGE = Design(
    "zimage",
    "Z-Image",
    (
        *many(_STREAMS, f"{_ZQKV} attention.to_out.0 {_FF3} adaLN_modulation.0"),
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "cap_embedder.1",
        "all_x_embedder.2-1",
        "all_final_layer.2-1.linear",
        "all_final_layer.2-1.adaLN_modulation.1",
    ),
    {
        template: parts
        for stem in _STREAMS.split()
        for template, parts in pairs(
            stem, stem, {"attention.qkv": _ZQKV, "attention.out": "attention.to_out.0"}
        ).items()
    },
    blocks={"layers": 30, "noise_refiner": 2, "context_refiner": 2},
    widths=(3840,),
    kohya="diffusers",
)
DESIGNS: dict[Family, Design] = {
    "flux": FLUX,
    "flux2": FLUX2,
    "sd3": SD3,
    "qwen-image": QWEN,
    "z-image": Z_IMAGE,
    "chroma": CHROMA,
    **KEPT,
}
