"""The layers of a network that can be adapted, in groups with names that every method can use."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from unbraid.common.errors import UnsuitedError

ATTENTION, SELF_ATTENTION, TRANSFORMERS = "attention", "self-attention", "transformers"  # names in `Layers.targets`


@dataclass(frozen=True)
class Layers:
    """Which linear layers of a network can be adapted.

    `targets`: the name of a group of layers → a regular expression for their names. `own_prompt`: a regular expression for
    the layers in which an adapter can read a prompt of its own; without one, there are no such layers. `text`: a regular
    expression for the layers that read the tokens of the text, which are then the first of the sequence; without one, a text
    cannot be divided into segments."""

    targets: Mapping[str, str]
    own_prompt: str = ""
    text: str = ""

    def pattern(self, targets: str) -> str:
        """The regular expression of a group of layers. `targets`: its name, or a regular expression, which is returned.
        Raises UnsuitedError if the network has no such group."""
        if targets in (ATTENTION, SELF_ATTENTION, TRANSFORMERS) and targets not in self.targets:
            raise UnsuitedError(f"this base has no layers of the kind {targets!r}", "targets", "Choose another method.")
        return self.targets.get(targets, targets)

    def reads_own_prompt(self, name: str) -> bool:
        """Whether an adapter on this layer can read a prompt of its own."""
        return bool(self.own_prompt and re.search(self.own_prompt, name))

    def reads_text(self, name: str) -> bool:
        """Whether this layer reads the tokens of a text that may be divided into segments."""
        return bool(self.text and re.search(self.text, name))


UNET = Layers(
    {
        ATTENTION: r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$",  # 560 linear layers in SDXL, 128 in SD1.5
        SELF_ATTENTION: r"\.attn1\.(to_q|to_k|to_v|to_out\.0)$",
        TRANSFORMERS: r"\.attentions\.\d+\.",  # every linear layer of the attention groups: 722 in SDXL
    },
    own_prompt=r"\.attn2\.to_[kv]$",
)
