"""CLIP's tokenizer without a download: from the byte-pair vocabulary inside the open_clip_torch package, else from the hub's cache."""

import gzip
from importlib.util import find_spec
from pathlib import Path

from transformers import CLIPTokenizer

from unbraid.errors import UsageError

FILE = "bpe_simple_vocab_16e6.txt.gz"
HUB = "openai/clip-vit-large-patch14"
TOKENS = 77  # longest prompt
SIZE = 49_408  # 256 bytes, the same at a word's end, 48,894 merges, start and end
MERGES = SIZE - 2 * 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """`pad`: what fills a prompt up: OpenAI's CLIP has its end token there, the OpenCLIP models `!`, which is token 0."""
    vocabulary = _vocabulary()
    if vocabulary is None:
        return _from_hub(pad)
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    merges = [(first, last) for first, last in (line.split() for line in lines[1 : MERGES + 1])]
    letters = list(_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    ids = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad, model_max_length=TOKENS)  # type: ignore[arg-type]


def _vocabulary() -> Path | None:
    """Where the package keeps it. The package itself is not imported: that takes seconds."""
    found = find_spec("open_clip")
    places = [Path(place) / FILE for place in (found.submodule_search_locations or ()) if found] if found else []
    return next((place for place in places if place.is_file()), None)


def _from_hub(pad: str) -> CLIPTokenizer:
    """From the hub's cache alone: a request without a network takes minutes to fail."""
    try:
        return CLIPTokenizer.from_pretrained(HUB, pad_token=pad, model_max_length=TOKENS, local_files_only=True)
    except OSError as error:
        fix = f"pip install unbraid[offline] (open_clip_torch), which brings its vocabulary; or: hf download {HUB}"
        raise UsageError("CLIP's tokenizer is neither installed nor in the hub's cache", HUB, fix) from error


def _letters() -> list[str]:
    """The 256 bytes as printable characters, in GPT-2's order: those that are printable as they are, then the rest."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + i) for i in range(len(rest)))]
