"""The recipe's command line: `python -m tools.recipe make --work DIR`."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import CLIPTokenizer

from tools import judge_validation
from tools.recipe import art, captions, card, judge, latents, model, sheet, unet, vae
from tools.recipe.config import PRESETS
from unbraid.bench.truth import art as bench_art
from unbraid.bench.truth import subjects
from unbraid.bench.truth.judge import load_judge

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Work = Annotated[Path, typer.Option(help="Folder for everything that is not committed; reuse it to resume.")]
Preset = Annotated[str, typer.Option(help="Sizes: cpu (64 px) or gpu (128 px).")]
CPU_WORKERS = 2
ICONS = Path(__file__).parents[2] / "src/unbraid/bases/icons"


@app.command()
def make(work: Work, preset: Preset = "cpu", workers: int = CPU_WORKERS) -> None:
    """Every stage in turn: art, tokenizer, VAE, latents, UNet with text encoders, diffusers folder."""
    work.mkdir(parents=True, exist_ok=True)
    config = PRESETS[preset]
    art.fetch(work)
    pictures, names = art.rasterise(work, config.size)
    captions.train_tokenizer(names, work / "tokenizer")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = workers if device.type == "cpu" else 1
    known = _pick(pictures, names, subjects.trained(names, None))
    autoencoder = vae.train(known, config, work, workers, device)
    chosen = subjects.trained(names, config.unet.subjects)
    cached, _ = latents.encode(autoencoder, _pick(pictures, names, chosen), work)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    unet.train(unet.Data(cached, chosen, config.size), config, work, tokenizer, workers, device)
    vae.harden(known, config, work, workers, device)
    save(work, preset)


@app.command()
def save(work: Work, preset: Preset = "cpu", out: Path = ICONS) -> None:
    """Write the diffusers folder from the latest checkpoints."""
    model.save(sheet.load(work, preset), out)
    print(f"saved {out}")


@app.command(name="sheet")
def sample_sheet(work: Work, preset: Preset = "cpu", out: Path = Path("sheet.png")) -> None:
    """Draw samples from the latest checkpoint, and print the subject gain."""
    sheet.draw(work, preset, out)


@app.command(name="card")
def model_card(
    work: Work,
    preset: Preset = "cpu",
    drawn: Annotated[Path | None, typer.Option(help="Keep the pictures here.")] = None,
) -> None:
    """Measure the saved base with the judge, and write its README.md and figures.json. Takes about 20 minutes."""
    torch.set_num_threads(1)
    pictures, names = art.rasterise(work, PRESETS[preset].size)
    chosen = subjects.trained(names, PRESETS[preset].unet.subjects)
    figures = card.measure(_pick(pictures, names, chosen), chosen, drawn)
    psnr = card.reconstruction(pictures[[names.index(name) for name in subjects.held_out()]])
    card.write(figures, psnr, chosen, sheet.seen(work, preset), ICONS)
    print((ICONS / "README.md").read_text())


@app.command(name="judge")
def train_judge(work: Work) -> None:
    """Train the judge on the trained subjects and sets, and write the held-out sheet and the weights to `bench/`."""
    work.mkdir(parents=True, exist_ok=True)
    art.fetch(work)
    pictures, names = art.rasterise(work, judge.SIZE)
    if not (bench_art.FOLDER / "held_out.webp").exists():
        bench_art.write_sheets(pictures, names)
    torch.set_num_threads(1)  # two threads on busy cores are slower than one
    chosen = subjects.trained(names, None)
    judge.train(_pick(pictures, names, chosen), chosen, work)


@app.command()
def judge_figures(base: Annotated[Path, typer.Option(help="Diffusers folder whose VAE is tried too.")] = ICONS) -> None:
    """Print every figure of docs/judge.md, from the committed judge and the committed held-out art."""
    reconstruct = judge.reconstruction(base) if (base / "vae").is_dir() else None
    held = bench_art.held_out_art()
    figures = judge_validation.validate(load_judge(), held.values, held.names, reconstruct)
    for key, value in figures.items():
        print(f"{key:55}{value:.3f}")


def _pick(pictures: np.ndarray, names: tuple[str, ...], chosen: tuple[str, ...]) -> np.ndarray:
    index = {name: i for i, name in enumerate(names)}
    return pictures[[index[name] for name in chosen], : len(subjects.TRAIN_SETS)]


app()
