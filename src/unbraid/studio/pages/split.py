"""The page Split: one picture → a content LoRA and a style LoRA."""

import gradio as gr

from unbraid.studio.pages.common import Studio, kept_picture, uploaded_picture
from unbraid.studio.pages.training import Word, training_form

WORDS = (
    Word("subject", "Subject", "What is drawn, in a word or two: octopus"),
    Word("style", "Style", "How it is drawn: line art"),
)


def split_page(studio: Studio) -> None:
    gr.Markdown("One picture, taken apart: a LoRA of **what** is drawn, and a LoRA of **how** it is drawn.")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            picture = uploaded_picture("Picture", elem_id="split-picture")
        with gr.Column(min_width=320):
            training_form(studio, "split", [picture], lambda found: (kept_picture(studio, found[0], "Picture"),), WORDS)
