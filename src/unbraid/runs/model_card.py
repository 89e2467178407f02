"""The model card of a run: what the Hugging Face hub shows of it (https://huggingface.co/docs/hub/model-cards)."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData

from unbraid.common.errors import printable
from unbraid.files.formats.blocks import Family
from unbraid.files.made_for import TITLES
from unbraid.methods import METHODS
from unbraid.runs.published import Published

HUB = "https://huggingface.co/"
OPENRAIL, CREATIVE = "openrail++", "creativeml-openrail-m"
# Hub id of a base → the licence that its own card has; for `other` also its name, and the file with its text
LICENCES: Mapping[str, tuple[str, ...]] = {
    "icons": ("apache-2.0",),
    "stabilityai/stable-diffusion-xl-base-1.0": (OPENRAIL,),
    "stabilityai/stable-diffusion-2-1": (OPENRAIL,),
    "stabilityai/stable-diffusion-2-1-base": (OPENRAIL,),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (CREATIVE,),
    "runwayml/stable-diffusion-v1-5": (CREATIVE,),
    "CompVis/stable-diffusion-v1-4": (CREATIVE,),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0",),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license", "LICENSE.md"),
    "stabilityai/stable-diffusion-3.5-medium": ("other", "stabilityai-ai-community", "LICENSE.md"),
    "stabilityai/stable-diffusion-3.5-large": ("other", "stabilityai-ai-community", "LICENSE.md"),
}
FAMILY_TAGS: Mapping[Family, tuple[str, ...]] = {
    "sdxl": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "sd15": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sd21": ("stable-diffusion", "stable-diffusion-diffusers"),
    "flux": ("flux", "flux-diffusers"),
    "sd3": ("sd3", "sd3-diffusers"),
}


@dataclass(frozen=True)
class Said:
    """What the user says about the repository: its hub name, and what replaces the run's own base and licence."""

    name: str
    license: str = ""
    base_model: str = ""


def model_card(run: Published, said: Said, pictures: Mapping[str, str]) -> ModelCard:
    """The card. `pictures`: file name in the repository → prompt.

    What is not known is left out: the base if it is not on the hub, the licence if the base's is not in `LICENCES`."""
    base = said.base_model or run.hub_base
    licence, *other = (said.license,) if said.license else LICENCES.get(base or run.base, ("",))
    module = METHODS[run.method].verb == "break"
    data = ModelCardData(
        base_model=base or None,
        library_name=None if module else "diffusers",
        license=licence or None,
        license_name=other[0] if other else None,
        license_link=f"{HUB}{base}/blob/main/{other[1]}" if other else None,
        pipeline_tag="text-to-image",
        tags=["text-to-image", *([] if module else ["diffusers", "lora", "template:sd-lora"]),
              *FAMILY_TAGS.get(run.family, ()), "unbraid", run.method],
        instance_prompt=run.prompt or None,
        widget=[{"text": text, "output": {"url": name}} for name, text in pictures.items()] or None,
    )  # fmt: skip
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(run, said, base)) + "\n")


def _body(run: Published, said: Said, base: str) -> Iterator[str]:
    entry = METHODS[run.method]
    kind = "Module" if entry.verb == "break" else "LoRA"
    where = f"[{base}]({HUB}{base})" if base else _base_in_words(run)
    yield from (f"# {said.name.partition('/')[2]}", "", "<Gallery />", "")
    yield f"{kind}{'s' if len(run.triggers) > 1 else ''} for {where}, made by unbraid with {entry.title} ({entry.paper})."
    yield from ("", "## Files and trigger words", "", "| file | trigger words |", "|---|---|")
    yield from (f"| `{file.name}` | {code(text)} |" for file, text in run.triggers.items())
    yield from ("", "## Use it", "")
    yield from _commands(run, said, base)
    if base and kind == "LoRA":
        yield from ("", "With diffusers:", "", "```python", *_diffusers(run, said, base), "```")
    yield from ("", "ComfyUI, A1111, Forge and InvokeAI load the files as they are.") if kind == "LoRA" else ()
    yield from ("", "## Training", "", "| | |", "|---|---|", f"| method | `{run.method}` |")
    yield from (f"| {key} | {run.settings[key]} |" for key in ("steps", "rank", "lr") if key in run.settings)


def _base_in_words(run: Published) -> str:
    if run.base == "icons":
        return "unbraid's embedded base `icons`"
    return f"a base model that is not on the hub ({TITLES.get(run.family, run.family)})"


def _commands(run: Published, said: Said, base: str) -> Iterator[str]:
    """The commands that fetch the files and draw with them."""
    local = said.name.partition("/")[2]
    files, entry = {file.stem: f"{local}/{file.name}" for file in run.triggers}, METHODS[run.method]
    more = ["--base", base] if base else []
    if entry.verb == "break":
        use = ["unbraid", "make", local, "OTHER-MODULE", "--out", "both"]
    elif entry.verb == "pair" and run.style and "style" in files:
        use = [
            "unbraid",
            "generate",
            "--prompt",
            "a teapot",
            "--style-guidance",
            files["style"],
            *more,
            "--out",
            "drawn.png",
        ]
    else:
        loras = [word for file in files.values() for word in ("--lora", file)]
        use = ["unbraid", "generate", "--prompt", run.prompt, *loras, *more, "--out", "drawn.png"]
    yield from ("```", f"hf download {said.name} --local-dir {local}", _fenced(shlex.join(use)), "```")


def _diffusers(run: Published, said: Said, base: str) -> Iterator[str]:
    names = [file.stem for file in run.triggers]
    yield from ("import torch", "from diffusers import AutoPipelineForText2Image", "")
    yield f'pipe = AutoPipelineForText2Image.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")'
    for name in names:
        yield f'pipe.load_lora_weights("{said.name}", weight_name="{name}.safetensors", adapter_name="{name}")'
    yield f"pipe.set_adapters({json.dumps(names)})"
    yield f"image = pipe({_fenced(json.dumps(run.prompt, ensure_ascii=False))}).images[0]"


def code(text: str) -> str:
    """Words of a user as code in a table of Markdown: one line, in which nothing ends the code or the cell."""
    return f"`{_fenced(text).replace('|', '/')}`"


def _fenced(text: str) -> str:
    return printable(text, 1000).replace("`", "'")
