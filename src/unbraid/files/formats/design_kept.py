"""Transformers for whose names no conversion is known: they are recognised, and written as they were read."""

from unbraid.files.formats.blocks import Family
from unbraid.files.formats.design import Design, many
from unbraid.files.formats.design_flux import FLUX, TIME

_STREAMS = "layers noise_refiner context_refiner"
_FF3 = "feed_forward.w1 feed_forward.w2 feed_forward.w3"
_STREAM = "adaLN_modulation.1 attn1.to_q attn1.to_k attn1.to_v attn1.to_out attn1.to_q_t attn1.to_k_t attn1.to_v_t attn1.to_out_t"
_EXPERTS = " ".join(f"{part}.w{i}" for part in ("ff_i.shared_experts", "ff_i.experts.*", "ff_t") for i in (1, 2, 3))
HIDREAM = Design(
    "hidream",
    "hidream-i1",
    kept=(
        *tuple(
            f"{stem}_stream_blocks.*.block.{leaf}"
            for stem in ("double", "single")
            for leaf in f"{_STREAM} {_EXPERTS}".split()
        ),
        "x_embedder.proj",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
        "caption_projection.*.linear",
        *tuple(
            f"{x}.linear_{i}" for x in ("t_embedder.timestep_embedder", "p_embedder.pooled_embedder") for i in (1, 2)
        ),
    ),
    blocks={"double_stream_blocks": 16, "single_stream_blocks": 32},
    widths=(2560,),
)
WAN = Design(
    "wan",
    "wan-2.1",
    kept=many("blocks", " ".join(f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in ("q", "k", "v", "o")))
    + many("blocks", "cross_attn.k_img cross_attn.v_img ffn.0 ffn.2 attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0")
    + many("blocks", "attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0 attn2.add_k_proj attn2.add_v_proj")
    + many("blocks", "ffn.net.0.proj ffn.net.2")
    + ("time_projection.1", "condition_embedder.time_proj", "head.head", "proj_out")
    + tuple(f"{x}_embedding.{i}" for x in ("time", "text") for i in (0, 2))
    + tuple(f"condition_embedder.{x}_embedder.linear_{i}" for x in ("time", "text") for i in (1, 2)),
    blocks={"blocks": 40},
    widths=(1536, 3072, 5120),
)
_HALVES = " ".join(f"{a}.{x}_proj" for a in ("self_attn", "cross_attn") for x in ("q", "k", "v", "output"))
ANIMA = Design(
    "anima",
    "anima",
    kept=many("blocks", f"{_HALVES} mlp.layer1 mlp.layer2")
    + many("blocks", " ".join(f"adaln_modulation_{x}.{i}" for x in ("self_attn", "cross_attn", "mlp") for i in (1, 2)))
    + many("transformer_blocks", " ".join(f"attn{n}.{x}" for n in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0")))
    + many("transformer_blocks", "ff.net.0.proj ff.net.2")
    + many("transformer_blocks", " ".join(f"norm{n}.linear_{i}" for n in (1, 2, 3) for i in (1, 2)))
    + ("patch_embed.proj", "x_embedder.proj.1", "norm_out.linear_1", "norm_out.linear_2", "proj_out")
    + ("time_embed.t_embedder.linear_1", "time_embed.t_embedder.linear_2", "final_layer.linear"),
    blocks={"blocks": 36, "transformer_blocks": 36},
    widths=(2048,),
)
_KREA = "attn.to_q attn.to_k attn.to_v attn.to_gate attn.to_out.0 ff.gate ff.up ff.down"
_KREA_OLD = "attn.wq attn.wk attn.wv attn.wo attn.gate mlp.gate mlp.up mlp.down"
KREA2 = Design(
    "krea2",
    "krea-2",
    kept=many("transformer_blocks text_fusion.layerwise_blocks text_fusion.refiner_blocks", _KREA)
    + many("blocks txtfusion.layerwise_blocks txtfusion.refiner_blocks", _KREA_OLD)
    + (
        "img_in",
        "time_embed.linear_1",
        "time_embed.linear_2",
        "time_mod_proj",
        "text_fusion.projector",
        "txt_in.linear_1",
    )
    + (
        "txt_in.linear_2",
        "final_layer.linear",
        "first",
        "last.linear",
        "tmlp.0",
        "tmlp.2",
        "tproj.1",
        "txtmlp.1",
        "txtmlp.3",
    )
    + ("txtfusion.projector",),
    widths=(6144,),
)
LUMINA2 = Design(
    "lumina2",
    "lumina-2",
    kept=many(
        _STREAMS, f"attention.qkv attention.out {_FF3} adaLN_modulation.1 attn.to_q attn.to_k attn.to_v attn.to_out.0"
    )
    + many(_STREAMS, "feed_forward.linear_1 feed_forward.linear_2 feed_forward.linear_3 norm1.linear")
    + ("x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear")
    + ("final_layer.adaLN_modulation.1", "norm_out.linear_1", "norm_out.linear_2")
    + ("time_caption_embed.timestep_embedder.linear_1", "time_caption_embed.timestep_embedder.linear_2")
    + ("time_caption_embed.caption_embedder.1",),
    blocks={"layers": 26, "noise_refiner": 2, "context_refiner": 2},
    widths=(2304,),
)
_REFINER = "self_attn_qkv self_attn_proj mlp.fc1 mlp.fc2 adaLN_modulation.1"
HUNYUAN = Design(
    "hunyuan-video",
    "hunyuan-video",
    kept=FLUX.diffusers
    + many(
        "double_blocks",
        " ".join(f"{x}_{leaf}" for x in ("img", "txt") for leaf in ("attn_qkv", "attn_proj", "mod.linear")),
    )
    + many("double_blocks", "img_mlp.fc1 img_mlp.fc2 txt_mlp.fc1 txt_mlp.fc2")
    + many("single_blocks", "linear1 linear2 modulation.linear")
    + many("txt_in.individual_token_refiner.blocks", _REFINER)
    + many(
        "context_embedder.token_refiner.refiner_blocks",
        "attn.to_q attn.to_k attn.to_v attn.to_out.0 ff.net.0.proj ff.net.2 norm_out.linear",
    )
    + (
        "context_embedder.proj_in",
        "img_in.proj",
        "txt_in.input_embedder",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    )
    + tuple(f"context_embedder.{x}" for x in TIME[:4])
    + tuple(f"{x}_in.mlp.{i}" for x in ("time", "guidance") for i in (0, 2))
    + ("vector_in.in_layer", "vector_in.out_layer"),
    blocks={"transformer_blocks": 20, "double_blocks": 20, "single_transformer_blocks": 40, "single_blocks": 40},
    widths=(3072,),
    rows={"single_blocks.*.linear1": 7, "double_blocks.*.img_mlp.fc1": 4, "double_blocks.*.txt_mlp.fc1": 4},
)
KEPT: dict[Family, Design] = {
    "hidream": HIDREAM,
    "wan": WAN,
    "anima": ANIMA,
    "krea2": KREA2,
    "lumina2": LUMINA2,
    "hunyuan-video": HUNYUAN,
}
