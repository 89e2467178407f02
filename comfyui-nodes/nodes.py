"""The nodes, in ComfyUI's V3 schema."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.samplers
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from .adapters import Factors, Use, attached, modules_of
from .turns import WAYS, step_of, turns

CATEGORY = "unbraid"
Styles = io.Custom("UNBRAID_STYLES")
STRENGTH = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}


def lora_input(name: str) -> Any:
    return io.Combo.Input(name, options=folder_paths.get_filename_list("loras"))


def two_loras() -> list[Any]:
    """The inputs of a node that takes a model, a content and a style LoRA."""
    inputs = [io.Model.Input("model")]
    for role in ("content", "style"):
        inputs += [lora_input(f"{role}_name"), io.Float.Input(f"{role}_strength", **STRENGTH)]
    return inputs


def opened(model: Any, name: str) -> dict[str, Factors]:
    """A file of ComfyUI's folder `loras`, as path of a layer in `model.model` → factors."""
    tensors = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", name), safe_load=True)
    return modules_of(tensors, comfy.lora.model_lora_keys_unet(model.model, {}), name)


def with_uses(model: Any, uses_at: Callable[[float], Sequence[Use]]) -> Any:
    """A copy of a model patcher with LoRAs that may change from step to step. `uses_at`: the LoRAs at a sigma."""
    out = model.clone()
    inner = out.model_options.get("model_function_wrapper")

    def wrapper(apply_model: Any, given: Mapping[str, Any]) -> torch.Tensor:
        noisy, sigma, kinds = given["input"], given["timestep"], given["cond_or_uncond"]
        conditional = torch.tensor([kind == 0 for kind in kinds]).repeat_interleave(len(noisy) // len(kinds))
        with attached(out.model, uses_at(float(sigma.flatten()[0])), conditional):
            return inner(apply_model, given) if inner else apply_model(noisy, sigma, **given["c"])

    out.set_model_unet_function_wrapper(wrapper)
    return out


class UnbraidPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="UnbraidPair",
            display_name="Load split pair",
            category=CATEGORY,
            description="A content and a style LoRA. Each can read a prompt of its own in cross-attention.",
            inputs=[
                *two_loras(),
                io.Conditioning.Input("content_prompt", optional=True),
                io.Conditioning.Input("style_prompt", optional=True),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        content_name: str,
        content_strength: float,
        style_name: str,
        style_strength: float,
        content_prompt: Any = None,
        style_prompt: Any = None,
    ) -> Any:
        given = ((content_name, content_strength, content_prompt), (style_name, style_strength, style_prompt))
        uses = [Use(opened(model, name), strength, own and own[0][0]) for name, strength, own in given]
        return io.NodeOutput(with_uses(model, lambda sigma: uses))


class UnbraidTurns(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="UnbraidTurns",
            display_name="K-LoRA, or switch by step",
            category=CATEGORY,
            description="A content and a style LoRA that take turns: by layer and step (K-LoRA), or from step to step.",
            inputs=[
                *two_loras(),
                io.Combo.Input("way", options=list(WAYS)),
                io.Sigmas.Input("sigmas", tooltip="Those that the sampler gets: they say which step it is."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        content_name: str,
        content_strength: float,
        style_name: str,
        style_strength: float,
        way: str,
        sigmas: torch.Tensor,
    ) -> Any:
        plan = turns(way, opened(model, content_name), opened(model, style_name), len(sigmas) - 1)
        uses = [(Use(content, content_strength), Use(style, style_strength)) for content, style in plan]
        return io.NodeOutput(with_uses(model, lambda sigma: uses[step_of(sigmas, sigma)]))


@dataclass(frozen=True)
class Style:
    """One style of the guidance. `scale`: 1 is the style as it was trained. `start`: the part of the way that is done before."""

    name: str
    prompt: Any
    scale: float
    start: float


class UnbraidStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="UnbraidStyle",
            display_name="A style to guide with",
            category=CATEGORY,
            inputs=[
                lora_input("style_name"),
                io.Conditioning.Input(
                    "prompt", tooltip="The prompt with the words of the style: a teapot in ink style."
                ),
                io.Float.Input("scale", default=1.0, min=-5.0, max=5.0, step=0.01),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01),
                Styles.Input("more", optional=True),
            ],
            outputs=[Styles.Output()],
        )

    @classmethod
    def execute(
        cls, style_name: str, prompt: Any, scale: float, start_percent: float, more: tuple[Style, ...] = ()
    ) -> Any:
        return io.NodeOutput((*more, Style(style_name, prompt, scale, start_percent)))


class StyleGuider(comfy.samplers.CFGGuider):
    """e_u + w (e_c − e_u) + Σ w_i (e_i − e_c) (arXiv 2405.01536, Eq. 10), where w_i is w times the style's scale."""

    def begin(self, positive: Any, negative: Any, cfg: float, styles: Sequence[Style], model: Any) -> None:
        prompts = {"positive": positive, "negative": negative}
        self.inner_set_conds(prompts | {f"style{i}": style.prompt for i, style in enumerate(styles)})
        self.set_cfg(cfg)
        sampling = model.get_model_object("model_sampling")
        self.styles = [
            (
                f"style{i}",
                Use(opened(model, style.name)),
                cfg * style.scale,
                float(sampling.percent_to_sigma(style.start)),
            )
            for i, style in enumerate(styles)
        ]

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> torch.Tensor:
        def predict(*names: str) -> Any:
            conds = [self.conds[name] for name in names]
            return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options or {})

        main, blank = predict("positive", "negative")
        out = blank + self.cfg * (main - blank)
        for name, use, weight, start in self.styles:
            if weight and float(timestep.flatten()[0]) <= start:
                with attached(self.inner_model, [use]):
                    (styled,) = predict(name)
                out = out + weight * (styled - main)
        return out


class UnbraidStyleGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="UnbraidStyleGuider",
            display_name="Style guidance",
            category=CATEGORY,
            description="Guidance in which each style has a term of its own: the base decides the composition.",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Float.Input("cfg", default=4.0, min=0.0, max=100.0, step=0.1),
                Styles.Input("styles"),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, model: Any, positive: Any, negative: Any, cfg: float, styles: tuple[Style, ...]) -> Any:
        guider = StyleGuider(model)
        guider.begin(positive, negative, cfg, styles, model)
        return io.NodeOutput(guider)


NODES = [UnbraidPair, UnbraidTurns, UnbraidStyle, UnbraidStyleGuider]


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[Any]:
        return NODES


async def comfy_entrypoint() -> Extension:
    return Extension()
