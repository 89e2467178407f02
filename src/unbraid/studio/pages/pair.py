"""The page Pair: a picture before and after → what the style does."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from unbraid.studio.pages.common import Studio, kept_picture, uploaded_picture
from unbraid.studio.pages.training import Word, training_form

WORDS = (
    Word("subject", "Subject", "What is drawn, in a word or two: dog"),
    Word("style", "Style", "What to call the style: ink"),
)


def pair_page(studio: Studio) -> None:
    gr.Markdown("The same picture twice, before and after: a LoRA of what the **style** does to it.")

    def files(found: Sequence[object]) -> tuple[Path, ...]:
        return kept_picture(studio, found[0], "Before"), kept_picture(studio, found[1], "After")

    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            before = uploaded_picture("Before", elem_id="pair-before")
            after = uploaded_picture("After", elem_id="pair-after")
        with gr.Column(min_width=320):
            training_form(studio, "pair", [before, after], files, WORDS)
