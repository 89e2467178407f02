"""What to do with the LoRAs of a finished run: their trigger words, a strength, and the next command."""

import shlex
from collections.abc import Iterator

from unbraid.core.selectors import measured_roles
from unbraid.methods import METHODS
from unbraid.runs.job import RARE, Job, metadata, prompts_of

SUBJECT = "teapot"  # what the suggested command draws in a new style


def next_steps(job: Job) -> Iterator[str]:
    """Lines for the user, one per LoRA and one with a command; none for a module, which `make` needs first."""
    texts, entry = prompts_of(job), METHODS[job.method]
    stems = entry.outputs(job.settings)
    if "module" in stems:
        yield f"next: unbraid make {job.out} OTHER-MODULE --out LORA-FOLDER"
        return
    for stem, output in stems.items():
        found = metadata(job, 0, stem, texts[output.prompt], texts, None)
        words = found.get("modelspec.trigger_phrase", texts[output.prompt])
        yield f"{stem}.safetensors: strength 1 as trained, try 0.6 to 1.2; trigger words: {words}"
    yield f"next: unbraid generate {_drawing(job, texts, list(stems))}"


def _drawing(job: Job, texts: dict[str, str], stems: list[str]) -> str:
    """The arguments of a command that shows what the LoRAs have learnt."""
    style, base = job.data.words.get("style", ""), [] if job.base == "icons" else ["--base", job.base]
    file = {stem: str(job.out / f"{stem}.safetensors") for stem in stems}
    if METHODS[job.method].verb == "pair":
        prompt = f"a {SUBJECT}" if style else texts["both"]
        use = ["--style-guidance", file["style"]]
    elif "style" in stems and METHODS[job.method].prompts:
        prompt, use = f"a {SUBJECT} in {style} style", ["--lora", file["style"]]
        use += ["--lora-role", "style"] if measured_roles(job.base) else []
    else:
        prompt, use = texts.get("both", f"a {RARE}"), [word for one in file.values() for word in ("--lora", one)]
    return shlex.join(["--prompt", prompt, *use, *base, "--n", "4", "--out", str(job.out / "drawn-by-it")])
