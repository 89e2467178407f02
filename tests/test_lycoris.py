"""LoHa, LoKr, full changes, norms and DoRA, compared with a dense reference in fp64, with peft, and with LyCORIS itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lycoris.modules as lycoris_modules
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from spelling import save
from torch import Tensor, nn

from unbraid.common.errors import UsageError
from unbraid.core.lowrank import delta
from unbraid.files.changes import LENIENT, Conversion, change
from unbraid.files.doctor import diagnose
from unbraid.files.formats.recognise import Verdict
from unbraid.files.lora_file import read
from unbraid.files.merge import Size
from unbraid.files.opened import opened_lora
from unbraid.files.report import interference, report
from unbraid.files.tools import Source, convert, edit, merge_files, resize

LINEAR = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_input_blocks_1_0_in_layers_2"
NORM = "lora_unet_input_blocks_4_1_norm"
TO_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV1 = "unet.down_blocks.0.resnets.0.conv1"
D, K = 12, 20
Parts = dict[str, Tensor]


def rnd(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, generator=rng, dtype=torch.float64).float()


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[r, r, kh, kw], [r, d], [r, k] → [d, k, kh, kw], entry by entry as in the paper."""
    r, d, k = len(core), left.shape[1], right.shape[1]
    out = torch.zeros(d, k, *core.shape[2:], dtype=torch.float64)
    for i in range(r):
        for j in range(r):
            out += left[i].double()[:, None, None, None] * right[j].double()[None, :, None, None] * core[i, j].double()
    return out


def kron(first: Tensor, second: Tensor) -> Tensor:
    """Block by block: [l, m] ⊗ [n, p, …] → [l n, m p, …]."""
    first, second = first.double(), second.double()
    return torch.cat([torch.cat([entry * second for entry in row], 1) for row in first])


def loha(left: Parts, cols: int) -> Tensor:
    halves = [left[f"hada_w{i}_a"].double() @ left[f"hada_w{i}_b"].double().reshape(3, cols) for i in "12"]
    return halves[0] * halves[1]


