"""The kinds of changes besides plain LoRA: LyCORIS's (arXiv 2309.14859) and DoRA (arXiv 2402.09353). A part is the last word of a key.
Pure Python."""

from collections.abc import Mapping
from math import prod

Shape = tuple[int, ...]
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
# changes of biases and norms, which a LoRA cannot hold; a norm's `diff` is treated as w_norm
VECTORS = ("diff_b", "w_norm", "b_norm")
KIND: dict[str, str] = {
    **dict.fromkeys(LOHA, "LoHa"),
    **dict.fromkeys(LOKR, "LoKr"),
    "dora_scale": "DoRA",
    "diff": "full changes",
    **dict.fromkeys(VECTORS, "norms and biases"),
}


def sizes(parts: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Rows and columns (times the kernel) of a change in LoHa's, LoKr's or `diff`'s parts. None for another kind, and for shapes that do not
    fit."""
    diff = parts.get("diff", ())
    if len(diff) > 1:
        return diff[0], prod(diff[1:])
    if "hada_w1_a" in parts:
        first, second = (_product(parts, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in "12")
        return first if first == second and parts["hada_w1_a"] == parts.get("hada_w2_a") else None
    if any(part in parts for part in LOKR):
        first = _whole(parts, "lokr_w1") or _product(parts, "lokr_w1_a", "lokr_w1_b", "")
        second = _whole(parts, "lokr_w2") or _product(parts, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        return (first[0] * second[0], first[1] * second[1]) if first and second else None
    return None


def _whole(parts: Mapping[str, Shape], part: str) -> tuple[int, int] | None:
    shape = parts.get(part, ())
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else None


def _product(parts: Mapping[str, Shape], left: str, right: str, core: str) -> tuple[int, int] | None:
    """The size of `[d, r]` times `[r, k]`; with a core `[r, s, …]` the factors are `[r, d]` and `[s, k]`."""
    a, b, t = parts.get(left, ()), parts.get(right, ()), parts.get(core, ())
    if len(a) != 2 or len(b) < 2:
        return None
    if not t:
        return (a[0], prod(b[1:])) if a[1] == b[0] else None
    return (a[1], b[1] * prod(t[2:])) if len(t) > 2 and len(b) == 2 and t[:2] == (a[0], b[0]) else None
