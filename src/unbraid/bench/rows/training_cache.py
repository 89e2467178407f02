"""Everything that rows train or derive, stored in one folder, so that rows share it and a killed run repeats nothing.

Every training and every derived file is made once: its name contains a hash of what it depends on. A training is a job folder.
Workers that share the cache, on one machine or on many, lock and lease what they make; the others wait for it. Pictures are not
locked: two workers that draw the same one at a moment write the same."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from unbraid.bases.base import Base, load
from unbraid.bases.presets import Loading
from unbraid.bench.rows.cost import Cost, counted, measured
from unbraid.bench.rows.version import DRAWING, MERGING, base_digest, versions
from unbraid.bench.truth.tasks import Cell, Item, Scale, content_prompt, joint_prompt, style_prompt
from unbraid.bench.truth.truths import TRAINED, Truth
from unbraid.common.atomic import atomic, sha256
from unbraid.images import sheets
from unbraid.images.crop import open_image
from unbraid.methods import METHODS
from unbraid.runs import folder
from unbraid.runs.api import learn_job, split_job, zip_job
from unbraid.runs.job import Job
from unbraid.runs.job_folder import write_job
from unbraid.runs.lease import AtWorkError
from unbraid.runs.options import SplitOptions, ZipOptions
from unbraid.runs.run import run
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import Sampling, StyleGuidance, Use, render

POLL = 0.5  # seconds between looks at a file that another worker makes
Drawer = Callable[[Item, Sequence[int]], list[Image.Image]]  # (item, seeds) → one picture per seed


@dataclass
class TrainingCache:
    """The trainings and files of one base, in the folder `work`. `used` collects the cost of each that was requested since the last
    call of `spent`, whether it was made now or found. `subjects` and `partners` are a user's own pictures, if there are any. `waits`:
    what to do about a training that another worker is at: wait, or else raise AtWorkError."""

    work: Path
    scale: Scale
    base_name: str = "icons"
    used: dict[Path, Cost] = field(default_factory=dict)
    subjects: Mapping[str, Sequence[Truth]] = field(default_factory=dict)  # subject → its pictures
    partners: Mapping[str, Sequence[tuple[Truth, str]]] = field(
        default_factory=dict
    )  # kind of module → (picture, prompt)
    waits: bool = True
    parts: str = ""  # a folder or hub id with what a transformer's single file lacks

    @cached_property
    def base(self) -> Base:
        """The base, loaded when it is first used."""
        return load(self.base_name, loading=Loading(parts=self.parts))

    def picture(self, truth: Truth, name: str = "") -> Path:
        """A true picture as a PNG file."""
        file = self.work / "inputs" / f"{name or slug(str(truth))}.png"
        return file if file.exists() else sheets.save_image(truth.image, file)

    def captioned(self, truths: Sequence[tuple[Truth, str]], name: str) -> Path:
        """A folder of true pictures, each with its prompt in a text file."""
        for i, (truth, text) in enumerate(truths):
            file = self.picture(truth, f"{slug(name)}/{i}-{slug(str(truth))}")
            with atomic(file.with_suffix(".txt")) as part:
                part.write_text(text)
        return self.work / "inputs" / slug(name)

    def subject(self, name: str) -> Sequence[Truth]:
        """The pictures of a subject: the user's own, or those of the four artists whose styles the base knows."""
        return self.subjects.get(name) or [Truth(name, word) for word in TRAINED]

    def contents(self, cell: Cell) -> list[Path]:
        """The pictures of a cell's subject as files in one folder."""
        folder = f"{slug(cell.subject)}-pictures"
        return [self.picture(truth, f"{folder}/{truth.style}") for truth in self.subject(cell.subject)]

    def train(self, job: Job) -> Path:
        """Run a job to its end, or resume it, and return its folder. `job.out` is ignored: the folder is in this cache."""
        settings = {**job.settings, **self.scale.training.get(job.method, {})}
        job = replace(job, settings=settings, extras=replace(job.extras, previews=0))
        out = self.work / "made" / f"{job.method}-{self._key(job)}"
        cost_file = out / "cost.json"

        def make() -> None:
            resumed, cost, todo = folder.begun(out), self._counted(job), replace(job, out=out)
            if not resumed:
                write_job(todo)
            with measured(cost):
                for _ in run(todo, resume=resumed):
                    pass
            # a resumed training has no total time: how long it ran before it was killed is unknown
            write_json(cost_file, {**asdict(cost), "seconds": None if resumed else cost.seconds})

        self._once(cost_file, make, self.waits)
        stored = json.loads(cost_file.read_text())
        self.used[out] = Cost(**{**stored, "seconds": stored["seconds"] or 0.0})
        return out

    def derive(self, name: str, sources: Iterable[Path], write: Callable[[Path], Any], *settings: Any) -> Path:
        """A file that `write(path)` makes from `sources`. `name` and `settings` must identify what `write` does."""
        key = short(name, [sha256(one) for one in sources], settings, MERGING)
        out = self.work / "made" / f"{slug(name)}-{key}.safetensors"
        cost_file = out.with_suffix(".json")

        def make() -> None:
            cost = Cost()
            with measured(cost):
                write(out)
            write_json(cost_file, asdict(cost))

        self._once(cost_file, make)
        self.used[cost_file] = Cost(**json.loads(cost_file.read_text()))
        return out

    def search(self, name: str, sources: Iterable[Path], find: Callable[[], list[float]]) -> list[float]:
        """Numbers that `find` computes from `sources`, such as tuned weights."""
        key = short(name, [sha256(one) for one in sources], versions(()))
        file = self.work / "made" / f"{slug(name)}-{key}.json"

        def make() -> None:
            cost, used = Cost(), dict(self.used)
            with measured(cost):
                values = find()
            self.used = used  # the LoRAs that were loaded during the search are not part of the result
            write_json(file, {"values": values, "cost": asdict(cost)})

        self._once(file, make)
        stored = json.loads(file.read_text())
        self.used[file] = Cost(**stored["cost"])
        return stored["values"]

    def plain(self, item: Item, seed: int) -> Image.Image:
        """What the base draws for an item without any LoRA."""
        key = short(item.prompt, seed, self.scale.steps, base_digest(self.base_name), DRAWING)
        file = self.work / "plain" / f"{key}.png"
        if not file.exists():
            (drawn,) = render(self.base, item.prompt, sampling=self._sampling((seed,)))
            sheets.save_image(drawn, file)
        return open_image(file)

    def _opened(self) -> dict[str, Any]:
        """The options of a training with which the base is opened."""
        return {"base": self.base_name, "parts": self.parts}

    def learn(self, images: Path | list[Path], prompt: str, seed: int, **settings: Any) -> Path:
        """The file of a DreamBooth-LoRA."""
        job = learn_job(images, prompt=prompt, seed=seed, **{**self._opened(), **settings})
        return self.train(job) / "lora.safetensors"

    def learnt(self, cell: Cell) -> tuple[Path, Path]:
        """The two DreamBooth-LoRAs that most rows of `combine` start from: one of the subject's pictures, one of the style's."""
        content = self.learn(self.contents(cell), content_prompt(cell.subject), cell.seed)
        return content, self.learn(self.picture(cell.style), style_prompt(cell.style), cell.seed)

    def split(self, picture: Truth, method: str = "unziplora", **options: Unpack[SplitOptions]) -> Path:
        """The folder of a split of one picture."""
        given: Any = {**self._opened(), **options}
        words = {"subject": picture.subject, "style": picture.style}
        return self.train(split_job(self.picture(picture), method=method, **words, **given))

    def zipped(
        self, cell: Cell, content: Path, style: Path, images: Mapping[str, Path], **options: Unpack[ZipOptions]
    ) -> tuple[Use, Use]:
        """A content LoRA and a style LoRA, merged by `zip`, ready to be drawn with."""
        prompts = {"both": joint_prompt(cell.subject, cell.style.style)}
        given: Any = {**self._opened(), "seed": cell.seed, **options}
        folder = self.train(zip_job(content, style, images=images, prompts=prompts, **given))
        return Use(folder / "content.safetensors"), Use(folder / "style.safetensors")

    def drawer(
        self, *uses: Use, styles: Sequence[Use] = (), combine: Combine = "sum", suffix: str = "", negative: str = ""
    ) -> Drawer:
        """A function that draws with these LoRA files. `styles`: files for style guidance. `suffix` is appended to the prompt.
        `negative`: the negative prompt."""
        self.used |= {use.file: Cost(file=use.file.stat().st_size) for use in (*uses, *styles)}

        def draw(item: Item, seeds: Sequence[int]) -> list[Image.Image]:
            prompt, sampling = item.prompt + suffix, self._sampling(seeds, negative)
            return render(self.base, prompt, uses, combine=combine, styles=StyleGuidance(styles), sampling=sampling)

        return draw

    def _sampling(self, seeds: Sequence[int], negative: str = "") -> Sampling:
        return Sampling(self.scale.guidance, self.scale.steps, seeds=seeds, negative=negative)

    def spent(self) -> Cost:
        """The cost of everything in `used`, which is then emptied."""
        total = sum(self.used.values(), Cost())
        self.used.clear()
        return total

    def _counted(self, job: Job) -> Cost:
        """FLOPs and trained parameters. They do not depend on the content of the pictures, so equal jobs share one count."""
        shapes = {role: len(some) for role, some in job.data.images.items()}
        file = self.work / "counts" / f"{job.method}-{short(shapes, dict(job.settings), versions([job.method]))}.json"
        if not file.exists():
            write_json(file, asdict(counted(job)))
        return Cost(**json.loads(file.read_text()))

    def _key(self, job: Job) -> str:
        """A hash of everything that the training's result depends on."""
        images = {role: [sha256(file) for file in files] for role, files in job.data.images.items()}
        loras = {role: sha256(file) for role, file in job.data.loras.items()}
        texts = [text for files in job.data.images.values() for file in files if (text := job.data.captions.get(file))]
        inputs = (job.method, dict(job.data.words), images, loras, texts, dict(job.settings), job.seed)
        # Defaults are left out, so that a new option leaves earlier trainings valid; a new default needs a new version of the method
        options = job.data.training.given()
        inputs = (*inputs, options) if options else inputs
        return short(inputs, base_digest(self.base_name), METHODS[job.method].version)

    def _once(self, file: Path, make: Callable[[], None], waits: bool = True) -> None:
        """Make a file that is not there. If another worker is making it: wait for it, or else raise AtWorkError."""
        lock = self.work / "locks" / slug(str(file.relative_to(self.work)))
        while not file.exists():
            try:
                with folder.locked(lock, shared=True):
                    if not file.exists():
                        make()
            except AtWorkError:
                if not waits:
                    raise
                time.sleep(POLL)


def write_json(file: Path, value: Any) -> None:
    with atomic(file) as part:
        part.write_text(json.dumps(value))


def short(*values: Any) -> str:
    """The first 16 hexadecimal digits of a hash of values that JSON can express."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:16]


def slug(name: str) -> str:
    """A name as part of a file name: lower case, everything but letters and digits replaced by `-`."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
