"""The page Generate: a prompt and LoRAs → pictures, sheets over strengths, changed and edited pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from unbraid.common.errors import UsageError
from unbraid.runs.roles import EVERYWHERE
from unbraid.sampling.canvas import Start
from unbraid.sampling.combine import Combine
from unbraid.sampling.render import ImageInputs, Sampling, StyleGuidance, Use
from unbraid.sampling.samplers import SAMPLERS
from unbraid.sampling.uses import OWN, STYLE_NAME
from unbraid.studio.drawing import Drawing, drawn, mask_of, stored
from unbraid.studio.pages.common import DRAWING, Studio, count, filled, lora_choice, number, on, shown_pictures
from unbraid.studio.safety import checked_text

ROWS = 3  # LoRAs at a time
MOST = 16  # pictures at a time
STRONG = 4.0  # largest strength
HOW = {  # the ways to combine LoRAs, in words
    "sum": "all at once",
    "switch": "in turn, step by step",
    "composite": "each guides, averaged",
    "k-lora": "layer by layer, content first (K-LoRA)",
    "k-lora-released": "layer by layer, as K-LoRA's own program does it",
    "est-lora": "layer by layer, by energy (EST-LoRA)",
}
READS = {  # what a LoRA reads in cross-attention (Use.prompt), in words
    "": "the prompt",
    OWN: "the prompt that it was trained with",
    STYLE_NAME: "the name of its style alone: for a style LoRA with another subject than its own",
}
ACTS = {  # in which layers a LoRA acts (runs.roles), in words
    EVERYWHERE: "all its layers",
    "content": "all but the style's: a content LoRA, alone or beside a style from elsewhere",
    "style": "all but the content's: a style LoRA, alone or beside a content from elsewhere",
}
Values = Mapping[Any, Any]  # component → what the browser sent


@dataclass(frozen=True)
class Form:
    """The components of the page, by what they are for."""

    prompt: gr.Textbox
    loras: Sequence[tuple[gr.Dropdown, gr.Slider, gr.Dropdown, gr.Dropdown]]
    style: tuple[gr.Dropdown, gr.Slider, gr.Textbox, gr.Slider]
    sweep: tuple[gr.Radio, gr.Number, gr.Number, gr.Number]
    image: tuple[gr.ImageEditor, gr.Radio, gr.Slider]
    sampling: Mapping[str, Any]
    combine: gr.Dropdown
    base: gr.Dropdown

    def all(self) -> set[Any]:
        rows = [one for row in self.loras for one in row]
        return {
            self.prompt,
            self.combine,
            self.base,
            *rows,
            *self.style,
            *self.sweep,
            *self.image,
            *self.sampling.values(),
        }


def generate_page(studio: Studio) -> list[gr.Dropdown]:
    """Draw the page. Returns the fields in which a LoRA is chosen, of which the choices must be kept up to date."""
    gr.Markdown("Pictures of a prompt, with the LoRAs that you have made or uploaded.")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            prompt = gr.Textbox(label="Prompt", placeholder="a teapot in line art style", max_length=1000, lines=2)
            loras = [_lora_row(i) for i in range(ROWS)]
            ways = [(HOW.get(name, name), name) for name in map(str, get_args(Combine))]
            combine = gr.Dropdown(ways, value=ways[0][1], label="Several LoRAs")
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
            base = gr.Dropdown(list(studio.bases), value=studio.bases[0], label="Base", visible=len(studio.bases) > 1)
            style, sweep = _style(), _sweep()
            image, sampling = _image(studio), _sampling()
        with gr.Column(min_width=320):
            made = shown_pictures("Pictures", elem_id="drawn")
    form = Form(prompt, loras, style, sweep, image, sampling, combine, base)

    def handler(values: Values) -> list[str]:
        return [str(path) for path in drawn(studio.home, drawing_of(studio, form, values))]

    on(draw.click, handler, form.all(), made, **DRAWING)
    return [*(row[0] for row in loras), style[0]]


def _lora_row(i: int) -> tuple[gr.Dropdown, gr.Slider, gr.Dropdown, gr.Dropdown]:
    with gr.Group():
        with gr.Row(equal_height=True):
            lora = lora_choice("LoRA" if not i else f"LoRA {i + 1}", elem_id=f"lora-{i}")
            scale = gr.Slider(-2, 2, 1, step=0.05, label="Strength", min_width=140)
        reads = gr.Dropdown([(words, one) for one, words in READS.items()], value="", label="Reads")
        acts = gr.Dropdown([(words, one) for one, words in ACTS.items()], value=EVERYWHERE, label="Acts in")
    return lora, scale, reads, acts


def _style() -> tuple[gr.Dropdown, gr.Slider, gr.Textbox, gr.Slider]:
    with gr.Accordion("Style guidance", open=False):
        gr.Markdown("A style LoRA that guides: the base keeps the composition. Best with a LoRA of *Pair*.")
        lora = lora_choice("Style LoRA", elem_id="style-lora")
        scale = gr.Slider(0, 2, 1, step=0.05, label="Strength of the style")
        words = gr.Textbox(label="What the style is called", placeholder="as in its file", max_length=100)
        begin = gr.Slider(0, 1, 1, step=0.05, label="Guide once this much noise is left", info="1: always")
    return lora, scale, words, begin


def _sweep() -> tuple[gr.Radio, gr.Number, gr.Number, gr.Number]:
    with gr.Accordion("One sheet over strengths", open=False):
        choices = [("nothing", ""), ("LoRAs", "lora"), ("style guidance", "style"), ("guidance", "guidance")]
        what = gr.Radio(choices, value="", label="Vary")
        with gr.Row():
            numbers = (
                gr.Number(0, label="from"),
                gr.Number(1.5, label="to"),
                gr.Number(5, label="how many", precision=0),
            )
    return (what, *numbers)


def _image(studio: Studio) -> tuple[gr.ImageEditor, gr.Radio, gr.Slider]:
    with gr.Accordion("Begin with a picture", open=False):
        brush = gr.Brush(default_size=24, colors=["#ffffff"], default_color="#ffffff", color_mode="fixed")
        picture = gr.ImageEditor(
            label="Picture; paint over what is to be drawn anew",
            sources=("upload", "clipboard"),
            brush=brush,
            transforms=(),
            layers=False,
            type="filepath",
            elem_id="painted",
        )
        unopened: Any = lambda payload: _painted(studio, picture, payload)  # noqa: E731
        picture.preprocess = unopened
        choices = [("draw over it", "start"), ("edit it: apply the style alone", "edit")]
        use = gr.Radio(choices, value="start", label="What to do with it")
        strength = gr.Slider(
            0.05, 1, 0.6, step=0.05, label="How much noise to put on it", info="1 leaves nothing of it"
        )
    return picture, use, strength


def _sampling() -> dict[str, Any]:
    with gr.Accordion("More", open=False):
        return {
            "n": gr.Slider(1, MOST, 4, step=1, label="How many pictures"),
            "seed": gr.Number(0, label="seed", precision=0),
            "steps": gr.Slider(1, 100, 25, step=1, label="Steps"),
            "guidance": gr.Slider(0, 15, 4, step=0.5, label="Guidance"),
            "sampler": gr.Dropdown(
                [("the base's own", ""), *((one, one) for one in SAMPLERS)], value="", label="Sampler"
            ),
            "negative": gr.Textbox(label="Negative prompt", max_length=1000),
        }


def _painted(studio: Studio, editor: gr.ImageEditor, payload: Any) -> dict[str, Any] | None:
    """The files of a painted picture, unopened: {"background": path, "layers": paths}."""
    if payload is None:
        return None
    parts = editor.blob_storage.pop(payload.id, None) if payload.id else payload
    if parts is None:
        return None
    files = [getattr(one, "path", one) for one in (parts.background, *(parts.layers or ()))]
    background, *layers = [stored(studio.home, one) for one in files]
    return {"background": background, "layers": [one for one in layers if one]}


def drawing_of(studio: Studio, form: Form, values: Values) -> Drawing:
    """What a filled form asks to draw. UsageError for what is missing or wrong."""
    combine = values[form.combine]
    if combine not in get_args(Combine):
        raise UsageError("is none of the choices", "Several LoRAs", "Choose one of the list.")
    rows = [[values[one] for one in row] for row in form.loras if values[row[0]]]
    guide, scale, words, begin = (values[one] for one in form.style)
    named = checked_text(words, "What the style is called") or None
    styles = [Use(studio.home.lora(guide), number(scale, "Strength of the style", 0, STRONG), named)] if guide else []
    return Drawing(
        filled(values[form.prompt], "Prompt", 1000),
        studio.base(values[form.base]),
        tuple(_use(studio, lora, scale, reads) for lora, scale, reads, _ in rows),
        combine,
        StyleGuidance(tuple(styles), number(begin, "Guide once", 0, 1)),
        sampling_of(form.sampling, values, edited := values[form.image[1]] == "edit" and bool(values[form.image[0]])),
        inputs_of(studio, form, values, edited),
        _sweep_text(*(values[one] for one in form.sweep)),
        tuple(_role(acts) for *_, acts in rows),
    )


def _role(acts: object) -> str:
    if acts not in list(ACTS):
        raise UsageError("is none of the choices", "Acts in", "Choose one of the list.")
    return str(acts)


def _use(studio: Studio, lora: object, scale: object, reads: object) -> Use:
    if reads not in list(READS):  # a browser may send what cannot be hashed
        raise UsageError("is none of the choices", "Reads", "Choose one of the list.")
    return Use(studio.home.lora(str(lora)), number(scale, "Strength", -STRONG, STRONG), str(reads) or None)


def _sweep_text(what: object, first: object, last: object, many: object) -> str:
    """The choices of a sweep as the command line writes them; empty for none."""
    if not what:
        return ""
    values = (number(first, "from", -20, 20), number(last, "to", -20, 20), count(many, "how many", 2, 25))
    return f"{what}={values[0]}:{values[1]}:{values[2]}"


def sampling_of(fields: Mapping[str, Any], values: Values, edited: bool) -> Sampling:
    """Seeds, steps and guidance. An edited picture is one picture."""
    given = {name: values[one] for name, one in fields.items()}
    first = count(given["seed"], "seed", 0, 2**53)
    return Sampling(
        number(given["guidance"], "Guidance", 0, 30),
        count(given["steps"], "Steps", 1, 200),
        str(given["sampler"] or ""),
        range(first, first + (1 if edited else count(given["n"], "How many pictures", 1, MOST))),
        negative=checked_text(given["negative"], "Negative prompt", 1000),
    )


def inputs_of(studio: Studio, form: Form, values: Values, edited: bool) -> ImageInputs:
    """The picture to begin with, checked, and what was painted over it as its mask."""
    painted, _, strength = (values[one] for one in form.image)
    if not painted or not painted["background"]:
        return ImageInputs()
    picture: Path = studio.home.keep(painted["background"], "picture")
    if edited:
        return ImageInputs(edit=picture)
    mask = mask_of(studio.home, picture, [studio.home.keep(one, "picture") for one in painted["layers"]])
    return ImageInputs(Start(picture, number(strength, "How much noise", 0.01, 1), mask))
