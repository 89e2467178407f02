"""PEFT's settings: every module gets the strength that peft itself gives it."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from spelling import lora, save
from torch import nn

from unbraid.common.errors import UsageError
from unbraid.core.lowrank import delta
from unbraid.files.formats.patterns import first_match
from unbraid.files.lora_file import read

PATHS = [
    f"{side}.{i}.attentions.{j}.transformer_blocks.0.attn{n}.to_{x}"
    for side in ("down_blocks", "up_blocks")
    for i in (0, 1)
    for j in (0, 1)
    for n in (1, 2)
    for x in "qkv"
]
PIECES = [
    "to_q",
    "to_k",
    "attn1",
    "attn2",
    "down_blocks",
    "0",
    "1",
    ".",
    r"\.",
    ".*",
    "(k|v)",
    "to_",
    "[qk]",
    "^",
    "\\w+",
]
KEYS = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    st.sampled_from(PATHS).flatmap(lambda path: st.integers(0, len(path) - 1).map(lambda i: path[i:])),
    st.sampled_from(
        [r".*attn2\.to_(k|v)", r"attn1\.to_k", r"^down_blocks\..*\.to_q", "to_k", "attn2.to_k", "attn2_to_k"]
    ),
)


@given(st.lists(KEYS, min_size=1, max_size=5, unique=True), st.sampled_from(PATHS))
@settings(max_examples=400, deadline=None)
def test_the_first_match_is_pefts(keys: list[str], path: str) -> None:
    want = get_pattern_key(keys, path)
    try:
        found = first_match(tuple(keys), path)
    except UsageError as error:
        assert "too involved" in str(error)
        return
    assert found == (want if want in keys else None)


class Net(nn.Module):
    """A few linear layers with the names of UNet modules."""

    def __init__(self) -> None:
        super().__init__()
        for path in PATHS[:24]:
            at: nn.Module = self
            *stems, leaf = path.split(".")
            for stem in stems:
                if stem not in dict(at.named_children()):
                    at.add_module(stem, nn.Module())
                at = dict(at.named_children())[stem]
            at.add_module(leaf, nn.Linear(6, 6))


PATTERNS = st.dictionaries(
    st.sampled_from(
        [
            r".*attn2\.to_(k|v)",
            r"attn1\.to_k",
            r"^down_blocks\..*\.to_q",
            "to_k",
            "attn2.to_k",
            "to_v",
            PATHS[3],
            "1.to_q",
        ]
    ),
    st.integers(1, 9),
    max_size=4,
)


@given(PATTERNS, PATTERNS, st.booleans())
@settings(max_examples=15, deadline=None)
def test_every_module_at_pefts_own_scale(
    tmp_path_factory: pytest.TempPathFactory, ranks: dict[str, int], alphas: dict[str, int], rslora: bool
) -> None:
    names = ["to_q", "to_k", "to_v"]
    config = LoraConfig(
        r=4, lora_alpha=6, rank_pattern=ranks, alpha_pattern=alphas, target_modules=names, init_lora_weights=False
    )
    config.use_rslora = rslora
    folder = tmp_path_factory.mktemp("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(), config)
        model.save_pretrained(str(folder))
        try:
            model = PeftModel.from_pretrained(
                Net(), str(folder)
            )  # loaded, not as it was made: saving sorts the patterns
        except RuntimeError as error:  # this changes ranks whose patterns overlap, so PEFT cannot load its own file
            assert "size mismatch" in str(error)
            reject()
    file = read(folder / "adapter_model.safetensors")
    layers = {name: one for name, one in model.named_modules() if hasattr(one, "scaling") and hasattr(one, "lora_A")}
    assert len(file.modules) == len(layers)
    for name, one in layers.items():
        want = one.get_delta_weight("default")  # type: ignore[operator]
        found = delta(file.modules[f"unet.{name.removeprefix('base_model.model.')}"])
        assert torch.allclose(found, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"unet.r": 3, "unet.lora_alpha": 10**400},
        {"unet.lora_alpha": float("nan")},
        {"unet.lora_alpha": True},
        {"unet.lora_alpha": "8"},
        {"unet.lora_alpha": [8]},
        {"unet.alpha_pattern": {"to_q": True}},
        {"unet.alpha_pattern": {"(a+)+$": 1}},
        {"unet.alpha_pattern": {".*.*.*.*.*x": 1}},
        {"unet.alpha_pattern": {"(": 1}},
        {"unet.alpha_pattern": {"a" * 600 + "*": 1}},
    ],
)
def test_settings_that_do_harm(settings: dict[str, object], tmp_path: Path) -> None:
    one, name = lora(0), "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    keys = {f"{name}.lora_A.weight": one.down, f"{name}.lora_B.weight": one.up}
    with pytest.raises(UsageError):
        read(save(tmp_path / "a.safetensors", keys, {"lora_adapter_metadata": json.dumps(settings)}))
