"""The recipe's command line: `python -m tools.recipe make --work DIR`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import CLIPTokenizer

from tools import judge_validation
from tools.recipe import art, captions, card, dit, dit_base, judge, latents, model, sheet, unet, vae, words
from tools.recipe.config import DIT, DIT_SCHEDULE, PRESETS, SIZES
from unbraid.bench.truth import art as bench_art
from unbraid.bench.truth import subjects
from unbraid.bench.truth.judge import load_judge

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Work = Annotated[Path, typer.Option(help="Folder for everything that is not committed; reuse it to resume.")]
Start = Annotated[Path | None, typer.Option(help="Diffusers folder to go on from; without it, random weights.")]
OldBase = Annotated[
    Path, typer.Option(help="Diffusers folder whose autoencoder, text encoders and tokenizer are taken.")
]
CPU_WORKERS = 2
ICONS = Path(__file__).parents[2] / "src/unbraid/bases/icons"


@app.command()
def make(
    work: Work,
    start: Start = None,
    workers: Annotated[int, typer.Option(help="Processes, on a CPU; each has one thread.")] = CPU_WORKERS,
) -> None:
    """Every stage in turn: art, tokenizer, autoencoder, latents, UNet with text encoders, decoder, diffusers folder.

    From random weights it is for one GPU, and takes minutes. With --start it goes on at small rates, and a CPU will do."""
    work.mkdir(parents=True, exist_ok=True)
    schedules = PRESETS["further" if start else "fresh"]
    art.fetch(work)
    pictures, names = art.rasterise(work, SIZES.pixels)
    tokenizer = _tokenizer(work, names, start)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = workers if device.type == "cpu" else 1
    chosen = words.trained(names)
    known = _tensor(_pick(pictures, names, chosen))
    flat = known.flatten(0, 1).contiguous()
    autoencoder = vae.train(flat, schedules.vae, work, workers, device, start)
    scale = vae.read(start).config.scaling_factor if start else None  # type: ignore[attr-defined]
    encoded, _ = latents.encode(autoencoder, known, work, scale)
    shares = torch.from_numpy(np.cumsum(words.shares(chosen)))
    tables = latents.Tables(encoded, latents.tokenise(chosen, tokenizer, work), shares)
    unet.train(tables, schedules.unet, work, tokenizer, workers, device, start)
    vae.harden(flat, schedules.decoder, work, workers, device)
    save(work)


@app.command()
def save(work: Work, out: Path = ICONS) -> None:
    """Write the diffusers folder from the latest checkpoints."""
    _, names = art.rasterise(work, SIZES.pixels)
    model.save(sheet.load(work), out)
    words.write(words.trained(names), out)
    print(f"saved {out}")


@app.command(name="sheet")
def sample_sheet(work: Work, out: Path = Path("sheet.png")) -> None:
    """Draw samples from the latest checkpoint, and print the subject gain."""
    _, names = art.rasterise(work, SIZES.pixels)
    sheet.draw(work, words.trained(names), out)


@app.command(name="card")
def model_card(
    work: Work,
    base: Annotated[
        Path, typer.Option(help="Diffusers folder to measure; its README.md and figures.json are written.")
    ] = ICONS,
    images: Annotated[int, typer.Option(help="How many images the base was trained on, for the card.")] = 0,
    drawn: Annotated[Path | None, typer.Option(help="Keep the pictures here.")] = None,
) -> None:
    """Measure a base with the judge, and write its card and its sheet."""
    torch.set_num_threads(1)
    pictures, names = art.rasterise(work, SIZES.pixels)
    chosen = words.trained(names)
    known = _pick(pictures, names, chosen)
    figures = card.measure(base, known, chosen, drawn)
    held = pictures[[names.index(name) for name in words.HELD_OUT]]
    sheet.grid(sheet.saved(base)).save(base / "sheet.webp", quality=90)
    card.write(figures, card.reconstruction(base, held), chosen, images, base)
    print((base / "README.md").read_text())


@app.command(name="dit")
def train_dit(
    work: Work,
    base: OldBase = ICONS,
    steps: Annotated[int, typer.Option(help="At the last one the rate is zero.")] = DIT_SCHEDULE.steps,
    workers: Annotated[int, typer.Option(help="Processes, on a CPU; each has one thread.")] = 1,
) -> None:
    """Train `icons-dit`, a small transformer with joint attention, from the tables that `make` has left in --work."""
    _, names = art.rasterise(work, SIZES.pixels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = dit.tables(work, words.trained(names), base, words.eighty())
    workers = workers if device.type == "cpu" else 1
    dit.train(source, DIT, replace(DIT_SCHEDULE, steps=steps), work / "dit", workers, device)


@app.command()
def dit_save(
    work: Work,
    out: Annotated[Path, typer.Option(help="Diffusers folder to write.")],
    base: OldBase = ICONS,
) -> None:
    """Write `icons-dit` from the latest checkpoint, and print the subject gain."""
    _, names = art.rasterise(work, SIZES.pixels)
    images = dit_base.save(work / "dit", base, out)
    gains = dit_base.subject_gain(out, dit.tables(work, words.trained(names), base, words.eighty()), words.eighty())
    print(f"{images} images: subject gain", {sigma: f"{gain:.1%}" for sigma, gain in gains.items()})


@app.command()
def dit_card(
    work: Work,
    base: Annotated[Path, typer.Option(help="Diffusers folder to measure; its card and sheet are written.")],
    count: Annotated[int, typer.Option(help="How many prompts.")] = card.PROMPTS,
    drawn: Annotated[Path | None, typer.Option(help="Keep the pictures here.")] = None,
) -> None:
    """Draw a sheet with `icons-dit`, measure it with the judge, and write its card."""
    torch.set_num_threads(1)
    pictures, names = art.rasterise(work, SIZES.pixels)
    dit_base.sheet_of(base).save(base / "sheet.webp", quality=90)
    figures = card.measure(base, _pick(pictures, names, words.eighty()), words.eighty(), drawn, count)
    dit_base.write(figures, count, base)
    print((base / "README.md").read_text())


@app.command(name="judge")
def train_judge(work: Work, out: Annotated[Path, typer.Option(help="File of the weights.")] = judge.WEIGHTS) -> None:
    """Train the judge on the trained subjects and sets, and write the held-out sheets and the weights to `bench/`."""
    work.mkdir(parents=True, exist_ok=True)
    art.fetch(work)
    pictures, names = art.rasterise(work, judge.SIZE)
    if not (bench_art.FOLDER / "held_out.webp").exists():
        bench_art.write_sheets(pictures, names)
    torch.set_num_threads(1)  # two threads on busy cores are slower than one
    chosen = subjects.trained(names)
    judge.train(_pick(pictures, names, chosen), chosen, work, out=out)


@app.command()
def judge_figures(
    base: Annotated[Path, typer.Option(help="Diffusers folder whose VAE is tried too.")] = ICONS,
    weights: Annotated[Path | None, typer.Option(help="File of the judge; without it, the committed one.")] = None,
) -> None:
    """Print every figure of docs/judge.md, from the committed judge and the committed held-out art."""
    reconstruct = judge.reconstruction(base) if (base / "vae").is_dir() else None
    held = bench_art.held_out_art()
    figures = judge_validation.validate(load_judge(weights), held.values, held.names, reconstruct)
    for key, value in figures.items():
        print(f"{key:55}{value:.3f}")


def _tokenizer(work: Path, names: tuple[str, ...], start: Path | None) -> CLIPTokenizer:
    """The vocabulary of the base that training goes on from, else a new one; a copy stays in `work`."""
    if start:
        CLIPTokenizer.from_pretrained(start / "tokenizer").save_pretrained(work / "tokenizer")
    else:
        captions.train_tokenizer(names, work / "tokenizer")
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def _pick(pictures: np.ndarray, names: tuple[str, ...], chosen: tuple[str, ...]) -> np.ndarray:
    index = {name: i for i, name in enumerate(names)}
    return pictures[[index[name] for name in chosen], : len(subjects.TRAIN_SETS)]


def _tensor(pictures: np.ndarray) -> Tensor:
    """uint8 `[subject, set, h, w, 3]` to `[subject, set, 3, h, w]`."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 1, 4, 2, 3).contiguous()


app()
