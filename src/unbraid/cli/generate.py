"""`unbraid generate`: pictures of a prompt with LoRAs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unbraid.cli.lora_options import parsed_uses, scaled, with_opponents
from unbraid.cli.options import BaseName, Device, Graphs, Parts, Prediction, Seed, Swap, Vae, Vram
from unbraid.cli.run import console, loading
from unbraid.common.errors import UsageError

app = typer.Typer()

Prompt = Annotated[str, typer.Option(help="What to draw.")]
Output = Annotated[Path, typer.Option(help="A .png for one picture, else a folder.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:SCALE][@FROM-TO]",
        help="A LoRA at a strength; repeatable. @0.2-1: not in the first fifth of the steps.",
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:WEIGHT]",
        help="What the LoRA of the same position is drawn against, such as the style LoRA of the subject's picture.",
    ),
]
LoraPrompts = Annotated[
    list[str] | None,
    typer.Option(
        help="What the LoRA of the same position reads in cross-attention. `own` is what it was trained with, `style` the name of its style "
        "alone: for a style LoRA with another subject than its own. With --against both sides read what they were trained with."
    ),
]
LoraRoles = Annotated[
    list[str] | None,
    typer.Option(
        help="content, style or all: the LoRA of the same position leaves out the layers of the other role (docs/blocks.md). "
        "For one that is used alone, or beside one of another picture."
    ),
]
RoleBlocks = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="Which layers have which role; without, what is known for the base.")
]
StyleLoras = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:SCALE]",
        help="A style LoRA that guides, and leaves the composition to the base; 1 is as trained. Repeatable.",
    ),
]
StyleNames = Annotated[
    list[str] | None,
    typer.Option(help="The style's words, if its file does not say: `ink` adds `in ink style` to the prompt."),
]
StyleFrom = Annotated[
    float, typer.Option(help="Styles guide once this much noise is left: 1 always, 0.8 keeps more of the layout.")
]
Edit = Annotated[
    Path | None,
    typer.Option(help="A picture that the prompt describes: styles are applied to it. Take 50 steps or more."),
]
StartPicture = Annotated[Path | None, typer.Option("--from", help="A picture to begin with, in place of noise.")]
Strength = Annotated[float, typer.Option(help="How much noise to put on it: 1 leaves nothing of it.")]
Mask = Annotated[Path | None, typer.Option(help="What of it is drawn anew: white. The rest is kept.")]
ControlNet = Annotated[str, typer.Option(metavar="NAME[:SCALE]", help="A ControlNet: a diffusers folder, or a hub id.")]
ControlImage = Annotated[Path | None, typer.Option(help="The map that it reads, ready-made: edges, depth, a pose.")]
HowCombined = Annotated[
    Literal["sum", "switch", "composite", "k-lora", "k-lora-released", "est-lora"],
    typer.Option(help="Several LoRAs: all at once; in turn; each guides, averaged; layer by layer, content first."),
]
Sweep = Annotated[
    str, typer.Option(metavar="WHAT=FROM:TO:N", help="One sheet over strengths: style=0:1.5:7, lora=…, guidance=…")
]
Count = Annotated[int, typer.Option("--n", min=1, help="How many pictures, at seeds SEED, SEED+1, …")]
Steps = Annotated[int, typer.Option(min=1, max=1000)]
Sampler = Annotated[str, typer.Option(help="ddim, euler, euler-a, dpm++ or unipc; without, the base's own.")]

Embedded = Annotated[
    float, typer.Option(help="The guidance scale that Flux.1-dev takes as an input; --guidance is classifier-free.")
]


@app.command()
def generate(
    prompt: Prompt,
    out: Output,
    lora: Loras = None,
    lora_prompt: LoraPrompts = None,
    lora_role: LoraRoles = None,
    blocks: RoleBlocks = "",
    against: Against = None,
    style_guidance: StyleLoras = None,
    style_prompt: StyleNames = None,
    style_from: StyleFrom = 1.0,
    edit: Edit = None,
    from_: StartPicture = None,
    strength: Strength = 0.6,
    mask: Mask = None,
    controlnet: ControlNet = "",
    control_image: ControlImage = None,
    combine: HowCombined = "sum",
    sweep: Sweep = "",
    negative: str = "",
    n: Count = 1,
    seed: Seed = 0,
    steps: Steps = 25,
    sampler: Sampler = "",
    guidance: float = 4.0,
    embedded_guidance: Embedded = 1.0,
    height: int | None = None,
    width: int | None = None,
    base: BaseName = "",
    vae: Vae = "",
    parts: Parts = "",
    prediction: Prediction = "",
    vram: Vram = "max",
    swap: Swap = 0,
    graphs: Graphs = True,
    device: Device = "",
) -> None:
    """Prompts and LoRAs → pictures.

    Strengths may be negative. Without --base: that for which the LoRAs were made, if it is there. A PNG holds prompt, seed and LoRAs."""
    with loading("torch and diffusers"):
        from unbraid.bases.presets import Loading
        from unbraid.runs.preferences import base_for
        from unbraid.runs.roles import checked_roles, in_roles
        from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance
    uses = with_opponents(parsed_uses(lora or [], lora_prompt or []), against or [])
    styles = StyleGuidance(parsed_uses(style_guidance or [], style_prompt or [], "--style-guidance"), style_from)
    inputs = ImageInputs(_start(from_, strength, mask), _control(controlnet, control_image), edit)
    sampling = Sampling(guidance, steps, sampler, range(seed, seed + n), height, width, negative, embedded_guidance)
    settings: dict[str, Any] = {"combine": combine, "styles": styles, "sampling": sampling, "inputs": inputs}
    roles = checked_roles(lora_role or [], len(uses), blocks)
    over = _checked_sweep(sweep, n, out, edit)
    name = base or base_for(use.file for use in (*uses, *styles.uses))
    with console.status("drawing"):
        how = Loading(vae, prediction, parts, vram, graphs=graphs, device=device, swap=swap)
        model = _opened(name, how, prompt, negative)
        uses = in_roles(uses, roles, model, blocks)
        _note_unknown_words(name, (prompt, negative), (*uses, *styles.uses))
        for file in _drawn(model, prompt, uses, out, settings, over):
            print(file)


def _checked_sweep(sweep: str, n: int, out: Path, edit: Path | None) -> Any:
    """The parsed --sweep, if there is one. UsageError if so many pictures do not fit the output."""
    from unbraid.sampling.sweep import parse_sweep

    if not sweep and n > 1 and out.suffix:
        raise UsageError(f"{n} pictures do not fit into one file", out, "Give a folder.")
    if edit and n > 1:
        raise UsageError(f"{n} pictures of one edit would be the same", edit, "Leave out --n.")
    return parse_sweep(sweep) if sweep else None


def _drawn(model: Any, prompt: str, uses: list[Any], out: Path, settings: dict[str, Any], over: Any) -> Iterator[Path]:
    """Draw and save the pictures one by one, so that those which are drawn are not lost. Yields their files."""
    from unbraid.images.sheets import save_image
    from unbraid.runs.recorded import picture_texts
    from unbraid.sampling.render import render
    from unbraid.sampling.sweep import sheet_of, swept

    sampling, styles = settings["sampling"], settings["styles"].uses

    def saved(picture: Any, file: Path, seed: int) -> Path:
        return save_image(picture, file, picture_texts(model.name, prompt, seed, sampling, uses, styles))

    if not over:
        for seed in sampling.seeds:
            (picture,) = render(model, prompt, uses, **{**settings, "sampling": replace(sampling, seeds=(seed,))})
            yield saved(picture, out if out.suffix else out / f"{seed:04d}.png", seed)
        return
    columns = []
    for value, pictures in swept(model, prompt, over, uses, **settings):
        columns.append(pictures)
        for seed, picture in zip(sampling.seeds, pictures, strict=True):
            if not out.suffix:
                yield save_image(picture, out / f"{over.what}_{value:g}_{seed:04d}.png")
    yield save_image(sheet_of(prompt, over, sampling.seeds, columns), out if out.suffix else out / "sweep.png")


def _opened(name: str, loading: Any, *prompts: str) -> Any:
    """Load the base, and print a note if a prompt is long, about how it is encoded."""
    from unbraid.bases.base import load

    base = load(name, loading=loading)
    for remark in base.family.network.remarks(base.pipe, prompts):
        console.print(f"  {remark}", markup=False, highlight=False, soft_wrap=True)
    return base


def _note_unknown_words(base: str, prompts: tuple[str, ...], uses: tuple[Any, ...]) -> None:
    """Print a note for each word that a small base does not know, unless a LoRA may have taught it."""
    from unbraid.bases.words import remarks
    from unbraid.files.formats.header import read_header
    from unbraid.sampling.uses import trained_words

    taught = [trained_words(read_header(use.file).metadata) for use in uses]
    if all(taught):  # of a LoRA without a recorded prompt, nobody knows which words it was trained with
        for remark in remarks(base, prompts, taught):
            console.print(f"  {remark}", markup=False, highlight=False, soft_wrap=True)


def _start(image: Path | None, strength: float, mask: Path | None) -> Any:
    from unbraid.sampling.canvas import Start

    if mask and not image:
        raise UsageError("a mask of nothing", mask, "Give the picture: --from IMAGE.")
    return Start(image, strength, mask) if image else None


def _control(model: str, image: Path | None) -> Any:
    from unbraid.sampling.canvas import Control

    if bool(model) != bool(image):
        fix = "Give both --controlnet NAME and --control-image IMAGE."
        raise UsageError("a ControlNet and its map go together", model or image or "", fix)
    name, scale = scaled(model)
    return Control(name, image, scale) if image else None
