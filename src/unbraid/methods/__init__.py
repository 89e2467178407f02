"""The methods. A new one is a file here, a line in METHODS, a test and a row in the docs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from unbraid.methods.dreambooth import dreambooth
from unbraid.methods.unziplora import unziplora
from unbraid.train import Recipe

Method = Callable[..., tuple[Recipe, ...]]


@dataclass(frozen=True)
class Entry:
    """A method as the command line sees it. Its settings are the keyword-only arguments of `make`."""

    verb: str
    make: Method
    prompts: Mapping[str, str]  # role → template over {subject}, {style}, {rare}
    outputs: Mapping[str, tuple[str, str]]  # file stem → (adapter, the role whose prompt it was trained with)
    paper: str


SPLIT_PROMPTS = {
    "both": "a {rare} {subject} in {style} style",
    "content": "a {rare} {subject}",
    "style": "a {subject} in {style} style",
}

METHODS: dict[str, Entry] = {
    "unziplora": Entry(
        "split", unziplora, SPLIT_PROMPTS, {"content": ("content", "content"), "style": ("style", "style")}, "2412.04465"
    ),
    "dreambooth": Entry("learn", dreambooth, {"both": "{prompt}"}, {"lora": ("lora", "both")}, "2208.12242"),
}
