"""Block weights: names, patterns and LBW vectors."""

import pytest

from unbraid.common.errors import UsageError
from unbraid.files.formats.block_weights import VECTORS, block_weights

MODULES = (
    "unet.down_blocks.1.attentions.0.proj_in",
    "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
)


def test_block_weights_by_name_pattern_and_vector() -> None:
    assert list(block_weights(MODULES, ["OUT01=0.3", "IN=0"], "sdxl").values()) == [0, 0.3, 1]
    assert list(block_weights(MODULES, [r"attn2\.to_[kv]=2", "text_encoder=-1"], "sdxl").values()) == [1, 2, -1]
    vector = ",".join(str(i) for i in range(12))
    assert list(block_weights(MODULES, [vector], "sdxl").values()) == [1, 7, 0]
    assert {family: set(sizes) for family, sizes in VECTORS.items()} == {"sdxl": {12, 20}, "sd15": {17, 26}}
    assert all(len(names) == n for sizes in VECTORS.values() for n, names in sizes.items())
    for wrong in ("OUT07=1", "OUT01", "OUT01=x", "1,2,3", "(=1", "OUT01=nan"):
        with pytest.raises(UsageError):
            block_weights(MODULES, [wrong], "sdxl")
