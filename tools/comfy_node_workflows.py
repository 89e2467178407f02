"""Makes the workflows of comfyui-nodes/example_workflows, which use unbraid's own nodes: `python -m tools.comfy_node_workflows`.

A test fails if they are out of date. They are in ComfyUI's API format, as those of tools/comfy_workflows.py."""

from collections.abc import Callable
from pathlib import Path

from tools.comfy_workflows import GUIDANCE, Link, Workflow, finished, scheduler, text

OUT = Path(__file__).parent.parent / "comfyui-nodes" / "example_workflows"
CHECKPOINT = "sd_xl_base_1.0.safetensors"
PAIR = {
    "content_name": "content.safetensors",
    "content_strength": 1.0,
    "style_name": "style.safetensors",
    "style_strength": 1.0,
}


def opened() -> tuple[Workflow, str]:
    flow = Workflow()
    return flow, flow.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)


def written(flow: Workflow, checkpoint: str, title: str, words: str) -> Link:
    return flow.add("CLIPTextEncode", title, text=words, clip=(checkpoint, 1)), 0


def own_prompts() -> Workflow:
    """A split pair, each LoRA with the prompt that it was trained with.

    The same as `unbraid generate --prompt "a sks dog in ink style" --lora content.safetensors --lora-prompt own
    --lora style.safetensors --lora-prompt own`."""
    flow, checkpoint = opened()
    main = written(flow, checkpoint, "Prompt", "a sks dog in ink style")
    negative = written(flow, checkpoint, "Negative prompt", "")
    content = written(flow, checkpoint, "What the content LoRA reads", "a sks dog")
    style = written(flow, checkpoint, "What the style LoRA reads", "a dog in ink style")
    pair = flow.add("UnbraidPair", model=(checkpoint, 0), **PAIR, content_prompt=content, style_prompt=style)
    return guided(flow, checkpoint, (pair, 0), main, negative)


def k_lora() -> Workflow:
    """Two LoRAs of any origin by turns. The same as `unbraid generate --combine k-lora --lora content.safetensors
    --lora style.safetensors`; with `switch` in place of `k-lora`, as `--combine switch`."""
    flow, checkpoint = opened()
    main = written(flow, checkpoint, "Prompt", "a sks dog in ink style")
    negative = written(flow, checkpoint, "Negative prompt", "")
    sigmas = scheduler(flow, (checkpoint, 0))
    model = flow.add("UnbraidTurns", model=(checkpoint, 0), **PAIR, way="k-lora", sigmas=sigmas)
    return guided(flow, checkpoint, (model, 0), main, negative, sigmas)


def two_styles() -> Workflow:
    """Style guidance with two styles. The same as `unbraid generate --prompt "a teapot" --style-guidance ink.safetensors:0.6
    --style-guidance sepia.safetensors:0.4`."""
    flow, checkpoint = opened()
    main = written(flow, checkpoint, "Prompt", "a teapot")
    negative = written(flow, checkpoint, "Negative prompt", "")
    styles: dict[str, Link] = {}
    for name, scale in (("ink", 0.6), ("sepia", 0.4)):
        prompt = written(flow, checkpoint, f"Prompt and {name}", f"a teapot in {name} style")
        given = {"style_name": f"{name}.safetensors", "prompt": prompt, "scale": scale, "start_percent": 0.0}
        styles = {"more": (flow.add("UnbraidStyle", name, **given, **styles), 0)}
    guider = flow.add("UnbraidStyleGuider", model=(checkpoint, 0), positive=main, negative=negative, cfg=GUIDANCE,
                      styles=styles["more"])  # fmt: skip
    return finished(flow, (checkpoint, 0), (guider, 0), (checkpoint, 2))


def guided(
    flow: Workflow, checkpoint: str, model: Link, main: Link, negative: Link, sigmas: Link | None = None
) -> Workflow:
    guider = flow.add("CFGGuider", model=model, positive=main, negative=negative, cfg=GUIDANCE)
    return finished(flow, model, (guider, 0), (checkpoint, 2), sigmas)


WORKFLOWS: dict[str, Callable[[], Workflow]] = {
    "own_prompts.json": own_prompts,
    "k_lora.json": k_lora,
    "two_styles.json": two_styles,
}

if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for name, make in WORKFLOWS.items():
        (OUT / name).write_text(text(make()), "utf-8")
