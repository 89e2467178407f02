"""Flux.1, Chroma and Flux.2."""

from unbraid.files.formats.design import Design, many, pairs

QKV, ADD = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
JOINT = f"{QKV} attn.to_out.0 {ADD} attn.to_add_out"
NET = "net.0.proj net.2"
FF = " ".join(f"{part}.{leaf}" for part in ("ff", "ff_context") for leaf in NET.split())
TIME = tuple(f"time_text_embed.{part}_embedder.linear_{i}" for part in ("timestep", "text", "guidance") for i in (1, 2))
_ENDS = ("x_embedder", "context_embedder", "norm_out.linear", "proj_out")
_DOUBLE = {
    "img_attn.qkv": QKV,
    "txt_attn.qkv": ADD,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_FLUX_IN = {"img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",)}
LAST = {"final_layer.adaLN_modulation.1": ("norm_out.linear",)}
_FLUX_BLOCKS = (
    pairs(
        "double_blocks",
        "transformer_blocks",
        _DOUBLE
        | {"img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2"}
        | {"txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2"},
    )
    | pairs("single_blocks", "single_transformer_blocks", {"linear1": f"{QKV} proj_mlp", "linear2": "proj_out"})
    | _FLUX_IN
)
_FLUX_MOD = pairs(
    "double_blocks", "transformer_blocks", {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"}
)
_FLUX_ROWS = {"single_blocks.*.linear1": 7, "double_blocks.*.img_mlp.0": 4, "double_blocks.*.txt_mlp.0": 4}
_FLUX_TIME = {
    f"{old}_in.{layer}": (f"time_text_embed.{new}_embedder.linear_{i}",)
    for old, new in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
    for i, layer in ((1, "in_layer"), (2, "out_layer"))
}
_SINGLES = many("single_transformer_blocks", f"{QKV} proj_mlp proj_out")
FLUX = Design(
    "flux1",
    "flux-1-dev",
    (
        *many("transformer_blocks", f"{JOINT} {FF} norm1.linear norm1_context.linear"),
        *_SINGLES,
        "single_transformer_blocks.*.norm.linear",
        *TIME,
        *_ENDS,
    ),
    _FLUX_BLOCKS
    | _FLUX_MOD
    | {"single_blocks.*.modulation.lin": ("single_transformer_blocks.*.norm.linear",)}
    | _FLUX_TIME
    | LAST,
    blocks={"transformer_blocks": 19, "double_blocks": 19, "single_transformer_blocks": 38, "single_blocks": 38},
    widths=(3072,),
    rows=_FLUX_ROWS,
    kohya="original",
)
_GUIDE = tuple(
    f"distilled_guidance_layer.{x}" for x in ("in_proj", "out_proj", "layers.*.linear_1", "layers.*.linear_2")
)
CHROMA = Design(
    "chroma",
    "chroma",
    (*many("transformer_blocks", f"{JOINT} {FF}"), *_SINGLES, *_GUIDE, "x_embedder", "context_embedder", "proj_out"),
    _FLUX_BLOCKS,
    kept=many("distilled_guidance_layer.layers", "in_layer out_layer"),
    blocks=FLUX.blocks,
    widths=(3072,),
    rows=_FLUX_ROWS,
    kohya="original",
)
_FF2 = "ff.linear_in ff.linear_out ff_context.linear_in ff_context.linear_out"
FLUX2 = Design(
    "flux2",
    "Flux.2-dev",
    many("transformer_blocks", f"{JOINT} {_FF2}")
    + many("single_transformer_blocks", "attn.to_qkv_mlp_proj attn.to_out")
    + tuple(f"time_guidance_embed.{part}_embedder.linear_{i}" for part in ("timestep", "guidance") for i in (1, 2))
    + tuple(f"{part}.linear" for part in ("double_stream_modulation_img", "double_stream_modulation_txt"))
    + ("single_stream_modulation.linear", *_ENDS),
    pairs(
        "double_blocks",
        "transformer_blocks",
        _DOUBLE
        | {"img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out"}
        | {"txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out"},
    )
    | pairs("single_blocks", "single_transformer_blocks", {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"})
    | {
        f"{old}_in.{layer}": (f"time_guidance_embed.{new}_embedder.linear_{i}",)
        for old, new in (("time", "timestep"), ("guidance", "guidance"))
        for i, layer in ((1, "in_layer"), (2, "out_layer"))
    }
    | {
        f"{part}.lin": (f"{part}.linear",)
        for part in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    }
    | _FLUX_IN,
    kept=(
        "final_layer.adaLN_modulation.1",
    ),  # diffusers swaps its halves when it loads the model, but not when it loads a LoRA
    blocks={"transformer_blocks": 8, "double_blocks": 8, "single_transformer_blocks": 48, "single_blocks": 48},
    widths=(3072, 4096, 6144),
    rows={"single_blocks.*.linear1": 9, "double_blocks.*.img_mlp.0": 6, "double_blocks.*.txt_mlp.0": 6}
    | {"transformer_blocks.*.ff.linear_in": 6, "single_transformer_blocks.*.attn.to_qkv_mlp_proj": 9},
    kohya="original",
)
