"""CLIP's tokenizer without a download. Its byte-pair merges are in the package (from openai/CLIP, MIT licence; the first
48,894)."""

import gzip
from importlib.resources import files

from transformers import CLIPTokenizer

FILE = "clip_merges.txt.gz"
TOKENS = 77  # longest prompt
SIZE = 49_408  # 256 bytes, the same at the end of a word, 48,894 merges, start and end
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """The tokenizer. `pad`: the token that pads prompts; the end token for OpenAI's CLIP, `!` (token 0) for OpenCLIP."""
    lines = gzip.decompress(files("unbraid.bases").joinpath(FILE).read_bytes()).decode("utf-8").splitlines()
    merges = [(first, last) for first, last in (line.split() for line in lines)]
    letters = list(_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    ids = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad, model_max_length=TOKENS)  # type: ignore[arg-type]


def _letters() -> list[str]:
    """The 256 bytes as printable characters, in GPT-2's order: those that are printable as they are, then the rest."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + i) for i in range(len(rest)))]
