"""The parts of LyCORIS's kinds (arXiv 2309.14859) and of DoRA (arXiv 2402.09353), by the ends of their keys. Pure Python."""

import re

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
VECTORS = (
    "diff_b",
    "w_norm",
    "b_norm",
)  # changes of biases and norms, which no LoRA can hold; a norm's `diff` is w_norm
SUFFIXES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        *((rf"\.{part}$", part) for part in (*LOHA, *LOKR, "diff", *VECTORS)),
        (r"\.dora_scale$|\.lora_magnitude_vector(\.weight)?$", "dora_scale"),
        (r"\.lora_magnitude_vector\.(?P<adapter>[^.]+)(\.weight)?$", "dora_scale"),
        (r"\.set_weight$", "full weights"),
    )
)
KIND: dict[str, str] = {
    **dict.fromkeys(LOHA, "LoHa"),
    **dict.fromkeys(LOKR, "LoKr"),
    "dora_scale": "DoRA",
    "diff": "full changes",
    **dict.fromkeys(VECTORS, "norms and biases"),
}
