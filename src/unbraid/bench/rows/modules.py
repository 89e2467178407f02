"""Break-for-Make's rows of `combine`: a content module and a style module, put together."""

from pathlib import Path

from unbraid.bench.rows.row import Drawers, Row
from unbraid.bench.rows.training_cache import TrainingCache
from unbraid.bench.truth.art import known_art, to_image
from unbraid.bench.truth.filters import TRAIN_FILTERS
from unbraid.bench.truth.tasks import Cell, content_prompt, joint_prompt, style_prompt
from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError
from unbraid.images.sheets import save_image
from unbraid.methods.b4m import Kind
from unbraid.runs.break_make import break_job, join, make_job
from unbraid.runs.settings import Settings
from unbraid.sampling.render import Use

PARTNERS = {  # kind of module → (subject, filter): three pictures of the other kind, with subjects and styles that no table contains
    "content": (("dog", "sepia"), ("umbrella", "noir"), ("violin", "risograph")),
    "style": (("dog", ""), ("umbrella", ""), ("violin", "")),
}


def modules(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """Two modules, joined as they are, or fine-tuned together if there is `tune` (the settings of `make`)."""
    own = {key: value for key, value in settings.items() if key != "tune"}
    options = {"seed": cell.seed, "base": cache.base_name, **own}
    inputs: tuple[tuple[Kind, list[Path], str], ...] = (
        ("content", cache.contents(cell), content_prompt(cell.subject)),
        ("style", [cache.picture(cell.style)], style_prompt(cell.style)),
    )
    content, style = (
        cache.train(break_job(files, kind=kind, prompt=prompt, partners=partners(cache, kind), **options))
        / "module.safetensors"
        for kind, files, prompt in inputs
    )
    if "tune" not in settings:
        return {
            "both": cache.drawer(Use(cache.derive("join", (content, style), lambda out: join(content, style, out))))
        }
    images = {"content": cache.contents(cell)[0].parent, "style": cache.picture(cell.style)}
    tuning = {"prompt": joint_prompt(cell.subject, cell.style.style), "seed": cell.seed, "base": cache.base_name}
    job = make_job(content, style, images=images, **{**tuning, **settings["tune"]})
    return {"both": cache.drawer(Use(cache.train(job) / "merged.safetensors"))}


def partners(cache: TrainingCache, kind: str) -> Path:
    """The folder with the partner pictures of a module, each with its prompt. UsageError if the user's own pictures have none."""
    if cache.subjects:
        if not cache.partners.get(kind):
            what = f"a {kind} module needs pictures of the other kind beside its own"
            raise UsageError(what, "partners", "See docs/field-metrics.md for where to put them.")
        return cache.captioned(cache.partners[kind], f"partners {kind}")
    folder = cache.work / "inputs" / f"partners-{kind}"
    for subject, look in PARTNERS[kind]:
        picture = known_art().picture(subject, "noto")
        shown = TRAIN_FILTERS[look](picture[None]).expand(1, 3, -1, -1)[0] if look else picture
        if not (folder / f"{subject}.txt").exists():
            save_image(to_image(shown), folder / f"{subject}.png")
            with atomic(folder / f"{subject}.txt") as part:
                part.write_text(f"a {subject} in {look} style" if look else f"a {subject}")
    return folder


BREAK, BOTH = ("break",), ("break", "make")
OFFICIAL = {  # as published: correlated halves, the first ones, and AdamW
    "compat": "official",
    "orthogonal": False,
    "halves": "first",
    "tune": {"compat": "official", "metric": "euclidean"},
}
ROWS = [
    Row("combine", "Break-for-Make, at once", modules, methods=BREAK),
    Row("combine", "Break-for-Make, fine-tuned", modules, {"tune": {}}, methods=BOTH),
    Row("combine", "Break-for-Make, official", modules, OFFICIAL, methods=BOTH),
    Row("combine", "ablation: Break-for-Make, no partners", modules, {"partner_count": 0}, True, BREAK),
    Row("combine", "ablation: Break-for-Make, no orthonormal start", modules, {"orthogonal": False}, True, BREAK),
    Row(
        "combine",
        "ablation: Break-for-Make, fine-tuned by AdamW",
        modules,
        {"tune": {"metric": "euclidean"}},
        ablation=True,
        methods=BOTH,
    ),
]
