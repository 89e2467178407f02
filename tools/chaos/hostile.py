"""Hostile settings, made from the types of the methods' settings, and hostile files, made by changing good ones."""

import json
import random
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from tools.chaos.child import command, one_line, start, wait
from unbraid.methods import METHODS
from unbraid.runs import shortest
from unbraid.runs.settings import open_settings

NUMBERS = ("nan", "inf", "-inf", "1e308", "-1e-3", "-0.0", "1e-300", "0x10", "1_000", "٣", "1e999")
WHOLE = ("0", "-1", "-9223372036854775809", "99999999999999999999", "10000001", "2147483648", "1.5", "9" * 5000)
WRONG = (
    "true",
    "false",
    '""',
    '"x"',
    "[]",
    "[1]",
    "{}",
    "{a = 1}",
    "2026-11-27",
    "[" * 5000,
    "\udc80",
    "\x1b[31mred",
    "a" * 3000,
)
OPTIONS = (  # options of all training verbs that have a range
    "--seed=-1", "--seed=99999999999999999999", "--previews=-1", "--previews=1e9", "--base=", "--base=/dev/null", "--base=a/b/c",
    "--vram=0", "--vram=", "--device=cuda:99", "--device=\x1b[31m", "--vae=nowhere", "--prediction=w", "--out=/proc/x",
    "--out=" + "n" * 300, "--config=/dev/null/x", "--set", "--set=", "--set==1", "--set=rank",
)  # fmt: skip


def setting(rng: random.Random, method: str) -> tuple[str, str]:
    """A setting of a method, and a value that does not suit its type or range, or hardly."""
    known = open_settings(METHODS[method])
    name = rng.choice([*known, "rnak", "", "a.b", "__class__"])
    kind: Any = known[name].annotation if name in known else str
    values = NUMBERS + WHOLE if kind in (int, float) else ("3", "maybe", "-1")
    return name, rng.choice(
        values + WRONG if get_origin(kind) is not Literal else ("other", *get_args(kind)[:0], *WRONG)
    )


def words_of(method: str, given: shortest.Material, base: Path, out: Path) -> list[str]:
    """The command line of a short run of a method."""
    pictures, loras, modules = [str(given.before), str(given.after)], given.loras, given.modules
    own = {
        "split": [pictures[0], "--subject=cat", "--style=ink"],
        "pair": [*pictures, "--subject=cat", "--style=ink"],
        "learn": [pictures[0], "--prompt=a sks cat"],
        "zip": [str(one) for one in loras.values()],
        "break": [f"--content={pictures[0]}", "--prompt=a sks cat", f"--partners={given.partners['content']}"],
        "make": [*(str(one) for one in modules.values()), "--fine-tune=1"],
    }
    verb = METHODS[method].verb
    common = [f"--method={method}", f"--base={base}", "--previews=0", "--quiet", f"--out={out}"]
    short = [] if method in ("make", "np-lora") else ["--set=steps=1"]
    return [verb, *own[verb], *common, *short]


class Hostile:
    """Cases with one hostile setting, option, configuration or file each."""

    def __init__(self, base: Path, given: shortest.Material, work: Path) -> None:
        self.base, self.given, self.work = base, given, work
        self.refused = 0
        work.mkdir(parents=True, exist_ok=True)

    def _outcome(self, words: list[str], number: int) -> str:
        """What is wrong with how a command ended; nothing if it is one line, or if the input was acceptable after all."""
        log = self.work / f"{number}.log"
        ended = wait(start(command(words), log), log)
        self.refused += ended.code in (1, 2)
        if ended.timed_out and "Traceback" not in ended.text and any("steps=" in word for word in words[-2:]):
            return ""  # a large number of steps that is allowed
        return one_line(ended)

    def settings(self, rng: random.Random, number: int) -> tuple[str, str]:
        """A setting on the command line or in a configuration, or an option."""
        method = rng.choice(list(METHODS))
        words = words_of(method, self.given, self.base, self.work / f"out-{number}")
        name, value = setting(rng, method)
        how = rng.choice(("set", "set", "config", "table", "option"))
        if how == "option":
            words.append(rng.choice(OPTIONS))
        elif how == "set":
            words.append(f"--set={name}={value}")
        else:
            file = self.work / f"{number}.toml"
            file.write_bytes(
                (f"[{method}]\n" * (how == "table") + f"{name} = {value}\n").encode("utf-8", "surrogateescape")
            )
            words.append(f"--config={file}")
        return f"{method}, {words[-1][:60]!r}", self._outcome(words, number)

    def files(self, rng: random.Random, number: int) -> tuple[str, str]:
        """A LoRA, a picture, a caption, a record or a batch file that was damaged."""
        kind = rng.choice(("doctor", "inspect", "convert", "resize", "merge", "learn", "caption", "batch"))
        lora, picture = rng.choice(list(self.given.loras.values())), self.given.before
        record = lora.parent / "run.toml"
        source = {"learn": picture, "caption": picture, "batch": record}.get(kind, lora)
        file = self.work / f"{number}{source.suffix}"
        data = source.read_bytes()
        if kind == "caption":
            file.write_bytes(data)
            file.with_suffix(".txt").write_bytes(damaged(rng, "a sks cat, \U0001f98a\n".encode()))
        else:
            file.write_bytes(_header(rng, data) if source == lora and rng.random() < 0.7 else damaged(rng, data))
        out = str(self.work / f"out-{number}.safetensors")
        words = {
            "doctor": ["doctor", str(file)],
            "inspect": ["inspect", str(file)],
            "convert": ["convert", str(file), out],
            "resize": ["resize", str(file), out, "--rank=1"],
            "merge": ["merge", str(file), str(lora), f"--out={out}"],
            "batch": ["batch", str(file), "--quiet"],
        }.get(kind)
        if not words:
            words = ["learn", str(file), "--prompt=a cat", f"--base={self.base}", "--previews=0", "--quiet"]
            words += ["--set=steps=1", "--set=rank=1", f"--out={self.work / f'out-{number}'}"]
        return f"{kind} of {file.name}", self._outcome(words, number)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut off, repeated, removed or put in."""
    changed, at = bytearray(data), rng.randrange(len(data))
    end = min(len(data), at + rng.choice((1, 4, 50, 1000)))
    how = rng.randrange(6)
    if how == 0:
        changed[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del changed[at:]
    elif how == 2:
        del changed[at:end]
    elif how == 3:
        changed[at:at] = changed[at:end] * rng.choice((1, 100))
    elif how == 4:
        changed[at:end] = rng.randbytes(end - at)
    else:
        changed = bytearray()
    return bytes(changed)


def _header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with one value of its header changed."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = rng.choice(list(header))
    entry = header[key]
    if key == "__metadata__":
        name = rng.choice(list(entry))
        entry[name] = rng.choice((5, None, "\x1b[31m", "9" * 5000, "[" * 5000, "{}", "nan"))
    else:
        part = rng.choice(list(entry))
        entry[part] = rng.choice((0, -1, [], [0], [2**62, 2**62], "F8_E5M2", "I64", "X", [0, 2**63], [60000, 1], None))
    if rng.random() < 0.3:
        header[rng.choice((".oft_", "lora_", "\n", "a" * 300, ".alpha")) * rng.choice((1, 1000))] = header.pop(key)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