HADA = {"hada_w1_a": rnd(D, 3), "hada_w1_b": rnd(3, K), "hada_w2_a": rnd(D, 3, seed=1), "hada_w2_b": rnd(3, K, seed=1)}
HADA_CONV = HADA | {"hada_w1_b": rnd(3, K * 9), "hada_w2_b": rnd(3, K * 9, seed=1)}
HADA_CORE = {key: tensor.T.contiguous() if key.endswith("a") else tensor for key, tensor in HADA.items()} | {
    "hada_t1": rnd(3, 3, 3, 3),
    "hada_t2": rnd(3, 3, 3, 3, seed=1),
}
W1, W2 = rnd(3, 4), rnd(4, 5)
W1_A, W1_B, W2_A, W2_B = rnd(3, 2), rnd(2, 4), rnd(4, 2), rnd(2, 5)
CORE = {"lokr_t2": rnd(2, 2, 3, 3), "lokr_w2_a": rnd(2, 4), "lokr_w2_b": rnd(2, 5)}
CASES: dict[str, tuple[str, Parts, Tensor]] = {  # key, parts, the change without alpha / r
    "LoHa": (LINEAR, HADA, loha(HADA, K)),
    "LoHa, conv": (CONV, HADA_CONV, loha(HADA_CONV, K * 9).reshape(D, K, 3, 3)),
    "LoHa, Tucker": (
        CONV,
        HADA_CORE,
        tucker(HADA_CORE["hada_t1"], HADA_CORE["hada_w1_a"], HADA_CORE["hada_w1_b"])
        * tucker(HADA_CORE["hada_t2"], HADA_CORE["hada_w2_a"], HADA_CORE["hada_w2_b"]),
    ),
    "LoKr": (LINEAR, {"lokr_w1": W1, "lokr_w2": W2}, kron(W1, W2)),
    "LoKr, w2 factored": (LINEAR, {"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B}, kron(W1, W2_A @ W2_B)),
    "LoKr, both factored": (
        LINEAR,
        {"lokr_w1_a": W1_A, "lokr_w1_b": W1_B, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B},
        kron(W1_A.double() @ W1_B.double(), W2_A.double() @ W2_B.double()),
    ),
    "LoKr, conv": (CONV, {"lokr_w1": W1, "lokr_w2": rnd(4, 5, 3, 3)}, kron(W1, rnd(4, 5, 3, 3))),
    "LoKr, conv, w2 factored": (
        CONV,
        {"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": rnd(2, 45)},
        kron(W1, (W2_A.double() @ rnd(2, 45).double()).reshape(4, 5, 3, 3)),
    ),
    "LoKr, Tucker": (
        CONV,
        {"lokr_w1": W1} | CORE,
        kron(W1, tucker(CORE["lokr_t2"], CORE["lokr_w2_a"], CORE["lokr_w2_b"])),
    ),
    "diff": (LINEAR, {"diff": rnd(D, K)}, rnd(D, K).double()),
    "diff, conv": (CONV, {"diff": rnd(D, K, 3, 3)}, rnd(D, K, 3, 3).double()),
}


def file_of(path: Path, key: str, parts: Parts, alpha: float | None = None) -> Path:
    more = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    return save(path, {f"{key}.{part}": tensor for part, tensor in (parts | more).items()})


def off(found: Tensor, want: Tensor) -> float:
    return float((found.double().reshape(want.shape) - want).norm() / want.norm())


def strength(parts: Parts, alpha: float) -> float:
    """alpha / r. For a full change, and for LoKr with two full factors, alpha does not count."""
    ranks = [len(one) for key, one in parts.items() if key.endswith("_b")]
    return alpha / ranks[0] if ranks else 1.0


@pytest.mark.parametrize("case", CASES)
def test_every_kind_is_read_as_its_dense_reference(case: str, tmp_path: Path) -> None:
    key, parts, want = CASES[case]
    want = want * strength(parts, 1.5)
    path = file_of(tmp_path / "a.safetensors", key, parts, 1.5)
    file = read(path)
    name = CONV1 if key == CONV else TO_K
    one = file.modules[name]
    assert off(delta(one), want) < 2e-6 and file.errors[name] < 2e-6
    assert one.down.shape[1:] == want.shape[1:], "the kernel is the weight's"
    assert len(one.down) <= min(want.shape[0], want[0].numel())
    with opened_lora(path) as opened:
        assert off(change(opened, name, torch.zeros(want.shape)), want) < 1e-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_limit_gives_the_best_approximation_and_its_true_error(case: str, limit: int, tmp_path: Path) -> None:
    key, parts, want = CASES[case]
    path = file_of(tmp_path / "a.safetensors", key, parts, 1.0)
    want = (want * strength(parts, 1.0)).flatten(1)
    s = torch.linalg.svdvals(want)
    best = float(s[limit:].norm() / s.norm())
    file = read(path, conversion=Conversion(limit, strict=False))
    (name,) = file.modules
    assert len(file.modules[name].down) <= limit
    assert file.errors[name] == pytest.approx(off(delta(file.modules[name]), want), abs=1e-5)
    assert file.errors[name] == pytest.approx(best, rel=1e-3, abs=1e-5)
    if best > 1e-3:
        with pytest.raises(UsageError, match="is off by"):
            read(path, conversion=Conversion(limit))


def test_merge_of_kinds_is_the_sum_of_their_changes(tmp_path: Path) -> None:
    wants, sources = [], []
    for i, case in enumerate(["LoHa", "LoKr", "LoKr, w2 factored", "diff"]):
        key, parts, want = CASES[case]
        path = file_of(tmp_path / f"{i}.safetensors", key, parts, 2.0)
        sources.append(Source(path, 0.5 + i))
        wants.append(want * strength(parts, 2.0) * (0.5 + i))
    merge_files(sources, tmp_path / "out.safetensors")
    assert off(delta(read(tmp_path / "out.safetensors").modules[TO_K]), sum(wants, torch.zeros(()))) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_inspect_measures_every_kind(case: str, tmp_path: Path) -> None:
    key, parts, want = CASES[case]
    path = file_of(tmp_path / "a.safetensors", key, parts, 1.5)
    found = report(path)
    assert found.blocks[0].norm == pytest.approx(float((want * strength(parts, 1.5)).norm()), rel=1e-5)
    assert found.catalogue.kinds == {case.split(",")[0].replace("diff", "full changes"): len(parts)}
    assert interference(path, path)[0].cosine == pytest.approx(1, abs=1e-5)
    assert not any("twice" in warning for warning in diagnose(path, "comfyui").warnings)


def with_vectors() -> Parts:
    parts = {f"{LINEAR}.diff": rnd(D, K), f"{LINEAR}.diff_b": rnd(D)}
    return parts | {f"{NORM}.w_norm": rnd(K), f"{NORM}.b_norm": rnd(K, seed=1)}


def test_norms_and_biases_are_kept_scaled_and_summed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", with_vectors())
    keys = {f"{LINEAR}.diff_b", f"{NORM}.w_norm", f"{NORM}.b_norm"}
    assert not diagnose(path, "comfyui").dropped
    done = convert(path, tmp_path / "b.safetensors")
    assert done.vectors == 3
    kept = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(kept[key], with_vectors()[key]) for key in keys)
    edit(path, tmp_path / "c.safetensors", blocks=("IN04=0.5",), strength=0.5)
    assert all(torch.equal(load_file(tmp_path / "c.safetensors")[k], with_vectors()[k] * 0.25) for k in keys)
    resize(path, tmp_path / "d.safetensors", Size(rank=2))
    assert all(torch.equal(load_file(tmp_path / "d.safetensors")[k], with_vectors()[k]) for k in keys)
    merge_files([Source(path, 0.5), Source(path, 2.0)], tmp_path / "e.safetensors")
    assert all(torch.allclose(load_file(tmp_path / "e.safetensors")[k], with_vectors()[k] * 2.5) for k in keys)


def test_norms_and_biases_are_never_dropped_silently(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", with_vectors())
    with pytest.raises(UsageError, match="which no LoRA does"):
        read(path)
    with pytest.raises(UsageError, match="no place in diffusers' files"):
        convert(path, tmp_path / "b.safetensors", "diffusers")
    with pytest.raises(UsageError, match="only with concat"):
        merge_files([Source(path), Source(path)], tmp_path / "b.safetensors", "ties")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_file_of_norms_alone_is_kept(tmp_path: Path) -> None:
    tensors = {f"{NORM}.diff": rnd(K), f"{NORM}.diff_b": rnd(K, seed=1)}
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"{NORM}.w_norm"], rnd(K))


