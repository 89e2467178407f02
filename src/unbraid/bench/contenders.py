"""The package's methods and baselines as rows of the benchmark. Settings are those of the methods, on top of the base's own."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import mean

from unbraid.bench.rows import Hands, Row, every_use
from unbraid.bench.scores import harmonic, likeness
from unbraid.bench.shop import Shop
from unbraid.bench.truth.art import known_art, to_image
from unbraid.bench.truth.filters import TRAIN_FILTERS
from unbraid.bench.truth.tasks import PLACE, TAUGHT, Cell, content_prompt, items, joint_prompt, style_prompt
from unbraid.bench.truth.world import BEFORE, TRAINED, Truth
from unbraid.common.errors import UsageError
from unbraid.files.merge import Size
from unbraid.files.tools import Source, merge_files
from unbraid.images.sheets import save_image
from unbraid.methods.b4m import Kind
from unbraid.runs.api import learn_job, pair_job, zip_job
from unbraid.runs.modules import break_job, join, make_job
from unbraid.runs.settings import Settings
from unbraid.sampling.render import OWN, Use

TUNING = ("horse", "house")  # subjects of no table, on which the direct sum's weights are chosen
WEIGHTS = (0.5, 0.75, 1.0, 1.25)
PARTNERS = {  # of Break-for-Make: three pictures of the other kind, none of them of a subject or style of the tables
    "content": (("dog", "sepia"), ("umbrella", "noir"), ("violin", "risograph")),
    "style": (("dog", ""), ("umbrella", ""), ("violin", "")),
}


# separate and recombine: one picture each


def dreambooth(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """One LoRA of each whole picture, used for all."""
    files = [
        shop.train(
            learn_job(
                shop.picture(picture),
                prompt=joint_prompt(picture.subject, picture.style),
                seed=cell.seed,
                base=shop.base_name,
                **settings,
            )
        )
        / "lora.safetensors"
        for picture in dict.fromkeys((cell.content, cell.style))
    ]
    if len(files) == 1:
        return every_use(shop.hand(Use(files[0])))
    return {"both": shop.hand(*map(Use, files))}


def separated(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """The two LoRAs of a split, together each under its own prompt. The published code has files of their own for that."""
    content, style = (shop.split(picture, cell.seed, **settings) for picture in (cell.content, cell.style))
    end = "_joint" if settings.get("compat") == "official" else ""
    both = [Use(content / f"content{end}.safetensors", prompt=OWN), Use(style / f"style{end}.safetensors", prompt=OWN)]
    alone = {"content": Use(content / "content.safetensors"), "style": Use(style / "style.safetensors")}
    return {**{use: shop.hand(one) for use, one in alone.items()}, "both": shop.hand(*both)}


def blora(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """B-LoRA: content and style by block."""
    content = shop.split(cell.content, cell.seed, "blora", **settings) / "content.safetensors"
    style = shop.split(cell.style, cell.seed, "blora", **settings) / "style.safetensors"
    alone = {"content": shop.hand(Use(content)), "style": shop.hand(Use(style))}
    return {**alone, "both": shop.hand(Use(content), Use(style))}


def split_and_zipped(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """A split's content and another's style, zipped."""
    content = shop.split(cell.content, cell.seed) / "content.safetensors"
    style = shop.split(cell.style, cell.seed) / "style.safetensors"
    images = {"content": shop.picture(cell.content), "style": shop.picture(cell.style)}
    return {"both": shop.hand(*_zipped(shop, cell, content, style, images, settings))}


# combine: some pictures of a subject, one of a style


def summed(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """Both LoRAs loaded together: at strength 1, in turn (`combine`), or at weights tuned on other subjects."""
    content, style = shop.learnt(cell)
    a, b = tuned_weights(shop) if settings.get("tuned") else (1.0, 1.0)
    return {"both": shop.hand(Use(content, a), Use(style, b), combine=settings.get("combine", "sum"))}


def merged(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """Both LoRAs merged into one file; `rank` cuts it."""
    files, method, rank = shop.learnt(cell), settings["method"], settings.get("rank")
    sources, size = [Source(file) for file in files], Size(rank=rank)
    out = shop.derive(method, files, lambda out: merge_files(sources, out, method, size), method, rank)
    return {"both": shop.hand(Use(out))}


def zipped(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """Both LoRAs zipped, on the pictures that they were learnt from, or on none (`data_free`)."""
    content, style = shop.learnt(cell)
    images = {"content": shop.contents(cell)[0].parent, "style": shop.picture(cell.style)}
    given = {key: value for key, value in settings.items() if key != "data_free"}
    both = _zipped(shop, cell, content, style, {} if settings.get("data_free") else images, given)
    return {"both": shop.hand(*both)}


def combined_blora(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """B-LoRA's content of one of the subject's pictures, and its style of the style's."""
    return {"both": blora(shop, cell, settings)["both"]}


