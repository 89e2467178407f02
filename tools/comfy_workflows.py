"""Makes the ComfyUI workflows of examples/comfyui: style guidance with the LoRAs that `unbraid pair` writes.

`python -m tools.comfy_workflows` writes them in ComfyUI's API format, which its window opens, too; a test fails if they are out of
date. `--run RUN` takes the words from a run folder of `pair`, and `--out FOLDER` writes elsewhere. They use core nodes alone.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbraid.common.atomic import read_toml

OUT = Path(__file__).parent.parent / "examples" / "comfyui"
Link = tuple[str, int]  # a node, and which of its outputs
GUIDANCE = 4.0  # w: unbraid's --guidance


@dataclass(frozen=True)
class Words:
    """What a workflow draws, and with which files. `style_scale`: unbraid's `--style-guidance FILE:SCALE`; 1: as trained."""

    prompt: str = "a teapot"
    subject: str = "a sks dog"  # the prompt of the content LoRA
    style: str = "ink"
    style_scale: float = 1.0
    style_from: float = 0.8  # unbraid's --style-from: how much noise is left when the style begins to guide
    checkpoint: str = "sd_xl_base_1.0.safetensors"
    style_file: str = "style.safetensors"
    content_file: str = "content.safetensors"


@dataclass
class Workflow:
    """A graph of nodes in ComfyUI's API format: id → class, inputs (values, or links to outputs), title."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, title: str = "", **inputs: Any) -> str:
        """Add a node, and return its id. Inputs that are a `Link` are connections."""
        name = str(len(self.nodes) + 1)
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()}
        self.nodes[name] = {"class_type": kind, "inputs": given, "_meta": {"title": title or kind}}
        return name


def style_guidance(words: Words) -> Workflow:
    """Style guidance (arXiv 2405.01536, Eq. 10): e_u + w (e_c − e_u) + w_L (e_s − e_c), from the first step on.

    The same as `unbraid generate --prompt PROMPT --style-guidance style.safetensors:SCALE`."""
    flow = Workflow()
    checkpoint = flow.add("CheckpointLoaderSimple", ckpt_name=words.checkpoint)
    plain, styled, negative = _texts(flow, (checkpoint, 1), words.prompt, words.style)
    cond1 = flow.add("ConditioningSetProperties", "The style's LoRA, for this prompt alone", cond_NEW=styled,
                     strength=1.0, set_cond_area="default", hooks=_hook(flow, words))  # fmt: skip
    return _drawn(flow, words, (checkpoint, 0), ((cond1, 0), plain, negative), (checkpoint, 2))


def subject_and_style(words: Words) -> Workflow:
    """A content LoRA in the model, and the style's guidance once `style_from` of the noise is left. Before, cond1 is the plain
    prompt, so that cond1 − cond2 is zero.

    The same as `unbraid generate --prompt SUBJECT --lora content.safetensors --style-guidance style.safetensors:SCALE
    --style-from 0.8`."""
    flow = Workflow()
    checkpoint = flow.add("CheckpointLoaderSimple", ckpt_name=words.checkpoint)
    model = flow.add(
        "LoraLoaderModelOnly", "The subject", model=(checkpoint, 0), lora_name=words.content_file, strength_model=1.0
    )
    plain, styled, negative = _texts(flow, (checkpoint, 1), words.subject, words.style)
    begin = round(1 - words.style_from, 6)
    time = flow.add("ConditioningTimestepsRange", "When the style guides", start_percent=begin, end_percent=1.0)
    late = flow.add("ConditioningSetProperties", "The style's LoRA, for this prompt alone", cond_NEW=styled,
                    strength=1.0, set_cond_area="default", hooks=_hook(flow, words), timesteps=(time, 0))  # fmt: skip
    cond1 = flow.add("ConditioningSetPropertiesAndCombine", "Before: the plain prompt", cond=(late, 0), cond_NEW=plain,
                     strength=1.0, set_cond_area="default", timesteps=(time, 1))  # fmt: skip
    return _drawn(flow, words, (model, 0), ((cond1, 0), plain, negative), (checkpoint, 2))


def _texts(flow: Workflow, clip: Link, prompt: str, style: str) -> tuple[Link, Link, Link]:
    """The nodes of the plain prompt, the same with the style's words, and the negative prompt."""
    texts = {"Prompt": prompt, "Prompt and style": f"{prompt} in {style} style", "Negative prompt": ""}
    plain, styled, negative = (
        (flow.add("CLIPTextEncode", title, text=text, clip=clip), 0) for title, text in texts.items()
    )
    return plain, styled, negative


def _hook(flow: Workflow, words: Words) -> Link:
    return flow.add("CreateHookLoraModelOnly", "The style", lora_name=words.style_file, strength_model=1.0), 0


def _drawn(flow: Workflow, words: Words, model: Link, conditions: tuple[Link, Link, Link], vae: Link) -> Workflow:
    """Add the guider and what draws with it."""
    cond1, cond2, negative = conditions
    guider = flow.add("DualCFGGuider", "cfg_conds: strength of the style", model=model, cond1=cond1, cond2=cond2, negative=negative,
                      cfg_conds=GUIDANCE * words.style_scale, cfg_cond2_negative=GUIDANCE, style="regular")  # fmt: skip
    return finished(flow, model, (guider, 0), vae)


def finished(flow: Workflow, model: Link, guider: Link, vae: Link, sigmas: Link | None = None) -> Workflow:
    """Add what draws with a guider. `sigmas`: if there is a node for them already."""
    noise = flow.add("RandomNoise", noise_seed=0)
    sampler = flow.add("KSamplerSelect", sampler_name="euler")
    sigmas = sigmas or scheduler(flow, model)
    latent = flow.add("EmptyLatentImage", width=1024, height=1024, batch_size=1)
    drawn = flow.add(
        "SamplerCustomAdvanced",
        noise=(noise, 0),
        guider=guider,
        sampler=(sampler, 0),
        sigmas=sigmas,
        latent_image=(latent, 0),
    )
    picture = flow.add("VAEDecode", samples=(drawn, 0), vae=vae)
    flow.add("SaveImage", images=(picture, 0), filename_prefix="unbraid")
    return flow


def scheduler(flow: Workflow, model: Link) -> Link:
    return flow.add("BasicScheduler", model=model, scheduler="normal", steps=25, denoise=1.0), 0


WORKFLOWS: dict[str, Callable[[Words], Workflow]] = {
    "style_guidance.json": style_guidance,
    "subject_and_style.json": subject_and_style,
}


def of_run(run: Path) -> Words:
    """The words of a run of `pair`, whose folder's name is put before its files: copy them so into ComfyUI's `loras`."""
    recorded = read_toml(run / "run.toml", "Give a run folder of `unbraid pair`.")
    words = recorded["words"]
    return Words(
        f"a {words['subject']}",
        recorded["prompts"]["content"],
        words["style"],
        style_file=f"{run.name}_style.safetensors",
        content_file=f"{run.name}_content.safetensors",
    )


def text(flow: Workflow) -> str:
    return json.dumps(flow.nodes, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, make in WORKFLOWS.items():
        (given.out / name).write_text(text(make(of_run(given.run) if given.run else Words())), "utf-8")