DAMAGED: dict[str, tuple[Callable[[], Parts], str]] = {
    "LoHa without a half": (lambda: {k: v for k, v in HADA.items() if k != "hada_w2_b"}, "hada_w2_b is missing"),
    "LoHa of two shapes": (lambda: HADA | {"hada_w2_b": rnd(3, K + 1)}, "do not fit"),
    "LoKr without w1": (lambda: {"lokr_w2": W2}, "missing"),
    "LoKr without w2_b": (lambda: {"lokr_w1": W1, "lokr_w2_a": W2_A}, "missing"),
    "LoKr of two ranks": (lambda: {"lokr_w1": W1, "lokr_w2_a": W2_A, "lokr_w2_b": rnd(3, 5)}, "do not fit"),
    "LoHa and LoRA": (lambda: HADA | {"lora_up.weight": rnd(D, 2), "lora_down.weight": rnd(2, K)}, "two kinds"),
    "an empty diff": (lambda: {"diff": rnd(0, K)}, "empty"),
    "DoRA without its base": (
        lambda: {"lora_up.weight": rnd(D, 2), "lora_down.weight": rnd(2, K), "dora_scale": rnd(D, 1)},
        "DoRA needs the weights of its base",
    ),
    "LoKr of two forms": (lambda: {"lokr_w1": W1, "lokr_w2": W2, "lokr_w2_a": W2_A, "lokr_w2_b": W2_B}, "not belong"),
    "LoHa with half a core": (lambda: HADA | {"hada_t1": rnd(3, 3, 3, 3)}, "hada_t2 is missing"),
    "LoHa of another core": (lambda: HADA_CORE | {"hada_t2": rnd(3, 2, 3, 3)}, "do not fit"),
    "a rank of LoHa": (
        lambda: {
            f"hada_w{i}_{a}": torch.ones(5000, 1) if a == "b" else torch.ones(1, 5000) for i in "12" for a in "ab"
        },
        "rank 5000",
    ),
    "LoKr far larger than its file": (
        lambda: {"lokr_w1": torch.ones(2000, 1), "lokr_w2_a": torch.ones(2000, 1), "lokr_w2_b": torch.ones(1, 2000)},
        "too large",
    ),
    "LoHa far larger than its file": (
        lambda: {f"hada_w{i}_{a}": torch.ones(*((40000, 1) if a == "a" else (1, 40000))) for i in "12" for a in "ab"},
        "too large",
    ),
    "products that overflow": (lambda: {key: one * 1e8 for key, one in HADA.items()}, "overflow"),
    "a diff that overflows": (lambda: {"diff": rnd(D, K) * 1e30}, "overflow"),
    "NaN": (lambda: {"lokr_w1": W1 * torch.nan, "lokr_w2": W2}, "NaN"),
    "a norm that is a matrix": (lambda: {"w_norm": rnd(3, 4)}, "no vector"),
    "a magnitude alone": (lambda: {"dora_scale": rnd(D, 1)}, "DoRA"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_kinds_are_one_line(case: str, tmp_path: Path) -> None:
    parts, message = DAMAGED[case]
    path = file_of(tmp_path / "a.safetensors", LINEAR, parts(), 1.0)
    for conversion in (Conversion(), LENIENT):
        with pytest.raises(UsageError, match=message) as found:
            read(path, conversion=conversion)
        assert "\n" not in str(found.value)


def peft_file(config: Any, path: Path) -> tuple[Path, nn.Module, Tensor]:
    """A module adapted and saved by peft, and the weight that it computes with."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("attn2_to_k", nn.Linear(K, D, bias=False))
    before = net[0].weight.detach().clone()  # type: ignore[union-attr]
    model = get_peft_model(net, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "base_layer" not in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    merged = model.merge_and_unload()
    return path / "adapter_model.safetensors", merged, merged[0].weight.detach() - before  # type: ignore[index]


PEFT = {
    "LoHa": LoHaConfig(r=3, alpha=5, target_modules=["attn2_to_k"]),
    "LoKr": LoKrConfig(r=2, alpha=5, target_modules=["attn2_to_k"]),
    "LoKr, whole": LoKrConfig(r=32, alpha=5, target_modules=["attn2_to_k"]),
    "LoKr, both": LoKrConfig(r=1, alpha=5, decompose_both=True, target_modules=["attn2_to_k"]),
    "DoRA": LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=["attn2_to_k"]),
}


@pytest.mark.parametrize("case", PEFT)
def test_pefts_own_merge_is_the_oracle(case: str, tmp_path: Path) -> None:
    path, _, want = peft_file(PEFT[case], tmp_path / "peft")
    module = "base_model.model.unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {key.replace("base_model.model.attn2_to_k", module): one for key, one in load_file(path).items()}
    save(path, tensors)  # with adapter_config.json beside it
    torch.manual_seed(0)
    weight = nn.Linear(K, D, bias=False).weight.detach()
    file = read(path, conversion=Conversion(weight=lambda _: weight, strict=False))
    assert off(delta(file.modules[TO_K]), want.double()) < 1e-5


def test_dora_is_read_per_output_and_per_input(tmp_path: Path) -> None:
    weight, up, down = rnd(D, K), rnd(D, 2), rnd(2, K)
    moved = weight.double() + up.double() @ down.double() * 1.5 / 2
    for magnitude, axis in ((rnd(D, 1).abs(), 1), (rnd(1, K).abs(), 0), (rnd(D).abs(), 1)):
        parts = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude}
        path = file_of(tmp_path / "a.safetensors", LINEAR, parts, 1.5)
        given = magnitude.double() if magnitude.ndim == 2 else magnitude.double()[:, None]
        want = given * moved / moved.norm(dim=axis, keepdim=True) - weight.double()
        with opened_lora(path) as opened:
            assert off(change(opened, TO_K, weight), want) < 1e-6
        file = read(path, conversion=Conversion(weight=lambda _: weight, strict=False))
        assert off(delta(file.modules[TO_K]), want) < 1e-5


LYCORIS: dict[str, dict[str, Any]] = {
    "locon": {},
    "loha": {},
    "lokr": {"factor": 4},
    "lokr both": {"decompose_both": True, "factor": 4},
    "lokr full": {"full_matrix": True, "factor": 4},
}


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("algo", LYCORIS)
def test_lycoris_own_forward_is_the_oracle(algo: str, conv: bool, core: bool, dora: bool, tmp_path: Path) -> None:
    """Its forward: `get_merged_weight` of LoHa and LoKr has alpha / r twice in lycoris-lora 4.1.3."""
    kind = {"locon": "LoConModule", "loha": "LohaModule"}.get(algo, "LokrModule")
    torch.manual_seed(0)
    layer = nn.Conv2d(K, D, 3, padding=1) if conv else nn.Linear(K, D)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()  # type: ignore[union-attr]
    settings = {"lora_dim": 2, "alpha": 1.5, "use_tucker": core, "weight_decompose": dora, **LYCORIS[algo]}
    module = getattr(lycoris_modules, kind)("m", layer, 1.0, **settings).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        module.apply_to()
        x = rnd(5, K, 4, 4) if conv else rnd(50, K)
        want = layer(x).double()
    parts = {key: value.data for key, value in module.state_dict().items()}
    path = save(tmp_path / "a.safetensors", {f"{CONV if conv else LINEAR}.{k}": v for k, v in parts.items()})
    file = read(path, conversion=Conversion(weight=lambda _: weight, strict=False))
    (one,) = file.modules.values()
    changed = weight + delta(one).reshape(weight.shape)
    got = nn.functional.conv2d(x, changed, bias, padding=1) if conv else nn.functional.linear(x, changed, bias)
    assert off(got, want) < 1e-5


def test_a_kind_tells_its_base_by_its_sizes_and_doctor_how_to_make_it_plain(tmp_path: Path) -> None:
    """2048 columns show that a file is for SDXL. After conversion, the tool loads all of it."""
    path, out = tmp_path / "a.safetensors", tmp_path / "a-fixed.safetensors"
    lokr = {"lokr_w1": rnd(8, 8), "lokr_w2_a": rnd(80, 4), "lokr_w2_b": rnd(4, 256)}
    file_of(path, LINEAR, lokr, 4.0)
    assert report(path).catalogue.verdict == Verdict("sdxl", "shapes")
    found = diagnose(path, "comfyui")
    assert not found.known and found.warnings and found.mend == f"unbraid convert {path} {out} --to kohya"
    convert(path, out, "kohya")
    assert diagnose(out, "comfyui").healthy
    file_of(path, LINEAR, {"lokr_w1": rnd(8, 8)}, 4.0)
    assert not diagnose(path, "comfyui").mend


def test_a_layer_that_kohyas_files_have_not_keeps_no_bias_in_them(tmp_path: Path) -> None:
    """For example Flux's q alone: kohya's files have q, k and v in one layer."""
    module = "transformer.single_transformer_blocks.0.attn.to_q"
    parts = {"lora_A.weight": rnd(2, 3072), "lora_B.weight": rnd(3072, 2), "diff_b": rnd(3072)}
    path = file_of(tmp_path / "a.safetensors", module, parts)
    for to in ("kohya", "diffusers"):
        with pytest.raises(UsageError, match="no place in"):
            convert(path, tmp_path / "b.safetensors", to)
