"""Rows of `separate` and `recombine`: content and style are each learnt from one picture."""

from unbraid.bench.rows.row import Drawers, Row, every_use
from unbraid.bench.rows.training_cache import TrainingCache
from unbraid.bench.truth.tasks import Cell, joint_prompt
from unbraid.runs.api import learn_job
from unbraid.runs.settings import Settings
from unbraid.sampling.render import OWN, Use


def dreambooth(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """One DreamBooth-LoRA per input picture. A cell with one picture uses its LoRA for content, style and both."""
    files = []
    for picture in dict.fromkeys((cell.content, cell.style)):
        options = {"prompt": joint_prompt(picture.subject, picture.style), "seed": cell.seed, "base": cache.base_name}
        files.append(cache.train(learn_job(cache.picture(picture), **options, **settings)) / "lora.safetensors")
    if len(files) == 1:
        return every_use(cache.drawer(Use(files[0])))
    return {"both": cache.drawer(*map(Use, files))}


def separated(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """The two LoRAs of a split; drawn together, each reads its own prompt. The published code has extra files for drawing both."""
    content, style = (cache.split(picture, seed=cell.seed, **settings) for picture in (cell.content, cell.style))
    end = "_joint" if settings.get("compat") == "official" else ""
    both = [Use(content / f"content{end}.safetensors", prompt=OWN), Use(style / f"style{end}.safetensors", prompt=OWN)]
    alone = {"content": Use(content / "content.safetensors"), "style": Use(style / "style.safetensors")}
    return {**{use: cache.drawer(one) for use, one in alone.items()}, "both": cache.drawer(*both)}


def blora(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """B-LoRA, which separates content and style by the block of the UNet."""
    content = cache.split(cell.content, "blora", seed=cell.seed, **settings) / "content.safetensors"
    style = cache.split(cell.style, "blora", seed=cell.seed, **settings) / "style.safetensors"
    alone = {"content": cache.drawer(Use(content)), "style": cache.drawer(Use(style))}
    return {**alone, "both": cache.drawer(Use(content), Use(style))}


def split_and_zipped(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """The content LoRA of one split and the style LoRA of another, merged by `zip`."""
    content = cache.split(cell.content, seed=cell.seed) / "content.safetensors"
    style = cache.split(cell.style, seed=cell.seed) / "style.safetensors"
    images = {"content": cache.picture(cell.content), "style": cache.picture(cell.style)}
    return {"both": cache.drawer(*cache.zipped(cell, content, style, images, **settings))}


OFFICIAL = {"compat": "official", "column_ratio": 0.1}
SPLIT = ("unziplora",)
ROWS = [
    Row("separate", "DreamBooth-LoRA", dreambooth, methods=("dreambooth",)),
    Row("separate", "B-LoRA", blora, methods=("blora",)),
    Row("separate", "UnZipLoRA", separated, methods=SPLIT),
    Row("separate", "UnZipLoRA, official", separated, OFFICIAL, methods=SPLIT),
    Row("recombine", "DreamBooth-LoRAs", dreambooth, methods=("dreambooth",)),
    Row("recombine", "B-LoRA", blora, methods=("blora",)),
    Row("recombine", "UnZipLoRA", separated, methods=SPLIT),
    Row("recombine", "UnZipLoRA, official", separated, OFFICIAL, methods=SPLIT),
    Row("recombine", "UnZipLoRA, zipped", split_and_zipped, methods=("unziplora", "ziplora")),
    *(
        Row("separate", f"ablation: {name}", separated, settings, ablation=True, methods=SPLIT)
        for name, settings in (
            ("no column separation", {"column_separation": False}),
            ("no block separation", {"block_separation": False}),
            ("no loss for content alone", {"content_alone": 0.0}),
        )
    ),
]