def modules(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """Break-for-Make's modules, at once, or fine-tuned (`tune`: settings of `make`)."""
    own = {key: value for key, value in settings.items() if key != "tune"}
    options = {"seed": cell.seed, "base": shop.base_name, **own}
    given: tuple[tuple[Kind, list[Path], str], ...] = (
        ("content", shop.contents(cell), content_prompt(cell.subject)),
        ("style", [shop.picture(cell.style)], style_prompt(cell.style)),
    )
    content, style = (
        shop.train(break_job(files, kind=kind, prompt=prompt, partners=partners(shop, kind), **options))
        / "module.safetensors"
        for kind, files, prompt in given
    )
    if "tune" not in settings:
        return {"both": shop.hand(Use(shop.derive("join", (content, style), lambda out: join(content, style, out))))}
    images = {"content": shop.contents(cell)[0].parent, "style": shop.picture(cell.style)}
    told = {"prompt": joint_prompt(cell.subject, cell.style.style), "seed": cell.seed, "base": shop.base_name}
    job = make_job(content, style, images=images, **{**told, **settings["tune"]})
    return {"both": shop.hand(Use(shop.train(job) / "merged.safetensors"))}


def joint(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """One LoRA of all pictures, each under its own prompt, the style's as often as the subject's."""
    told = [(truth, content_prompt(cell.subject)) for truth in shop.subject(cell.subject)]
    folder = shop.told(
        [*told, *[(cell.style, style_prompt(cell.style))] * len(told)], f"joint {cell.subject} {cell.style}"
    )
    prompt = joint_prompt(cell.subject, cell.style.style)
    job = learn_job(folder, prompt=prompt, seed=cell.seed, base=shop.base_name, **settings)
    return {"both": shop.hand(Use(shop.train(job) / "lora.safetensors"))}


# transfer: pairs


def paired(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """A style from pairs: by style guidance at `strength`, or as an ordinary LoRA (`guided` off)."""
    own = {key: value for key, value in settings.items() if key not in ("strength", "guided", "pairs", "method")}
    style, guided = cell.style.style, settings.get("guided", True)
    count, method = settings.get("pairs", 1), settings.get("method", "pair")
    before, after = pairs(shop, style, count)
    options = {"method": method, "seed": cell.seed, "base": shop.base_name, **own}
    file = shop.train(pair_job(before, after, subject=TAUGHT[0], style=style, **options)) / "style.safetensors"
    use = Use(file, settings.get("strength", 1.0), prompt=style if guided else None)
    if guided:
        return {"style": shop.hand(styles=(use,))}
    return {"style": shop.hand(use, suffix="" if method == "slider" else f" in {style} style")}


def learnt_after(shop: Shop, cell: Cell, settings: Settings) -> Hands:
    """A DreamBooth-LoRA of the picture after alone."""
    prompt, style = joint_prompt(cell.style.subject, cell.style.style), cell.style.style
    job = learn_job(shop.picture(cell.style), prompt=prompt, seed=cell.seed, base=shop.base_name, **settings)
    return {"style": shop.hand(Use(shop.train(job) / "lora.safetensors"), suffix=f" in {style} style")}


# what they share


def pairs(shop: Shop, style: str, count: int) -> tuple[Path, Path]:
    """Folders of pictures before, with what each shows, and after."""
    before = [(Truth(subject, BEFORE[style]), subject) for subject in TAUGHT[:count]]
    after = [(Truth(subject, style), subject) for subject in TAUGHT[:count]]
    return shop.told(before, f"{style} {count} before"), shop.told(after, f"{style} {count} after")


def partners(shop: Shop, kind: str) -> Path:
    """The folder of a module's partner pictures, with their prompts."""
    if shop.subjects:
        if not shop.partners.get(kind):
            what = f"a {kind} module needs pictures of the other kind beside its own"
            raise UsageError(what, "partners", "See docs/field-metrics.md for where to put them.")
        return shop.told(shop.partners[kind], f"partners {kind}")
    folder = shop.work / "inputs" / f"partners-{kind}"
    for subject, look in PARTNERS[kind]:
        picture = known_art().picture(subject, "noto")
        shown = TRAIN_FILTERS[look](picture[None]).expand(1, 3, -1, -1)[0] if look else picture
        if not (folder / f"{subject}.txt").exists():
            save_image(to_image(shown), folder / f"{subject}.png")
            (folder / f"{subject}.txt").write_text(f"a {subject} in {look} style" if look else f"a {subject}")
    return folder


def tuned_weights(shop: Shop) -> tuple[float, float]:
    """The weights of the direct sum with the best mean likeness on pairs that are in no table, at one seed."""
    cells = [
        Cell("combine", Truth(subject, TRAINED[0]), Truth(PLACE, style), 0)
        for subject, style in product(TUNING, shop.scale.styles)
    ]
    loras = {cell: shop.learnt(cell) for cell in cells}

    def search() -> list[float]:
        found = []
        for a, b in product(WEIGHTS, WEIGHTS):
            likenesses = []
            for cell, (content, style) in loras.items():
                (item,) = items(cell, shop.scale)
                (drawn,) = shop.hand(Use(content, a), Use(style, b))(item, item.seeds[:1])
                likenesses.append(harmonic(*likeness(drawn, item.truth)))
            found.append((mean(likenesses), a, b))
        return [*max(found)[1:]]

    a, b = shop.found("weights", [file for some in loras.values() for file in some], search)
    return a, b


def _zipped(
    shop: Shop, cell: Cell, content: Path, style: Path, images: Mapping[str, Path], settings: Settings
) -> tuple[Use, Use]:
    prompts = {"both": joint_prompt(cell.subject, cell.style.style)}
    options = {"prompts": prompts, "seed": cell.seed, "base": shop.base_name, **settings}
    folder = shop.train(zip_job(content, style, images=images, **options))
    return Use(folder / "content.safetensors"), Use(folder / "style.safetensors")


ROWS = [
    Row("separate", "DreamBooth-LoRA", dreambooth, methods=("dreambooth",)),
    Row("separate", "B-LoRA", blora, methods=("blora",)),
    Row("separate", "UnZipLoRA", separated, methods=("unziplora",)),
    Row(
        "separate",
        "UnZipLoRA, official",
        separated,
        {"compat": "official", "column_ratio": 0.1},
        methods=("unziplora",),
    ),
    Row("combine", "direct sum", summed, methods=("dreambooth",)),
    Row("combine", "direct sum, tuned", summed, {"tuned": True}, methods=("dreambooth",)),
    Row("combine", "SVD", merged, {"method": "concat", "rank": 16}, methods=("dreambooth",)),
    Row("combine", "TIES", merged, {"method": "ties"}, methods=("dreambooth",)),
    Row("combine", "DARE", merged, {"method": "dare"}, methods=("dreambooth",)),
    Row("combine", "KnOTS", merged, {"method": "knots"}, methods=("dreambooth",)),
    Row("combine", "NP-LoRA", merged, {"method": "np-lora"}, methods=("dreambooth",)),
    Row("combine", "B-LoRA", combined_blora, methods=("blora",)),
    Row("combine", "K-LoRA", summed, {"combine": "k-lora"}, methods=("dreambooth",)),
    Row("combine", "LoRA Switch", summed, {"combine": "switch"}, methods=("dreambooth",)),
    Row("combine", "LoRA Composite", summed, {"combine": "composite"}, methods=("dreambooth",)),
    Row("combine", "ZipRank", zipped, methods=("dreambooth", "ziplora")),
    Row("combine", "ZipLoRA", zipped, {"granularity": "column"}, methods=("dreambooth", "ziplora")),
    Row("combine", "ZipLoRA, public recipe", zipped, {"compat": "official"}, methods=("dreambooth", "ziplora")),
    Row("combine", "Break-for-Make, at once", modules, methods=("break",)),
    Row("combine", "Break-for-Make, fine-tuned", modules, {"tune": {}}, methods=("break", "make")),
    Row("combine", "joint training", joint, methods=("dreambooth",)),
    Row("transfer", "Pair", paired, methods=("pair",)),
    Row("transfer", "Pair at LoRA scale", paired, {"guided": False}, methods=("pair",)),
    Row("transfer", "Pair, 2 pairs", paired, {"pairs": 2}, methods=("pair",)),
    Row("transfer", "Concept Slider", paired, {"method": "slider", "guided": False}, methods=("slider",)),
    Row("transfer", "DreamBooth-LoRA of the picture after", learnt_after, methods=("dreambooth",)),
    Row("recombine", "DreamBooth-LoRAs", dreambooth, methods=("dreambooth",)),
    Row("recombine", "B-LoRA", blora, methods=("blora",)),
    Row("recombine", "UnZipLoRA", separated, methods=("unziplora",)),
    Row(
        "recombine",
        "UnZipLoRA, official",
        separated,
        {"compat": "official", "column_ratio": 0.1},
        methods=("unziplora",),
    ),
    Row("recombine", "UnZipLoRA, zipped", split_and_zipped, methods=("unziplora", "ziplora")),
]
ABLATIONS = [
    Row(
        "separate",
        "ablation: no column separation",
        separated,
        {"column_separation": False},
        ablation=True,
        methods=("unziplora",),
    ),
    Row(
        "separate",
        "ablation: no block separation",
        separated,
        {"block_separation": False},
        ablation=True,
        methods=("unziplora",),
    ),
    Row(
        "separate",
        "ablation: no loss for content alone",
        separated,
        {"content_alone": 0.0},
        ablation=True,
        methods=("unziplora",),
    ),
    Row(
        "combine",
        "ablation: ZipLoRA, data-free",
        zipped,
        {"granularity": "column", "data_free": True},
        ablation=True,
        methods=("dreambooth", "ziplora"),
    ),
    Row(
        "combine",
        "ablation: ZipLoRA, the paper's rate",
        zipped,
        {"granularity": "column", "lr": 0.01},
        ablation=True,
        methods=("dreambooth", "ziplora"),
    ),
    Row(
        "combine",
        "ablation: ZipLoRA, dot product",
        zipped,
        {"granularity": "column", "similarity": "dot", "lr": 0.01},
        ablation=True,
        methods=("dreambooth", "ziplora"),
    ),
    Row(
        "combine",
        "ablation: Break-for-Make, no partners",
        modules,
        {"partner_count": 0},
        ablation=True,
        methods=("break",),
    ),
    Row(
        "combine",
        "ablation: Break-for-Make, no orthonormal start",
        modules,
        {"orthogonal": False},
        ablation=True,
        methods=("break",),
    ),
    Row(
        "combine",
        "ablation: Break-for-Make, fine-tuned by AdamW",
        modules,
        {"tune": {"optimizer": "adamw"}},
        ablation=True,
        methods=("break", "make"),
    ),
    Row("transfer", "ablation: Pair, not orthogonal", paired, {"orthogonal": False}, ablation=True, methods=("pair",)),
    Row(
        "transfer",
        "ablation: Pair, without the content adapter",
        paired,
        {"joint": False},
        ablation=True,
        methods=("pair",),
    ),
    Row("transfer", "ablation: Pair at half strength", paired, {"strength": 0.5}, ablation=True, methods=("pair",)),
    Row("transfer", "ablation: Pair at strength 1.5", paired, {"strength": 1.5}, ablation=True, methods=("pair",)),
]
