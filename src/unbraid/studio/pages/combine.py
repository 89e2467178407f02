"""The page Combine: two LoRAs of any dialect → how much they interfere, all ways to combine them on one sheet, one file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from unbraid.common.errors import UsageError
from unbraid.files.merge_methods import METHODS as MERGES
from unbraid.sampling.render import Use
from unbraid.studio import combining, forms
from unbraid.studio.pages.common import (
    DRAWING,
    Studio,
    count,
    filled,
    lora_choice,
    number,
    on,
    shown_picture,
    uploaded_loras,
)
from unbraid.studio.safety import checked_text

USUAL = ("concat", "ziplora", "np-lora", "k-lora")  # ways that are ticked at first
MOST = 8  # seeds


def combine_page(studio: Studio) -> list[gr.Dropdown]:
    """Draw the page. Returns the fields in which a LoRA is chosen."""
    gr.Markdown(
        "Two LoRAs of any tool. See first how much they are in each other's way, then draw every way side by side."
    )
    ways = combining.ways()
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            first, strong = _choice("Subject's LoRA", "combine-content")
            second, stronger = _choice("Style's LoRA", "combine-style")
            uploaded_loras(studio, [first, second], elem_id="combine-upload")
            look = gr.Button("How much do they interfere?", variant="primary", elem_id="compare")
            prompt = gr.Textbox(label="Prompt", placeholder="a sks fox in line art style", max_length=1000)
            picked = gr.CheckboxGroup([(ways[name], name) for name in ways], value=list(USUAL), label="Ways")
            seeds = gr.Slider(1, MOST, 4, step=1, label="Seeds")
            base = gr.Dropdown(list(studio.bases), value=studio.bases[0], label="Base", visible=len(studio.bases) > 1)
            draw = gr.Button("Draw them side by side", variant="primary", elem_id="side-by-side")
            with gr.Row():
                zip_ = gr.Button("Zip the two (a training)", elem_id="zip")
                how = gr.Dropdown(list(MERGES), value=next(iter(MERGES)), label="One file, by", min_width=120)
                merge = gr.Button("Merge", elem_id="merge")
        with gr.Column(min_width=320):
            told = gr.Markdown(elem_id="combine-told")
            plot = shown_picture("Interference", visible=False, elem_id="interference")
            sheet = shown_picture("Side by side", visible=False, elem_id="combine-sheet")
            file = gr.File(label="Merged", visible=False, interactive=False, elem_id="merged")
    two, words = [first, strong, second, stronger], [prompt, picked, seeds, base]
    on(look.click, _looker(studio), two, [told, plot])
    on(draw.click, _drawer(studio), [*two, *words], [told, sheet], **DRAWING)
    on(zip_.click, _zipper(studio), [*two, prompt, base], told)
    on(merge.click, _merger(studio), [*two, how], [told, file], **DRAWING)
    return [first, second]


def _choice(label: str, name: str) -> tuple[gr.Dropdown, gr.Slider]:
    with gr.Row(equal_height=True):
        return lora_choice(label, elem_id=name), gr.Slider(-2, 2, 1, step=0.05, label="Strength", min_width=140)


def _two(studio: Studio, content: object, strong: object, style: object, stronger: object) -> combining.Two:
    for value, label in ((content, "Subject's LoRA"), (style, "Style's LoRA")):
        if not value:
            raise UsageError("is not chosen yet", label, "Choose one of the list, or upload a file.")
    first, second = (number(one, "Strength", -4, 4) for one in (strong, stronger))
    return combining.Two(Use(studio.home.lora(str(content)), first), Use(studio.home.lora(str(style)), second))


def _looker(studio: Studio) -> Any:
    def look(*two: object) -> tuple[str, Any]:
        text, plot = combining.compared(studio.home, _two(studio, *two))
        return text, gr.update(value=str(plot), visible=True)

    return look


def _drawer(studio: Studio) -> Any:
    def draw(*values: Any) -> tuple[str, Any]:
        two, (prompt, picked, seeds, base) = _two(studio, *values[:4]), values[4:]
        drawing = combining.default_drawing(
            filled(prompt, "Prompt", 1000), studio.base(base), count(seeds, "Seeds", 1, MOST)
        )
        chosen = [str(name) for name in picked or ()]
        sheet, left = combining.sheet(studio.home, two, chosen, drawing)
        text = "\n".join(f"- Not drawn: {line}" for line in left)
        return text, gr.update(value=str(sheet), visible=True)

    return draw


def _zipper(studio: Studio) -> Any:
    def zip_(*values: Any) -> str:
        two, (prompt, base) = _two(studio, *values[:4]), values[4:]
        words: Mapping[str, str] = {"prompt": checked_text(prompt, "Prompt", 1000)} if prompt else {}
        method = forms.methods("zip")[0].name
        request = forms.Request("zip", (two.content.file, two.style.file), words, method, studio.base(base))
        folder = forms.enqueue(studio.home, request, f"{two.content.file.stem}-{two.style.file.stem}-{method}")
        return f"**{folder.name}** is in the queue. Once it is done, tick *{combining.ways()[method]}* above."

    return zip_


def _merger(studio: Studio) -> Any:
    def merge(*values: Any) -> tuple[str, Any]:
        two, how = _two(studio, *values[:4]), str(values[4])
        wish = f"{two.content.file.stem}-{two.style.file.stem}-{how}"
        out: Path = combining.merged(two, how, studio.home.new_file("loras", wish, ".safetensors"))
        return f"Merged into **{out.name}**; it is in the library.", gr.update(value=str(out), visible=True)

    return merge
