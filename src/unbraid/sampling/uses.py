"""The LoRA files of a drawing: how strong each is, what text it reads, and in which steps it acts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.core.selectors import selects
from unbraid.files.lora_file import LoraFile, read

Loras = Mapping[str, tuple[Path, Mapping[str, Lora]]]  # name → the file (for error messages), and its modules
# Values of Use.prompt that stand for what is recorded in the file: the prompt that it was trained with; the name of its style, without
# the subject that it was trained on
OWN, STYLE_NAME = "own", "style"
ALL_STEPS = (0.0, 1.0)
PROMPTS, STYLE = ("unbraid.prompt", "modelspec.trigger_phrase"), "unbraid.style"  # keys in files


@dataclass(frozen=True)
class Use:
    """One LoRA file and its strength.

    `prompt`: the text that this LoRA gets in the keys and values of cross-attention, in place of the main prompt
    (UnZipLoRA's joint inference); in joint attention, in a segment of its own. `own` stands for the prompt that is recorded in the file,
    `style` for "S style" with the style S that is recorded there: a style LoRA then does not read the subject of its own picture.
    `steps`: the part of the sampling steps in which it acts: 0 is the first step, 1 the end (CRAFT, arXiv 2602.18936).
    `against`: another LoRA file, such as that of another picture's style. The drawing moves away from what that one draws
    and towards what this one draws, each under its own prompt, by `contrast` (see `unbraid.sampling.combine.difference`).
    `without`: selectors of layers (`unbraid.core.selectors`) in which it does not act, such as those of the other role
    (`unbraid.runs.roles.in_role`)."""

    file: Path
    scale: float = 1.0
    prompt: str | None = None
    steps: tuple[float, float] = ALL_STEPS
    against: Path | None = None
    contrast: float = 1.0
    without: tuple[str, ...] = ()

    def kept(self, modules: Mapping[str, Lora], path: Path) -> Mapping[str, Lora]:
        """The modules, of the file `path`, in whose layers it acts. UsageError if there is none."""
        found = {name: lora for name, lora in modules.items() if not selects(self.without, name)}
        if modules and not found:
            raise UsageError(f"has no layers besides {', '.join(self.without)}", path, "Let it act in all its layers.")
        return found


@dataclass(frozen=True)
class Cast:
    """The LoRAs and styles of a drawing, role → its use and its opened file; what each LoRA is drawn against, if anything,
    by the LoRA's role; and all prompts, role → text."""

    loras: Mapping[str, tuple[Use, LoraFile]]
    styles: Mapping[str, tuple[Use, LoraFile]]
    against: Mapping[str, tuple[Path, LoraFile]]
    texts: Mapping[str, str]

    def attached(self) -> Loras:
        """All LoRAs but the styles: by role, and the file that a LoRA is drawn against as `against_ROLE`."""
        others = {
            away(role): (path, self.loras[role][0].kept(file.modules, path))
            for role, (path, file) in self.against.items()
        }
        return {role: (use.file, use.kept(file.modules, use.file)) for role, (use, file) in self.loras.items()} | others


def toward(role: str) -> str:
    """The role of the prompt that a LoRA was trained with, where it is drawn against another one."""
    return f"toward_{role}"


def away(role: str) -> str:
    """The role of the LoRA that the LoRA `role` is drawn against, and of the prompt that it was trained with."""
    return f"against_{role}"


def open_uses(prompt: str, uses: Sequence[Use], styles: Sequence[Use]) -> Cast:
    """Read the files, and collect all prompts. UsageError for files that cannot be used so."""
    opened = {f"lora{i}": (use, read(use.file)) for i, use in enumerate(uses)}
    guides = {f"style{i}": (use, read(use.file)) for i, use in enumerate(styles)}
    others = {role: (use.against, read(use.against)) for role, (use, _) in opened.items() if use.against}
    texts = {"main": prompt}
    for role, (use, file) in opened.items():
        if use.prompt is not None:
            texts[role] = RECORDED[use.prompt](use.file, file) if use.prompt in RECORDED else use.prompt
        if role in others:
            texts |= {toward(role): own_prompt(use.file, file), away(role): own_prompt(*others[role])}
    for role, (use, file) in guides.items():
        texts[role] = f"{prompt} in {use.prompt or style_words(use.file, file)} style"
    return Cast(opened, guides, others, texts)


def check_uses(uses: Sequence[Use], styles: Sequence[Use], combine: str, count: int) -> None:
    """UsageError for steps that are none of `count`, and for uses that do not fit the way of combining them."""
    for use in uses:
        begin, end = use.steps
        if not 0 <= begin < end <= 1:
            fix = "Give two numbers from 0 (the first step) to 1 (the end), such as 0.2-1."
            raise UsageError(f"steps from {begin:g} to {end:g}", use.file, fix)
        if round(begin * count) == round(end * count):
            what = f"from {begin:g} to {end:g} there is none of {count} steps"
            raise UsageError(what, use.file, "Give it a longer part, or draw in more steps.")
    for use in styles:
        if use.steps != ALL_STEPS or use.against or use.without:
            fix = "--style-from says when styles begin to guide; leave out the rest."
            raise UsageError("a guiding style has no steps, no layers and no contrast of its own", use.file, fix)
    special = next((use for use in uses if use.steps != ALL_STEPS or use.against), None)
    if special and combine != "sum":
        what = f"steps and contrasts of single LoRAs do not go with {combine}"
        raise UsageError(what, special.file, "Leave --combine at sum.")


def own_prompt(path: Path, file: LoraFile) -> str:
    """The prompt that a LoRA was trained with, from its metadata. UsageError if none is recorded."""
    for key in PROMPTS:
        if file.metadata.get(key):
            return file.metadata[key]
    raise UsageError(
        "records no prompt of its own",
        path,
        "Give it: --lora-prompt WORDS; for zip --content-prompt or --style-prompt.",
    )


def trained_words(metadata: Mapping[str, str]) -> str:
    """All recorded words that a LoRA was trained with; empty if none are."""
    return " ".join(metadata[key] for key in (*PROMPTS, STYLE) if metadata.get(key))


def style_words(path: Path, file: LoraFile) -> str:
    """The name of a style LoRA's style, from its metadata. UsageError if none is recorded."""
    if file.metadata.get(STYLE):
        return file.metadata[STYLE]
    raise UsageError("does not say what its style is called", path, "Say it: --style-prompt WORDS.")


def style_alone(path: Path, file: LoraFile) -> str:
    """The prompt that names a LoRA's style and no subject. UsageError if its file names no style, or if it is the content LoRA of a
    split, whose own prompt does not name the style that its picture had."""
    name, own = file.metadata.get(STYLE), file.metadata.get(PROMPTS[0])
    if not name:
        raise UsageError("does not say what its style is called", path, 'Say it: --lora-prompt "ink style".')
    if own and name not in own:
        raise UsageError(
            f"was trained under {own!r}, which names no style", path, "Let it read that: --lora-prompt own."
        )
    return f"{name} style"


RECORDED = {OWN: own_prompt, STYLE_NAME: style_alone}
