"""The rows of `unbraid selftest`. Each is a function of the scene that raises for what does not work."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from unbraid.bases.presets import PRESETS
from unbraid.common.errors import UnsuitedError, UsageError
from unbraid.methods.entry import ROLES
from unbraid.runs.batch import run_many
from unbraid.runs.folder import STATE, read_events
from unbraid.runs.job import Job
from unbraid.runs.memory import estimate
from unbraid.runs.run import run
from unbraid.runs.selftest.compare import SEEN, apart, differs, pixels
from unbraid.runs.selftest.scene import PROMPT, SAMPLING, TRAININGS, Found, Scene, draws, hurried
from unbraid.sampling.canvas import Start
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import ImageInputs, StyleGuidance, Use
from unbraid.sampling.sweep import parse_sweep, sweep_sheet

# What rounding may do to one run computed in two ways: to its losses, relatively, in full and in half precision; and to its LoRAs,
# ‖ΔW − ΔW′‖ / ‖ΔW‖. AdamW's first steps have the size of the rate whatever the gradient's, so where rounding turns the sign of a
# small one that is a whole step: 0.01 to 0.16 in full precision on `icons`, 0.2 to 0.3 in bf16. Two seeds are 1.4 apart.
LOSSES, LOSSES_IN_HALF, ALIKE = 1e-3, 3e-2, 0.5


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    name: str
    function: Callable[[Scene], Found]


def checks(device: str) -> tuple[Check, ...]:
    """All rows for a device."""
    only_cuda = (Check("graphs", graphs),) if device.startswith("cuda") else ()
    return (*CHECKS, *only_cuda)


def trains(method: str, scene: Scene) -> Found:
    """A method from pictures to files, which the stock pipeline of the base loads whole and draws otherwise with."""
    try:
        files = scene.loras(method)
    except UnsuitedError as error:
        return Found(f"not for this base: {error.what}")
    for file in files:
        draws(scene, file)
    return Found("" if find_spec("peft") else "without peft: not loaded by diffusers")


def guided(scene: Scene) -> Found:
    """Plain guidance is that of the stock pipeline, without a LoRA and, where peft is there, with one."""
    (file,) = scene.loras("dreambooth")
    pairs = [(scene.picture(), scene.plain)]
    differs(with_lora := scene.picture(file), pairs[0][0], file.name)
    if find_spec("peft"):
        with scene.loaded(file):
            pairs.append((scene.stock_picture(), with_lora))
    gap = max(float(np.abs(ours - theirs).mean()) for ours, theirs in pairs)
    if gap > (limit := SEEN if scene.device == "cpu" else 2 * SEEN):
        what = f"{gap:.1f} of 255 levels from what diffusers draws, on average; {limit} is rounding"
        raise UsageError(what, "classifier-free")
    return Found(f"{gap:.2g} levels from diffusers' own")


def styled(scene: Scene) -> Found:
    style = scene.loras("pair")[0]
    differs(scene.picture(styles=StyleGuidance([Use(style)])), scene.picture(), style.name)
    return Found()


def swept(scene: Scene) -> Found:
    styles = StyleGuidance([Use(scene.loras("pair")[0])])
    pixels(sweep_sheet(scene.model, PROMPT, parse_sweep("style=0:1:2"), styles=styles, sampling=SAMPLING))
    return Found()


def combined(how: Combine, scene: Scene) -> Found:
    differs(scene.picture(*scene.loras("unziplora"), combine=how), scene.picture(), how)
    return Found()


def begun(masked: bool, scene: Scene) -> Found:
    (file,) = scene.loras("dreambooth")
    inputs = ImageInputs(start=Start(scene.before, 0.7, scene.mask if masked else None))
    plain = scene.picture(inputs=inputs)
    differs(scene.picture(file, inputs=inputs), plain, "the LoRA")
    if plain.shape == scene.picture().shape:
        differs(plain, scene.picture(), "the picture to begin with")
    return Found()


def edited(scene: Scene) -> Found:
    style = scene.loras("pair")[0]
    inputs = ImageInputs(edit=scene.before)
    kept, changed = (scene.picture(styles=StyleGuidance([Use(style, scale)]), inputs=inputs) for scale in (0.0, 1.0))
    differs(changed, kept, style.name)
    return Found()


def resumed(scene: Scene) -> Found:
    """A run that is stopped after a saved state, and goes on."""
    whole, cut = (scene.split_job(name, steps=4) for name in ("whole", "cut"))
    scene.trained(whole)
    with hurried(SAVE_EVERY=0.0):
        events = run(cut, device=scene.device)
        for event in events:
            if event.step and event.done == 3:
                break
        events.close()  # type: ignore[attr-defined]
    if not (cut.out / STATE).exists():
        raise UsageError("no state was saved", "resume")
    done = [event for event in run(cut, resume=True, device=scene.device) if event.step]
    if [event.done for event in done] != [3, 4]:
        raise UsageError(f"went on with steps {[event.done for event in done]}, not 3 and 4", "resume")
    return _alike([whole], [cut], scene, exact=scene.device == "cpu")


def batched(scene: Scene) -> Found:
    """Two runs together, and each alone."""
    alone, many = ([scene.split_job(f"{name}-{i}", seed=i) for i in range(2)] for name in ("alone", "many"))
    scene.trained(*alone)
    for _, event in run_many(many, at_once=2, device=scene.device):
        if isinstance(event, UsageError):
            raise event
    return _alike(alone, many, scene)


def _alike(one: Sequence[Job], other: Sequence[Job], scene: Scene, exact: bool = False) -> Found:
    """The same losses and LoRAs, bit for bit or but for rounding."""
    files = [
        (a.out / f"{role}.safetensors", b.out / f"{role}.safetensors") for a, b in _pairs(one, other) for role in ROLES
    ]
    gap = max(apart(*two) for two in files)
    losses = [[[event["loss"] for event in read_events(job.out)] for job in two] for two in _pairs(one, other)]
    off = max(abs(a - b) / abs(a) for two in losses for a, b in zip(*two, strict=True))
    half = torch.device(scene.device).type == "cuda"
    limits = (0.0, 0.0) if exact else (LOSSES_IN_HALF if half else LOSSES, ALIKE)
    if not (off <= limits[0] and gap <= limits[1]):
        what = (
            f"losses are {off:.2g} apart, relatively, and LoRAs {gap:.2g}; {limits[0]:g} and {limits[1]:g} are allowed"
        )
        raise UsageError(what, "comparison")
    return Found("bit for bit" if exact else f"losses {off:.1g} apart, LoRAs {gap:.1g}")


def _pairs(one: Sequence[Job], other: Sequence[Job]) -> list[tuple[Job, Job]]:
    return list(zip(one, other, strict=True))


def saved(preset: str, scene: Scene) -> Found:
    """Two steps within a preset; their peak is that of the second, when everything is there."""
    job = scene.split_job(f"vram-{preset}", vram=preset)
    scene.make_room()
    peak = None
    for event in run(job, device=scene.device):
        if event.step and scene.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated(scene.device)
            if event.done == 1:
                torch.cuda.reset_peak_memory_stats(scene.device)
    for role in ROLES:
        draws(scene, job.out / f"{role}.safetensors")
    return Found(peak=peak, estimate=estimate(job, torch.device(scene.device).type).total)


def graphs(scene: Scene) -> Found:
    """CUDA graphs against eager: the same LoRAs, and the time of a step."""
    with_graphs, eager = (scene.split_job(name, steps=20) for name in ("graphs", "eager"))
    eager = replace(eager, loading=replace(eager.loading, graphs=False))
    quick, slow = _timed(with_graphs, scene), _timed(eager, scene)
    found = _alike([eager], [with_graphs], scene)
    return replace(found, note=f"{1e3 * quick:.1f} ms a step, eager {1e3 * slow:.1f}; {found.note}")


def _timed(job: Job, scene: Scene) -> float:
    """Seconds per step of the second half."""
    scene.make_room()
    half, seconds, begin = job.settings["steps"] // 2, 0.0, 0.0
    for event in run(job, device=scene.device):
        if event.step and event.done in (half, 2 * half):
            torch.cuda.synchronize(scene.device)
            begin, seconds = time.perf_counter(), (time.perf_counter() - begin) / half
    return seconds


CHECKS = (
    *(Check(method, partial(trains, method)) for method in TRAININGS),
    Check("classifier-free", guided),
    Check("style guidance", styled),
    Check("sweep", swept),
    *(Check(how, partial(combined, how)) for how in ("k-lora", "switch", "composite")),
    Check("image to image", partial(begun, False)),
    Check("inpainting", partial(begun, True)),
    Check("edit", edited),
    Check("resume", resumed),
    Check("batch", batched),
    *(Check(f"vram {name}", partial(saved, name)) for name in PRESETS),
)
