"""Rows of `combine`: a LoRA learnt from several pictures of a subject, and one learnt from a single picture of a style."""

from collections.abc import Mapping
from itertools import product
from statistics import mean

from unbraid.bench.rows.row import Drawers, Make, Row
from unbraid.bench.rows.separate import MAKERS, apart
from unbraid.bench.rows.training_cache import TrainingCache
from unbraid.bench.truth.scores import harmonic, likeness
from unbraid.bench.truth.tasks import PLACE, Cell, content_prompt, items, joint_prompt, style_prompt
from unbraid.bench.truth.truths import TRAINED, Truth
from unbraid.files.merge import Size
from unbraid.files.tools import Source, merge_files
from unbraid.methods import METHODS
from unbraid.runs.settings import Settings
from unbraid.sampling.uses import OWN, Use

TUNING = ("horse", "house")  # the direct sum's weights are tuned on these subjects, which no table contains
WEIGHTS = (0.5, 0.75, 1.0, 1.25)


def summed(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """Both LoRAs loaded together: at weight 1, by a way of combining them (`combine`), or at weights tuned on other subjects
    (`tuned`). `content`, `style`: further settings of this use. `apart`: each leaves out the layers of the other role."""
    content, style = cache.learnt(cell)
    a, b = tuned_weights(cache) if settings.get("tuned") else (1.0, 1.0)
    first, second = {"scale": a, **settings.get("content", {})}, {"scale": b, **settings.get("style", {})}
    uses = {"content": Use(content, **first), "style": Use(style, **second)}
    some = apart(cache, uses) if settings.get("apart") else uses.values()
    return {"both": cache.drawer(*some, combine=settings.get("combine", "sum"))}


def guided(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """The content LoRA in the model, and the style LoRA as style guidance."""
    content, style = cache.learnt(cell)
    return {"both": cache.drawer(Use(content), styles=[Use(style, prompt=cell.style.style)])}


def style_of_a_split(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """The content LoRA, and the style LoRA of a split of the style's picture, whose content LoRA is thrown away."""
    content = cache.learn(cache.contents(cell), content_prompt(cell.subject), cell.seed)
    style = cache.split(cell.style, seed=cell.seed) / "style.safetensors"
    return {"both": cache.drawer(Use(content), Use(style))}


def merged(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """Both LoRAs merged into one file by `method`, truncated to `rank` if it is given."""
    files, method, rank = cache.learnt(cell), settings["method"], settings.get("rank")
    sources, size = [Source(file) for file in files], Size(rank=rank)
    out = cache.derive(method, files, lambda out: merge_files(sources, out, method, size), method, rank)
    return {"both": cache.drawer(Use(out))}


def zipped(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """Both LoRAs merged by `zip`, which trains on the pictures that they were learnt from, or on none (`data_free`)."""
    content, style = cache.learnt(cell)
    images = {"content": cache.contents(cell)[0].parent, "style": cache.picture(cell.style)}
    own = {key: value for key, value in settings.items() if key != "data_free"}
    both = cache.zipped(cell, content, style, {} if settings.get("data_free") else images, **own)
    return {"both": cache.drawer(*both)}


def on_one_basis(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """Two QR-LoRAs, which share the basis of each layer, merged into one file of the same rank."""
    content = cache.learn(cache.contents(cell), content_prompt(cell.subject), cell.seed, method="qr-lora", **settings)
    style = cache.learn(cache.picture(cell.style), style_prompt(cell.style), cell.seed, method="qr-lora", **settings)
    sources = [Source(content), Source(style)]
    out = cache.derive("concat", (content, style), lambda out: merge_files(sources, out, "concat", Size()), "concat")
    return {"both": cache.drawer(Use(out))}


def combined_blora(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """B-LoRA: the content blocks learnt from one of the subject's pictures, the style blocks from the picture of the style."""
    return {"both": MAKERS["blora"](cache, cell, settings)["both"]}


def joint(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """One LoRA of all pictures, each with its own prompt. The picture of the style is repeated so that both get equal shares."""
    contents = [(truth, content_prompt(cell.subject)) for truth in cache.subject(cell.subject)]
    styles = [(cell.style, style_prompt(cell.style))] * len(contents)
    folder = cache.captioned([*contents, *styles], f"joint {cell.subject} {cell.style}")
    prompt = joint_prompt(cell.subject, cell.style.style)
    return {"both": cache.drawer(Use(cache.learn(folder, prompt, cell.seed, **settings)))}


def tuned_weights(cache: TrainingCache) -> tuple[float, float]:
    """The weights (content, style) whose direct sum has the best mean likeness on the subjects of TUNING, at one seed."""
    cells = [
        Cell("combine", Truth(subject, TRAINED[0]), Truth(PLACE, style), 0)
        for subject, style in product(TUNING, cache.scale.styles)
    ]
    loras = {cell: cache.learnt(cell) for cell in cells}

    def search() -> list[float]:
        found = []
        for a, b in product(WEIGHTS, WEIGHTS):
            likenesses = []
            for cell, (content, style) in loras.items():
                (item,) = items(cell, cache.scale)
                (drawn,) = cache.drawer(Use(content, a), Use(style, b))(item, item.seeds[:1])
                likenesses.append(harmonic(*likeness(drawn, item.truth)))
            found.append((mean(likenesses), a, b))
        return [*max(found)[1:]]

    a, b = cache.search("weights", [file for some in loras.values() for file in some], search)
    return a, b


SUM, ZIP, SPLIT = ("dreambooth",), ("dreambooth", "ziplora"), ("dreambooth", "unziplora")
IDEAS: Mapping[str, tuple[Make, Settings, tuple[str, ...]]] = {  # tried against the direct sum
    "each reads its own prompt": (summed, {"content": {"prompt": OWN}, "style": {"prompt": OWN}}, SUM),
    "the style reads its own prompt": (summed, {"style": {"prompt": OWN}}, SUM),
    "the style from a fifth of the steps on": (summed, {"style": {"steps": (0.2, 1.0)}}, SUM),
    "the content from a fifth of the steps on": (summed, {"content": {"steps": (0.2, 1.0)}}, SUM),
    "the content in the first four fifths": (summed, {"content": {"steps": (0.0, 0.8)}}, SUM),
    "both at 0.75": (summed, {"content": {"scale": 0.75}, "style": {"scale": 0.75}}, SUM),
    "style guidance": (guided, {}, SUM),
    "the blocks of each role": (merged, {"method": "blocks"}, SUM),
    "the style LoRA of a split": (style_of_a_split, {}, SPLIT),
}
ROWS = [
    Row("combine", "direct sum", summed, methods=SUM),
    Row("combine", "layers by role", summed, {"apart": True}, methods=SUM),
    Row("combine", "direct sum, tuned", summed, {"tuned": True}, methods=SUM),
    Row("combine", "SVD", merged, {"method": "concat", "rank": 16}, methods=SUM),
    Row("combine", "TIES", merged, {"method": "ties"}, methods=SUM),
    Row("combine", "DARE", merged, {"method": "dare"}, methods=SUM),
    Row("combine", "KnOTS", merged, {"method": "knots"}, methods=SUM),
    Row("combine", "NP-LoRA", merged, {"method": "np-lora"}, methods=SUM),
    Row("combine", METHODS["blora"].title, combined_blora, methods=("blora",)),
    Row("combine", METHODS["qr-lora"].title, on_one_basis, methods=("qr-lora",)),
    Row("combine", "K-LoRA", summed, {"combine": "k-lora"}, methods=SUM),
    Row("combine", "K-LoRA, released rule", summed, {"combine": "k-lora-released"}, methods=SUM),
    Row("combine", "EST-LoRA", summed, {"combine": "est-lora"}, methods=SUM),
    Row("combine", "LoRA Switch", summed, {"combine": "switch"}, methods=SUM),
    Row("combine", "LoRA Composite", summed, {"combine": "composite"}, methods=SUM),
    Row("combine", "ZipRank", zipped, methods=ZIP),
    Row("combine", "ZipRank, layer prior", zipped, {"layer_prior": 0.1}, methods=ZIP),
    Row("combine", "ZipLoRA", zipped, {"granularity": "column"}, methods=ZIP),
    Row("combine", "ZipLoRA, public recipe", zipped, {"compat": "official"}, methods=ZIP),
    Row("combine", "joint training", joint, methods=SUM),
    *(Row("combine", f"ablation: {idea}", make, own, True, methods) for idea, (make, own, methods) in IDEAS.items()),
    *(
        Row("combine", f"ablation: ZipLoRA, {name}", zipped, {"granularity": "column", **own}, True, ZIP)
        for name, own in (
            ("data-free", {"data_free": True}),
            ("the paper's rate", {"lr": 0.01}),
            ("dot product", {"similarity": "dot", "lr": 0.01}),
        )
    ),
]
