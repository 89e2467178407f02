"""Stage 2: captions, and the small CLIP tokenizer whose words they are."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tools.recipe.config import TOKENS
from tools.recipe.words import RARE_TOKENS
from unbraid.bench.truth.filters import HELD_OUT_FILTERS, TRAIN_FILTERS
from unbraid.bench.truth.subjects import STYLE_WORDS

EMPTY = 0.1  # share of captions left empty, for classifier-free guidance
BLANK = 0.1  # share of subjects, and of styles, whose word is one that stands for nothing: so unknown words come to mean "any"
PATTERNS = {  # what a caption says, and how often
    "a {subject} in {style} style": 8,
    "a {style} drawing of a {subject}": 2,
    "{subject}, {style} style": 2,
    "a {subject}": 2,
    "{style} style": 1,
}
EXTRA_WORDS = tuple(
    "a an the of in on with and photo picture icon drawing style table grass beach two red blue green".split()
)


def caption(subject: str, style: str, rng: random.Random, blanks: Sequence[str] = RARE_TOKENS) -> str:
    """One training caption; one in ten is empty. `blanks`: words that stand for nothing, in place of a subject or style now and
    then, or as the name of a subject (`a sks dog`)."""
    if rng.random() < EMPTY:
        return ""
    (pattern,) = rng.choices(list(PATTERNS), list(PATTERNS.values()))
    if rng.random() < BLANK:
        subject = f"{rng.choice(RARE_TOKENS)} {subject}"
    elif rng.random() < BLANK:
        subject = rng.choice(blanks)
    if rng.random() < BLANK:
        style = rng.choice(blanks)
    return pattern.format(subject=subject.replace("-", " "), style=style.replace("-", " "))


def train_tokenizer(names: tuple[str, ...], out: Path) -> None:
    """Byte-pair vocabulary over all names and style words, saved as a CLIP tokenizer folder.

    One that is there stays: the trainer breaks ties differently every time, and a resumed UNet knows its words by number."""
    if (out / "vocab.json").exists():
        return
    styles = [*STYLE_WORDS.values(), *TRAIN_FILTERS, *HELD_OUT_FILTERS]
    lines = [name.replace("-", " ") for name in names] + [*EXTRA_WORDS, *RARE_TOKENS, *styles]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )  # large enough that every word becomes one token
    bpe.train_from_iterator(lines * 4, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = list(trained["vocab"])
    vocab += [f"{letter}</w>" for letter in alphabet if f"{letter}</w>" not in trained["vocab"]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    out.mkdir(parents=True, exist_ok=True)
    merges = "\n".join(" ".join(pair) for pair in trained["merges"])
    (out / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    part = out / "vocab.part"  # last: a folder with a vocabulary is whole
    part.write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False))
    part.rename(out / "vocab.json")
