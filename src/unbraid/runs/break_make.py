"""Break-for-Make's verbs: learn content and style modules separately, then join any two (`unbraid.methods.b4m`)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from unbraid.bases.base import load
from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.files.formats.metadata import card
from unbraid.files.formats.sources import json_object
from unbraid.files.lora_file import read, write
from unbraid.images import sheets
from unbraid.images.captions import captions_of
from unbraid.images.folders import Found, look
from unbraid.images.given import Source, as_file
from unbraid.methods.b4m import CUT, KINDS, Cut, Kind
from unbraid.runs.api import finish, finished, job
from unbraid.runs.job import Job
from unbraid.runs.options import BreakOptions, MakeOptions
from unbraid.runs.preferences import base_for
from unbraid.runs.run_options import separate
from unbraid.runs.settings import documented, resolve
from unbraid.sampling.render import Sampling, render
from unbraid.sampling.uses import Use, own_prompt


@dataclass(frozen=True)
class Module:
    """A file that `break` wrote."""

    path: Path
    kind: Kind
    base: str
    family: Any
    prompt: str
    cut: Mapping[str, Any]
    loras: Mapping[str, Lora]


@documented("break")
def break_job(
    images: Source | Sequence[Source],
    *,
    kind: Kind,
    prompt: str,
    partners: str | Path | None = None,
    method: str = "break",
    **options: Unpack[BreakOptions],
) -> Job:
    """Images of one content or style → `module.safetensors`.

    Learns the module from images under `prompt`. `partners`: a folder of pictures of the other kind, each with
    its own prompt in NAME.txt; where there are more than are shown at a time, they take turns."""
    if not options.get("metadata", True):
        raise UsageError(
            "a module needs its metadata", "--no-metadata", "`make` reads its settings there; leave it out."
        )
    own = [as_file(one) for one in ([images] if isinstance(images, str | Path | Image.Image) else images)]
    run_options, settings = separate(options)
    run_options["out"] = run_options.get("out") or Path("runs") / f"{own[0].stem}-{kind}"
    todo = job({"own": own}, {"prompt": prompt}, {**settings, "kind": kind}, method=method, **run_options)
    wanted, found = todo.settings["partner_count"], look(Path(partners)) if partners else Found(())
    files = found.files
    if len(files) < wanted:
        other = "style" if kind == "content" else "content"
        fix = f"Give --partners DIR, pictures of {other}s with NAME.txt each; or --set partner_count={len(files)}."
        raise UsageError(f"{len(files)} partner images, {wanted} at every step", partners or "--partners", fix)
    captions = {file: "\n".join(captions_of(file)) for file in files}
    for file, text in captions.items():
        if not text:
            what = "a partner image without a prompt of its own"
            raise UsageError(what, file, f"Write it to {file.with_suffix('.txt').name}: a fish in ink style.")
    roles = {f"partner{i + 1}": tuple(files[i::wanted]) for i in range(wanted)}
    prompts = {file: text for file, text in captions.items() if text and wanted}
    data = replace(todo.data, images={**todo.data.images, **roles}, captions=prompts)
    return replace(todo, data=data, notes=todo.notes + found.unused)


break_module = finished(break_job)
break_module.__name__ = "break_module"


@documented("make")
def make_job(
    content: str | Path,
    style: str | Path,
    *,
    fine_tune: int | None = None,
    images: Mapping[str, str | Path] | None = None,
    prompt: str = "",
    method: str = "make",
    **options: Unpack[MakeOptions],
) -> Job:
    """A content and a style module → one LoRA, `merged.safetensors`, by training both together.

    `fine_tune`: steps; default: the base's own number. `images`: role (content, style) → the pictures that it was learnt from;
    without them it draws its own. `prompt`: of both together, for early stopping and for looking at."""
    pair = matching(content, style)
    if taken := [key for key in CUT if key in options]:
        raise UsageError(f"{taken[0]!r} is the modules' own", "make", "Leave it out.")
    words = {module.kind: module.prompt for module in pair}
    words["both"] = prompt or together(*pair)
    found = {role: [where] for role, where in (images or {}).items()}
    loras = {module.kind: module.path for module in pair}
    run_options, settings = separate(options)
    run_options["out"] = run_options.get("out") or _folder(*pair)
    settings |= dict(pair[0].cut) if fine_tune is None else {**pair[0].cut, "fine_tune": fine_tune}
    return job(found, words, settings, method=method, loras=loras, **run_options)


@documented("make")
def make(
    content: str | Path,
    style: str | Path,
    *,
    fine_tune: int | None = None,
    images: Mapping[str, str | Path] | None = None,
    prompt: str = "",
    method: str = "make",
    **options: Unpack[MakeOptions],
) -> Path:
    """A content and a style module → one LoRA; returns `merged.safetensors` in the folder `out`.

    At once, or fine-tuned as in `make_job`, which is the default where there are `images`."""
    if trains(fine_tune, images, separate(options)[1]):
        job = make_job(content, style, fine_tune=fine_tune, images=images, prompt=prompt, method=method, **options)
        return finish(job) / "merged.safetensors"
    folder = options.get("out") or _folder(*matching(content, style))
    return join(content, style, Path(folder) / "merged.safetensors")


def trains(fine_tune: int | None, images: Mapping[str, str | Path] | None, settings: Mapping[str, object]) -> bool:
    """Whether `make` trains: for `fine_tune` steps if they are given, else only where there are images.

    UsageError for settings if it does not: they would have no effect."""
    if fine_tune or (fine_tune is None and images):
        return True
    if settings:
        name, steps = next(iter(settings)), settings.get("steps", 300)
        what = f"the modules are joined without training, where {name!r} has no effect"
        raise UsageError(what, "make", f"Give --fine-tune {steps}, or leave it out.")
    return False


def _folder(content: Module, style: Module) -> Path:
    """The default folder for the LoRA that is made of two modules."""
    return Path("runs") / f"{content.path.parent.name}-{style.path.parent.name}"


def join(content: str | Path, style: str | Path, out: Path) -> Path:
    """Join two modules to one LoRA file without training: down factors of the content, up factors of the style."""
    pair = matching(content, style)
    cut = Cut(**pair[0].cut)
    first, second = (module.loras for module in pair)
    if first.keys() != second.keys():
        name = sorted(first.keys() ^ second.keys())[0]
        raise UsageError("only one of the modules has this layer", name, "Break both on one base.")
    joined = {name: cut.joined(first[name], second[name], name) for name in first}
    prompt = together(*pair)
    metadata = {
        **card(out.parent.name, prompt, "Content and style"),
        "unbraid.method": "make",
        "unbraid.prompt": prompt,
        "unbraid.base": pair[0].base,
        "modelspec.merged_from": ", ".join(module.path.parent.name for module in pair),
    }
    write(out, joined, family=pair[0].family, metadata=metadata)
    return out


def matching(content: str | Path, style: str | Path) -> tuple[Module, Module]:
    """Open a content and a style module. UsageError unless they fit: the same base, and the same settings in `CUT`."""
    first, second = opened(content), opened(style)
    if first.path.resolve() == second.path.resolve():
        raise UsageError("the same module twice", first.path, "Give a content module, then a style module.")
    for module, kind in ((first, "content"), (second, "style")):
        if module.kind != kind:
            raise UsageError(f"this is a {module.kind} module", module.path, f"A {kind} module goes there.")
    where = f"{first.path} and {second.path}"
    if first.base != second.base:
        raise UsageError(
            f"modules of different bases, {first.base} and {second.base}", where, "Break both on one base."
        )
    for key in CUT:
        if first.cut[key] != second.cut[key]:
            what = f"modules of different {key}, {first.cut[key]} and {second.cut[key]}"
            raise UsageError(what, where, "Break both with the same settings.")
    return first, second


def together(content: Module, style: Module) -> str:
    """The joint prompt: `a sks fox` and `a cat in ink style` give `a sks fox in ink style`."""
    found = re.search(r"in [^,]+ style\b", style.prompt)
    return f"{content.prompt} {found[0]}" if found else f"{content.prompt}, {style.prompt}"


def opened(path: str | Path) -> Module:
    """Read a module file that `break` wrote, or the one in a run folder. UsageError if it is none."""
    path = Path(path) / "module.safetensors" if Path(path).is_dir() else Path(path)
    file = read(path)
    settings = json_object(file.metadata.get("unbraid.settings", ""))
    if file.metadata.get("unbraid.method") != "break" or settings.get("kind") not in KINDS:
        raise UsageError("this is not a module", path, "`unbraid break` makes them; other LoRAs: merge, or zip.")
    base = file.metadata.get("unbraid.base", "")
    missing = [key for key in CUT if key not in settings] + ["base"] * (not base)
    if missing:
        raise UsageError(f"a module that does not record its {missing[0]}", path, "Make it anew with `unbraid break`.")
    cut = {key: settings[key] for key in CUT}
    try:
        resolve("break", "icons", None, cut)
    except UsageError as error:
        raise UsageError(
            f"a module with a wrong setting: {error.what}", path, "Make it anew with `unbraid break`."
        ) from error
    return Module(path, settings["kind"], base, file.family, own_prompt(path, file), cut, file.modules)


def matrix(
    contents: Sequence[str | Path], styles: Sequence[str | Path], out: Path, *, base: str = "", seed: int = 0
) -> Iterator[Path]:
    """Join every content with every style: N × M files from N + M trainings, and a sheet of what they draw.

    Yields the files."""
    rows, model = [], load(base or base_for(opened(one).path for one in (*contents, *styles)))
    for content in contents:
        row: list[tuple[str, Image.Image]] = []
        for style in styles:
            first, second = matching(content, style)
            name = f"{_name(first)}+{_name(second)}"
            file = join(content, style, out / f"{name}.safetensors")
            yield file
            (image,) = render(model, together(first, second), [Use(file)], sampling=Sampling(seeds=(seed,)))
            row.append((name, image))
        rows.append((_name(opened(content)), row))
    yield sheets.save_image(sheets.contact_sheet(rows), out / "matrix.png")


def _name(module: Module) -> str:
    return module.path.parent.name if module.path.stem == "module" else module.path.stem
