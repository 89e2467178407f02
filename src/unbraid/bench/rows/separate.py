"""Rows of `separate` and `recombine`: content and style are each learnt from one picture."""

from collections.abc import Mapping
from pathlib import Path

from unbraid.bases.families import BLOCKS
from unbraid.bench.rows.row import Drawers, Make, Row, every_use
from unbraid.bench.rows.training_cache import TrainingCache
from unbraid.bench.truth.tasks import Cell, Task, joint_prompt
from unbraid.methods import ENTRIES, METHODS
from unbraid.methods.entry import ROLES
from unbraid.runs.roles import in_roles, roles_in_drawing
from unbraid.runs.settings import Settings, base_defaults, resolve
from unbraid.sampling.uses import OWN, STYLE_NAME, Use


def dreambooth(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """One DreamBooth-LoRA per input picture. A cell with one picture uses its LoRA for content, style and both. `apart`: a LoRA that is
    used for one role, or together with another picture's, leaves out the layers of the other role."""
    files = []
    for picture in dict.fromkeys((cell.content, cell.style)):
        prompt = joint_prompt(picture.subject, picture.style)
        files.append(cache.learn(cache.picture(picture), prompt, cell.seed))
    uses: dict[str, Use] = dict(zip(ROLES, (Use(files[0]), Use(files[-1])), strict=True))
    by_role = settings.get("apart")
    if len(files) == 1:
        whole = every_use(cache.drawer(Use(files[0])))
        return {**whole, **each_alone(cache, uses)} if by_role else whole
    return {"both": cache.drawer(*(apart(cache, uses) if by_role else uses.values()))}


def separated(method: str) -> Make:
    """How rows of a split method are made: from the content LoRA of one split and the style LoRA of another (or the same)
    one. Which files they are drawn with, and whether each reads its own prompt when they are drawn together, follows from
    the method's outputs. LoRAs of two pictures that read their own prompts leave out the layers of the other role, if roles are known,
    and the style LoRA reads the name of its style alone (docs/benchmark.md); but neither with the published code."""

    def make(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
        pictures = zip(ROLES, (cell.content, cell.style), strict=True)
        folders = {role: cache.split(picture, method, seed=cell.seed, **settings) for role, picture in pictures}
        outputs = METHODS[method].outputs(settings)
        # `blocks` is an option of the split, not a setting
        named = {name: value for name, value in settings.items() if name != "blocks"}
        given = resolve(method, cache.base_name, None, {**named, **cache.scale.training.get(method, {})})
        joint_attention = not cache.base.family.network.layers.own_prompt
        own = OWN if reads_own_prompts(method, given, joint_attention) else None
        alone = {role: cache.drawer(Use(folder / f"{role}.safetensors")) for role, folder in folders.items()}
        joint = {role: f"{role}_joint" if f"{role}_joint" in outputs else role for role in ROLES}  # files for joint use
        elsewhere = own and cell.content != cell.style and settings.get("compat") != "official"
        by_role = elsewhere and roles_in_drawing(cache.base)
        prompts = {"content": own, "style": STYLE_NAME if elsewhere else own}
        both = {role: Use(folders[role] / f"{joint[role]}.safetensors", prompt=prompts[role]) for role in ROLES}
        return {**alone, "both": cache.drawer(*(apart(cache, both) if by_role else both.values()))}

    return make


def apart(cache: TrainingCache, uses: Mapping[str, Use]) -> list[Use]:
    """Role → a LoRA, each of which leaves out the layers of the other role. UsageError if no roles of layers are known for the base."""
    return in_roles([*uses.values()], [*uses], cache.base)


def each_alone(cache: TrainingCache, uses: Mapping[str, Use]) -> Drawers:
    """Role → what draws with its LoRA alone, without the layers of the other role."""
    return {role: cache.drawer(*apart(cache, {role: use})) for role, use in uses.items()}


def reads_own_prompts(method: str, settings: Settings, joint: bool = False) -> bool:
    """Whether the method trains its LoRAs together, each under its own prompt. `joint`: whether the base's attention is joint; there,
    a prompt of its own is a segment of the text."""
    (recipe,) = METHODS[method].make(BLOCKS["sdxl"], **settings)
    return any(one.prompt and (one.segment or not joint) for branch in recipe.branches(0) for one in branch.active)


def recombined(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """The content LoRA of one split with the style LoRA of another, in all layers or (`apart`) without those of the other role, each under
    its own prompt or (`one_prompt`) all under that of the drawing; with `style_words` a style LoRA reads the name of its style alone.
    `negative`: the negative prompt is the subject that the style came with. The other two LoRAs are subtracted by the weight `less`: the
    style that the content came with, the content that the style came with. `guided`: each is drawn against its counterpart in the other
    split, as in ConsisLoRA."""
    method = settings.get("method", UNZIP)
    first, second = (cache.split(one, method, seed=cell.seed) for one in (cell.content, cell.style))
    own, less, guided = None if settings.get("one_prompt") else OWN, settings.get("less", 0.0), settings.get("guided")
    prompts = {"content": own, "style": STYLE_NAME if settings.get("style_words") else own}

    def use(folder: Path, other: Path, role: str, scale: float) -> Use:
        file = f"{role}.safetensors"
        return Use(folder / file, scale, prompt=prompts[role], against=other / file if guided and scale > 0 else None)

    uses = [use(first, second, "content", 1.0), use(second, first, "style", 1.0)]
    if settings.get("apart"):
        uses = apart(cache, dict(zip(ROLES, uses, strict=True)))
    if less:
        uses += [use(first, second, "style", -less), use(second, first, "content", -less)]
    return {"both": cache.drawer(*uses, negative=negative_prompt(cell, settings))}


def negative_prompt(cell: Cell, settings: Settings) -> str:
    """With `negative`, the subject that the style came with."""
    return f"a {cell.style.subject}" if settings.get("negative") else ""


def reading_style_words(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """A split whose style LoRA, used alone, reads the name of its style and not the prompt. `negative`: the negative prompt is then the
    subject that the style came with."""
    file = cache.split(cell.style, seed=cell.seed) / "style.safetensors"
    style = cache.drawer(Use(file, prompt=STYLE_NAME), negative=negative_prompt(cell, settings))
    return {**MAKERS[UNZIP](cache, cell, {}), "style": style}


def alone_by_role(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """A split each of whose LoRAs, used alone, leaves out the layers of the other role; together they act in all layers."""
    folder = cache.split(cell.content, seed=cell.seed)
    uses = {role: Use(folder / f"{role}.safetensors") for role in ROLES}
    return {**MAKERS[UNZIP](cache, cell, {}), **each_alone(cache, uses)}


def split_and_zipped(cache: TrainingCache, cell: Cell, settings: Settings) -> Drawers:
    """The content LoRA of one split and the style LoRA of another, merged by `zip`."""
    content = cache.split(cell.content, seed=cell.seed) / "content.safetensors"
    style = cache.split(cell.style, seed=cell.seed) / "style.safetensors"
    images = {"content": cache.picture(cell.content), "style": cache.picture(cell.style)}
    return {"both": cache.drawer(*cache.zipped(cell, content, style, images, **settings))}


IDEAS: Mapping[str, Settings] = {  # settings that are off by default, each against what the two LoRAs have in common
    "x0 loss": {"loss": "x0"},
    "style learnt again": {"style_steps": 150},
    "prior preserved": {"prior_weight": 0.5},
    "leak loss": {"leak_weight": 1.0},
    "windows": {"content_part": "0-0.7", "style_part": "0.28-1"},
    "more content alone": {"content_alone": 0.5},
}
# Every method of the verb `split` has a row in both tasks
MAKERS = {entry.name: separated(entry.name) for entry in ENTRIES if entry.verb == "split"}
TASKS: tuple[Task, ...] = ("separate", "recombine")
UNZIP, OFFICIAL = "unziplora", {"compat": "official", "column_ratio": 0.1}
# 2: the style LoRA reads the name of its style alone. 3: each leaves out the layers of the other role
VERSIONS = {("recombine", name): 3 for name in (UNZIP, "qr-split")}
UNSATURATED = {"loss_scale": 300.0}  # at which most adapters of `icons` are granted channels, as SDXL's are at 65536
ROWS = [
    Row("separate", "DreamBooth-LoRA", dreambooth, methods=("dreambooth",)),
    Row("recombine", "DreamBooth-LoRAs", dreambooth, methods=("dreambooth",)),
    Row("separate", "DreamBooth-LoRA, layers by role", dreambooth, {"apart": True}, methods=("dreambooth",)),
    Row("recombine", "DreamBooth-LoRAs, layers by role", dreambooth, {"apart": True}, methods=("dreambooth",)),
    *(
        Row(task, METHODS[name].title, make, methods=(name,), version=VERSIONS.get((task, name), 1))
        for task in TASKS
        for name, make in MAKERS.items()
    ),
    *(
        Row(task, f"UnZipLoRA, official{name}", MAKERS[UNZIP], {**OFFICIAL, **more}, methods=(UNZIP,))
        for task in TASKS
        for name, more in (
            ("", {}),  # at SDXL's loss scale, where the count is saturated on a base as small as `icons`
            (", loss scale 300", UNSATURATED),
            (
                ", loss scale 300, our ratio",
                {**UNSATURATED, "column_ratio": base_defaults("icons")[UNZIP]["column_ratio"]},
            ),
        )
    ),
    Row("separate", "UnZipLoRA, layers by role", alone_by_role, methods=(UNZIP,)),
    Row("recombine", "UnZipLoRA, zipped", split_and_zipped, methods=(UNZIP, "ziplora")),
    Row(
        "recombine",
        "ConsisLoRA, guided",
        recombined,
        {"method": "consislora", "one_prompt": True, "guided": True},
        methods=("consislora",),
    ),
    *(
        Row("separate", f"ablation: UnZipLoRA, {name}", reading_style_words, settings, True, (UNZIP,))
        for name, settings in (
            ("style words", {}),
            ("style words, the style's subject as negative prompt", {"negative": True}),
        )
    ),
    *(
        Row("recombine", f"ablation: UnZipLoRA, {name}", recombined, settings, True, (UNZIP,))
        for name, settings in (
            ("one prompt", {"one_prompt": True}),
            ("own prompts, the rest subtracted", {"less": 0.3}),
            ("one prompt, the rest subtracted", {"one_prompt": True, "less": 0.3}),
            ("own prompts, guided", {"guided": True}),
            ("own prompts", {}),
            ("own prompts, layers by role", {"apart": True}),
            ("style words, all layers", {"style_words": True}),
            ("the style's subject as negative prompt", {"style_words": True, "negative": True}),
        )
    ),
    *(
        Row(
            task,
            f"ablation: {METHODS[name].title}, {idea}",
            MAKERS[name],
            settings,
            True,
            (name,),
            VERSIONS.get((task, name), 1),
        )
        for task in TASKS
        for name, ideas in ((UNZIP, tuple(IDEAS)), ("blora", ("x0 loss",)))
        for idea, settings in IDEAS.items()
        if idea in ideas
    ),
    *(
        Row(
            task,
            f"ablation: {METHODS[name].title}, blocks as measured",
            MAKERS[name],
            {"blocks": "icons"},
            True,
            (name,),
        )
        for task in TASKS
        for name in ("blora", "consislora")  # by default they train in SDXL's blocks
    ),
    *(
        Row("separate", f"ablation: {name}", MAKERS[UNZIP], settings, ablation=True, methods=(UNZIP,))
        for name, settings in (
            ("no column separation", {"column_separation": False}),
            ("no block separation", {"block_separation": False}),
            ("no loss for content alone", {"content_alone": 0.0}),
            ("UnZipLoRA, segments", {"segments": True}),  # on bases with joint attention only; other bases refuse it
        )
    ),
]
