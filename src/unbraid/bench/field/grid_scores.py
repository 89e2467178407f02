"""Scores of the runs of a grid: what their LoRAs draw, compared with the pictures that they learnt from.

They choose between settings of one method on pictures without true answers. They reward copying (docs/field-metrics.md); on tasks with
right answers, the benchmark compares."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image

from unbraid.bench.field.models import FieldModels
from unbraid.bench.field.protocol import PROTOCOLS
from unbraid.bench.field.scores import measure
from unbraid.bench.truth.scores import harmonic, judge, values_of
from unbraid.common.atomic import atomic
from unbraid.images.crop import open_image
from unbraid.methods import METHODS
from unbraid.runs import pace
from unbraid.runs.batch import recorded
from unbraid.runs.drawing import generate
from unbraid.runs.folder import JOB
from unbraid.runs.grid_report import SCORES
from unbraid.runs.job import RARE, Job, prompts_of
from unbraid.runs.job_folder import is_done

DRAWS = 4  # pictures of each prompt
KINDS = ("content", "style")


def score_runs(folders: Sequence[Path], models: FieldModels, by_judge: bool = False) -> Iterator[Path]:
    """Write `scores.json` for the finished runs that were not scored with these models yet, and yield each folder."""
    with_what = {**models.names(), **({"judge": "icons"} if by_judge else {})}
    for out in (one for one in folders if is_done(one)):
        file = out / SCORES
        if not file.exists() or json.loads(file.read_text("utf-8")).get("models") != with_what:
            found = score(recorded(out / JOB), models, by_judge)
            with atomic(file) as part:
                part.write_text(json.dumps({"models": with_what, **found}), "utf-8")
        yield out


def score(job: Job, models: FieldModels, by_judge: bool) -> dict[str, float]:
    """Name → mean score of a finished run's drawings. A content LoRA is compared in content, a style LoRA in style, another LoRA in both.

    `judge` is the harmonic mean of the judge's cosines in content and in style, or the one that there is."""
    learnt = [open_image(path) for paths in job.data.images.values() for path in paths]
    scores: dict[str, list[float]] = {}
    for stem, prompt in asked(job):
        images = generate(
            prompt,
            job.out / f"{stem}.safetensors",
            base=job.base,
            n=DRAWS,
            steps=pace.SHEET_STEPS,
            device=job.loading.device,
        )
        kinds = [kind for kind in KINDS if stem not in KINDS or stem == kind]
        if by_judge:
            for kind, values in _judged(images, learnt).items():
                scores.setdefault(f"judge {kind}", []).extend(values if kind in kinds else [])
        given = {f"{kind}s": learnt for kind in kinds}
        columns = measure(models, images, [prompt.replace(f"{RARE} ", "")] * DRAWS, **given) if models.names() else {}
        for name, values in columns.items():
            scores.setdefault(name, []).extend(values)
    means = {name: fmean(values) for name, values in scores.items() if values}
    judged = [means[name] for name in ("judge content", "judge style") if name in means]
    return means | ({"judge": harmonic(*judged) if len(judged) == 2 else judged[0]} if judged else {})


def asked(job: Job) -> Iterator[tuple[str, str]]:
    """(LoRA file without its suffix, prompt): its own prompt, but for a style other subjects."""
    texts = prompts_of(job)
    for stem, output in METHODS[job.method].outputs(job.settings).items():
        if stem == "style" and job.data.words.get("style"):
            for prompt in PROTOCOLS["plain"].prompts["style"]:
                yield stem, prompt.format(style=job.data.words["style"])
        else:
            yield stem, texts.get(output.prompt, texts["both"])


def _judged(images: Sequence[Image.Image], learnt: Sequence[Image.Image]) -> dict[str, list[float]]:
    """Kind → the judge's cosine of each picture to those learnt from, on average."""
    drawn, true = ([judge().embed(values_of(one)[None]) for one in some] for some in (images, learnt))
    both = {kind: (torch.cat([a[i] for a in drawn]), torch.cat([b[i] for b in true])) for i, kind in enumerate(KINDS)}
    return {kind: (ours @ theirs.T).mean(1).tolist() for kind, (ours, theirs) in both.items()}
