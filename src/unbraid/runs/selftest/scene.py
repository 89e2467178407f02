"""What the rows of `unbraid selftest` work with: pictures, a base, LoRAs of the shortest runs that there are, and comparisons."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image, ImageOps

from unbraid.bases.base import Base, load
from unbraid.common.errors import UsageError
from unbraid.files.lora_file import read
from unbraid.methods.entry import ROLES
from unbraid.runs import demo, pace, shortest
from unbraid.runs.break_make import join
from unbraid.runs.job import Job
from unbraid.runs.options import SplitOptions
from unbraid.runs.run import run
from unbraid.runs.selftest.compare import changes, differs, pixels
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, Use, render

PROMPT = "a sks fox in ink style"
WORDS = {"subject": "fox", "style": "ink"}
NEEDED = {"LoRA": shortest.FIRST, "module": "break"}  # kind of file → the method whose files others start from
PARTNERS = {"content": "a teapot in red style", "style": "a teapot"}
SAMPLING = Sampling(guidance=4.0, steps=3)


@dataclass(frozen=True)
class Found:
    """What a row has to say when it passed: a remark, and bytes of the device's memory, measured and estimated."""

    note: str = ""
    peak: int | None = None
    estimate: int | None = None


class Scene:
    """One base on one device, and a folder to work in. What several rows need is made once, when it is first needed."""

    def __init__(self, base: str, device: str, folder: Path) -> None:
        self.base, self.device, self.folder = base, device, folder
        self.common: dict[str, Any] = {"base": base, "previews": 0}
        self._made: dict[str, list[Path]] = {}
        self._model: Base | None = None

    @cached_property
    def before(self) -> Path:
        return demo.image()

    @cached_property
    def after(self) -> Path:
        with Image.open(self.before) as image:
            return _saved(ImageOps.invert(image.convert("RGB")), self.folder / "after.png")

    @cached_property
    def mask(self) -> Path:
        """The right half white."""
        with Image.open(self.before) as image:
            mask = Image.new("L", image.size)
        mask.paste(255, (mask.width // 2, 0, mask.width, mask.height))
        return _saved(mask, self.folder / "mask.png")

    def partners(self, kind: str) -> Path:
        file = _saved(Image.new("RGB", (256, 256), "red"), self.folder / "partners" / kind / "a.png")
        file.with_suffix(".txt").write_text(PARTNERS[kind])
        return file.parent

    def jobs(self, method: str, **options: Any) -> list[Job]:
        """The shortest runs of a method, in folders of its name."""
        wanted = shortest.needs(method)
        loras, modules = (self.loras(made) if kind in wanted else () for kind, made in NEEDED.items())
        material = shortest.Material(
            self.before,
            self.after,
            {kind: self.partners(kind) for kind in ROLES},
            WORDS["subject"],
            {file.stem: file for file in loras},
            {kind: file for kind in ROLES for file in modules if file.parent.name.endswith(kind)},
        )
        return shortest.jobs(method, material, self.folder, **{**self.common, **options})

    def split_job(self, name: str, **options: Unpack[SplitOptions]) -> Job:
        """The shortest split, in a folder of that name."""
        options["out"] = self.folder / name
        (job,) = self.jobs(shortest.FIRST, **options)
        return job

    def loras(self, method: str) -> list[Path]:
        """The files of a method. A training that failed is not repeated: the first row that needed it reports the error."""
        if method not in self._made:
            self._made[method] = []
            self._made[method] = SPECIAL[method](self) if method in SPECIAL else self.trained(*self.jobs(method))
        if not self._made[method]:
            raise UsageError(f"the LoRAs of {method} could not be made", "selftest", f"See the row {method}.")
        return self._made[method]

    def trained(self, *jobs: Job) -> list[Path]:
        self.make_room()
        events = [event for job in jobs for event in run(job, device=self.device)]
        return [event.file for event in events if event.file and event.file.suffix == ".safetensors"]

    @property
    def model(self) -> Base:
        """The base, for drawing."""
        if self._model is None:
            self._model = load(self.base, self.device)
        self._model.pipe.to(self._model.device)
        return self._model

    def make_room(self) -> None:
        """For a training, which loads the base for itself: the one that draws leaves the accelerator."""
        if self._model is not None and self._model.device.type != "cpu":
            self._model.pipe.to("cpu")
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()

    @cached_property
    def plain(self) -> np.ndarray:
        """What the stock pipeline draws without a LoRA."""
        return self.stock_picture()

    def stock_picture(self) -> np.ndarray:
        """By the diffusers pipeline alone."""
        pipe: Any = self.model.pipe
        size, rng = self.model.size, torch.Generator().manual_seed(0)
        given = {"height": size, "width": size, "num_inference_steps": SAMPLING.steps}
        given |= self.model.family.network.stock_arguments(pipe, SAMPLING.guidance)
        return pixels(pipe(PROMPT, **given, generator=rng).images[0])

    def picture(
        self,
        *files: Path,
        combine: Combine = "sum",
        styles: StyleGuidance = StyleGuidance(),
        inputs: ImageInputs = ImageInputs(),
    ) -> np.ndarray:
        """By `render`, with LoRAs at full strength."""
        uses = [Use(file) for file in files]
        return pixels(
            render(self.model, PROMPT, uses, combine=combine, styles=styles, sampling=SAMPLING, inputs=inputs)[0]
        )

    @contextmanager
    def loaded(self, path: Path) -> Iterator[None]:
        """A LoRA in the stock pipeline. UsageError if it left out any of the file's layers."""
        pipe: Any = self.model.pipe
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        try:
            part = self.model.family.network.part
            adapted = (name for name, _ in self.model.denoiser.named_modules() if _last(name) == "lora_A")
            there = {f"{part}.{name.removesuffix('.lora_A')}" for name in adapted}
            if there != (wanted := read(path).modules.keys()):
                what = f"diffusers uses {len(there & wanted)} of its {len(wanted)} layers"
                raise UsageError(what, path.name, f"Not, for example, {min(wanted ^ there)}.")
            yield
        finally:
            pipe.unload_lora_weights()


@contextmanager
def hurried(**values: float | int) -> Iterator[None]:
    """Constants of `unbraid.runs.pace`, for as long as a run takes that cannot wait: it saves every 20 s, and
    draws its sheet in 25 steps."""
    usual = {name: getattr(pace, name) for name in values}
    try:
        for name, value in values.items():
            setattr(pace, name, value)
        yield
    finally:
        for name, value in usual.items():
            setattr(pace, name, value)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def draws(scene: Scene, path: Path) -> None:
    """UsageError unless a LoRA file is whole and changes what the stock pipeline draws; without peft, what unbraid draws."""
    file = read(path)
    if file.family != scene.model.family.name or not all(np.isfinite(one).all() for one in changes(file)):
        raise UsageError(f"not a LoRA of {scene.model.family.name}, or with values that are not finite", path.name)
    if not find_spec("peft"):
        return differs(scene.picture(path), scene.plain, path.name)
    plain = scene.plain
    with scene.loaded(path):
        differs(scene.stock_picture(), plain, path.name)


def _saved(image: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def _learn(scene: Scene) -> list[Path]:
    """With previews: the VAE comes and goes while the UNet trains."""
    with hurried(PREVIEW_STEPS=SAMPLING.steps, SHEET_STEPS=SAMPLING.steps):
        return scene.trained(*scene.jobs("dreambooth", previews=1))


def _join(scene: Scene) -> list[Path]:
    content, style = scene.loras("break")
    return [join(content, style, scene.folder / "at-once" / "merged.safetensors")]


SPECIAL: Mapping[str, Callable[[Scene], list[Path]]] = {
    "blora": lambda scene: scene.trained(*scene.jobs("blora", lr=1e-1)),
    "dreambooth": _learn,
    "make at once": _join,
}
TRAININGS = (*shortest.in_order(), "make at once")
