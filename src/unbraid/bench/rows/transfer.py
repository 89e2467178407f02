"""Rows of `transfer`: a style is learnt from pairs of pictures before and after it was applied."""

from pathlib import Path

from unbraid.bench.rows.row import Drawers, Row
from unbraid.bench.rows.training_cache import TrainingCache
from unbraid.bench.truth.tasks import TAUGHT, Cell, joint_prompt
from unbraid.bench.truth.truths import BEFORE, Truth
from unbraid.methods import METHODS
from unbraid.runs.api import pair_job
from unbraid.runs.settings import Settings
from unbraid.sampling.render import Use


def paired(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """A style learnt from pairs: applied by style guidance at `strength`, or as an ordinary LoRA (`guided` off)."""
    own = {key: value for key, value in settings.items() if key not in ("strength", "guided", "pairs", "method")}
    style, guided = cell.style.style, settings.get("guided", True)
    count, method = settings.get("pairs", 1), settings.get("method", "pair")
    before, after = pairs(cache, style, count)
    options = {"method": method, "seed": cell.seed, "base": cache.base_name, **own}
    job = pair_job(before, after, subject=TAUGHT[0], style=style, **options)
    use = Use(cache.train(job) / "style.safetensors", settings.get("strength", 1.0), prompt=style if guided else None)
    if guided:
        return {"style": cache.drawer(styles=(use,))}
    entry = METHODS[method]
    template = entry.prompts[entry.outputs(job.settings)["style"].prompt]  # the prompt that the LoRA was trained under
    return {"style": cache.drawer(use, suffix=f" in {style} style" if "{style}" in template else "")}


def learnt_after(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """A DreamBooth-LoRA of the picture after alone."""
    prompt, style = joint_prompt(cell.style.subject, cell.style.style), cell.style.style
    file = cache.learn(cache.picture(cell.style), prompt, cell.seed, **settings)
    return {"style": cache.drawer(Use(file), suffix=f" in {style} style")}


def pairs(cache: TrainingCache, style: str, count: int) -> tuple[Path, Path]:
    """Two folders with `count` pictures each, before and after; the prompt of a picture is its subject."""
    before = [(Truth(subject, BEFORE[style]), subject) for subject in TAUGHT[:count]]
    after = [(Truth(subject, style), subject) for subject in TAUGHT[:count]]
    return cache.captioned(before, f"{style} {count} before"), cache.captioned(after, f"{style} {count} after")


def row(name: str, settings: Settings, ablation: bool = False) -> Row:
    """A row of a method of `pair`, which the settings name if it is not the default."""
    return Row("transfer", name, paired, settings, ablation, (settings.get("method", "pair"),))


ROWS = [
    row("Pair", {}),
    row("Pair at LoRA scale", {"guided": False}),
    row("Pair, 2 pairs", {"pairs": 2}),
    row(METHODS["slider"].title, {"method": "slider", "guided": False}),
    Row("transfer", "DreamBooth-LoRA of the picture after", learnt_after, methods=("dreambooth",)),
    *(
        row(f"ablation: Pair{name}", settings, ablation=True)
        for name, settings in (
            (", not orthogonal", {"orthogonal": False}),
            (", without the content adapter", {"joint": False}),
            (", x0 loss", {"loss": "x0"}),
            (", prior preserved", {"prior_weight": 0.5}),
            (", windows", {"content_part": "0-0.7", "style_part": "0.28-1"}),
            (" at half strength", {"strength": 0.5}),
            (" at strength 1.5", {"strength": 1.5}),
        )
    ),
]
