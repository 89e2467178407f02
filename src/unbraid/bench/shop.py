"""Where a benchmark's LoRAs are made: every training and every derived file once, whoever asks for it and however often the run
is killed. Processes that share a folder wait for each other's files, and do not make them twice."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image

from unbraid.bases.base import Base, load
from unbraid.bench.cost import Cost, counted, measured
from unbraid.bench.truth.tasks import Cell, Item, Scale, content_prompt, style_prompt
from unbraid.bench.truth.world import TRAINED, Truth
from unbraid.bench.version import DRAWING, MERGING, base_digest, versions
from unbraid.common.atomic import atomic, sha256
from unbraid.images import sheets as pictures
from unbraid.images.crop import open_image
from unbraid.methods import METHODS
from unbraid.runs.api import learn_job, split_job
from unbraid.runs.job import Job
from unbraid.runs.run import run
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import Use, render

Hand = Callable[[Item, Sequence[int]], list[Image.Image]]  # draws an item at some seeds


@dataclass
class Shop:
    """Makes what rows ask for, in `work`, on one base. `used`: what each thing cost that was asked for
    since the last look, once, however often it was."""

    work: Path
    scale: Scale
    base_name: str = "icons"
    used: dict[Path, Cost] = field(default_factory=dict)
    subjects: Mapping[str, Sequence[Truth]] = field(default_factory=dict)  # a user's own, and their pictures
    partners: Mapping[str, Sequence[tuple[Truth, str]]] = field(default_factory=dict)  # kind → with prompts, of a user

    @cached_property
    def base(self) -> Base:
        return load(self.base_name)

    def picture(self, truth: Truth, name: str = "") -> Path:
        """A true picture as a file."""
        file = self.work / "inputs" / f"{name or slug(str(truth))}.png"
        with self._lock(file.with_suffix(".lock")):
            if not file.exists():
                pictures.save_image(truth.image, file)
        return file

    def told(self, truths: Sequence[tuple[Truth, str]], name: str) -> Path:
        """A folder of true pictures, each with its own prompt in a text file."""
        for i, (truth, text) in enumerate(truths):
            file = self.picture(truth, f"{slug(name)}/{i}-{slug(str(truth))}")
            file.with_suffix(".txt").write_text(text)
        return self.work / "inputs" / slug(name)

    def subject(self, name: str) -> Sequence[Truth]:
        """The pictures of a subject, as four artists drew it, or as a user gave them."""
        return self.subjects.get(name) or [Truth(name, word) for word in TRAINED]

    def contents(self, cell: Cell) -> list[Path]:
        """The pictures of a cell's subject, in a folder of their own."""
        folder = f"{slug(cell.subject)}-pictures"
        return [self.picture(truth, f"{folder}/{truth.style}") for truth in self.subject(cell.subject)]

    def train(self, job: Job) -> Path:
        """Run a job (whose `out` does not matter) to its end; its folder."""
        job = replace(job, settings={**job.settings, **self.scale.training.get(job.method, {})}, previews=0)
        out = self.work / "made" / f"{job.method}-{self._key(job)}"
        told = out / "cost.json"
        with self._lock(out.with_suffix(".lock")):
            if not told.exists():
                resumed, cost = (out / "run.toml").exists(), self._counted(job)
                with measured(cost):
                    for _ in run(replace(job, out=out), resume=resumed):
                        pass
                # a training that was cut off has no time of its own: what came before the cut is not known
                write_json(told, {**asdict(cost), "seconds": None if resumed else cost.seconds})
        found = json.loads(told.read_text())
        self.used[out] = Cost(**{**found, "seconds": found["seconds"] or 0.0})
        return out

    def derive(self, name: str, sources: Iterable[Path], write: Callable[[Path], Any], *settings: Any) -> Path:
        """A file made of other files by `write`, which is given its path; `name` and `settings` say how."""
        key = short(name, [sha256(one) for one in sources], settings, MERGING)
        out = self.work / "made" / f"{slug(name)}-{key}.safetensors"
        told = out.with_suffix(".json")
        with self._lock(out.with_suffix(".lock")):
            if not told.exists():
                cost = Cost()
                with measured(cost):
                    write(out)
                write_json(told, asdict(cost))
        self.used[told] = Cost(**json.loads(told.read_text()))
        return out

    def found(self, name: str, sources: Iterable[Path], search: Callable[[], list[float]]) -> list[float]:
        """Numbers that are searched for once."""
        key = short(name, [sha256(one) for one in sources], versions(()))
        told = self.work / "made" / f"{slug(name)}-{key}.json"
        with self._lock(told.with_suffix(".lock")):
            if not told.exists():
                cost, used = Cost(), dict(self.used)
                with measured(cost):
                    values = search()
                self.used = used  # what the search drew with is no part of what it found
                write_json(told, {"values": values, "cost": asdict(cost)})
        found = json.loads(told.read_text())
        self.used[told] = Cost(**found["cost"])
        return found["values"]

    def plain(self, item: Item, seed: int) -> Image.Image:
        """What the base alone makes of an item."""
        key = short(item.prompt, seed, self.scale.steps, base_digest(self.base_name), DRAWING)
        file = self.work / "plain" / f"{key}.png"
        with self._lock(file.with_suffix(".lock")):
            if not file.exists():
                told = {"guidance": self.scale.guidance, "steps": self.scale.steps}
                (drawn,) = render(self.base, item.prompt, seeds=(seed,), **told)
                pictures.save_image(drawn, file)
        return open_image(file)

    def learnt(self, cell: Cell) -> tuple[Path, Path]:
        """The two DreamBooth-LoRAs that `combine` starts from: of the subject's pictures, and of the style's one."""
        content = learn_job(
            self.contents(cell), prompt=content_prompt(cell.subject), seed=cell.seed, base=self.base_name
        )
        style = learn_job(
            self.picture(cell.style), prompt=style_prompt(cell.style), seed=cell.seed, base=self.base_name
        )
        return self.train(content) / "lora.safetensors", self.train(style) / "lora.safetensors"

    def split(self, picture: Truth, seed: int, method: str = "unziplora", **settings: Any) -> Path:
        """One picture, split; the folder."""
        words = {"subject": picture.subject, "style": picture.style}
        options = {"method": method, "seed": seed, "base": self.base_name, **settings}
        return self.train(split_job(self.picture(picture), **words, **options))

    def hand(
        self, *uses: Use, styles: Sequence[Use] = (), combine: Combine = "sum", suffix: str = "", **options: Any
    ) -> Hand:
        """Draws with LoRA files; `suffix` is added to the prompt, `options` are those of `render`."""
        self.used |= {use.file: Cost(file=use.file.stat().st_size) for use in (*uses, *styles)}

        def draw(item: Item, seeds: Sequence[int]) -> list[Image.Image]:
            told = {"guidance": self.scale.guidance, "steps": self.scale.steps, **options}
            return render(self.base, item.prompt + suffix, uses, styles=styles, combine=combine, seeds=seeds, **told)

        return draw

    def spent(self) -> Cost:
        """What was used since the last time, summed up."""
        total = sum(self.used.values(), Cost())
        self.used.clear()
        return total

    def _counted(self, job: Job) -> Cost:
        """FLOPs and trained parameters, which do not depend on what the pictures show."""
        shapes = {role: len(some) for role, some in job.images.items()}
        told = self.work / "counts" / f"{job.method}-{short(shapes, dict(job.settings), versions([job.method]))}.json"
        if not told.exists():
            write_json(told, asdict(counted(job)))
        return Cost(**json.loads(told.read_text()))

    def _key(self, job: Job) -> str:
        images = {role: [sha256(file) for file in files] for role, files in job.images.items()}
        loras = {role: sha256(file) for role, file in job.loras.items()}
        texts = [text for files in job.images.values() for file in files if (text := job.captions.get(file))]
        told = (job.method, dict(job.words), images, loras, texts, dict(job.settings), job.seed)
        return short(told, base_digest(self.base_name), METHODS[job.method].version)

    def _lock(self, file: Path) -> FileLock:
        file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(file)


def write_json(file: Path, value: Any) -> None:
    with atomic(file) as part:
        part.write_text(json.dumps(value))


def short(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:16]


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
