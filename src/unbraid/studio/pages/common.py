"""What all pages share: the studio's settings, components that do not open files themselves, and errors as sentences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from unbraid.common.errors import UsageError
from unbraid.studio.forms import whole
from unbraid.studio.safety import LONGEST, Home, checked_text

P = ParamSpec("P")
R = TypeVar("R")
DRAWING: Mapping[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1}  # one picture at a time


@dataclass(frozen=True)
class Studio:
    """What pages need to know. `bases`: the base models to choose from, given when the studio is started."""

    home: Home
    bases: tuple[str, ...]
    devices: tuple[str, ...]

    def base(self, name: object) -> str:
        """A base that was chosen in a form. UsageError for one that is not offered."""
        if name not in self.bases:
            raise UsageError("this base is not offered", "Base", "Start the studio with --base to offer it.")
        return str(name)


def uploaded_picture(label: str, **more: Any) -> gr.Image:
    """A field for a picture. What is uploaded is passed on as a path, unopened: `Home.keep` checks it."""
    sources: Any = ["upload", "clipboard"]
    image = gr.Image(label=label, type="filepath", sources=sources, image_mode=None, height=260, **more)
    image.preprocess = _path  # a subclass would do, but for each one gradio writes a .pyi file beside the module
    return image


def _path(payload: Any) -> str | None:
    return payload.path if payload else None


def shown_picture(label: str, **more: Any) -> gr.Image:
    """A picture of ours. Its label is for screen readers alone: it would lie over the picture's own titles."""
    more |= {"buttons": ["download", "fullscreen"], "image_mode": None, "show_label": False}
    return gr.Image(label=label, alt_text=label, type="filepath", interactive=False, **more)


def shown_pictures(label: str, **more: Any) -> gr.Gallery:
    buttons: Any = ["download", "fullscreen"]
    return gr.Gallery(label=label, interactive=False, columns=2, object_fit="contain", buttons=buttons, **more)


def lora_choice(label: str, **more: Any) -> gr.Dropdown:
    """A field for a LoRA of the studio's folder. What is chosen is checked by `Home.lora`; the list may be out of date."""
    return gr.Dropdown([("none", "")], value="", label=label, allow_custom_value=True, filterable=True, **more)


def uploaded_loras(studio: Studio, fields: Sequence[gr.Dropdown], elem_id: str) -> Any:
    """A button that takes LoRA files into the studio's folder. `fields`: the choices that then have them. Returns the event,
    for what is to happen afterwards."""
    button = gr.UploadButton("Upload LoRA files", file_count="multiple", file_types=[".safetensors"], elem_id=elem_id)
    told = gr.Markdown(elem_id=f"{elem_id}-told")

    def keep(uploads: object) -> Any:
        given = uploads if isinstance(uploads, list) else []
        kept = [studio.home.keep(str(one), "LoRA") for one in given]
        said = f"Uploaded: {', '.join(one.name for one in kept)}"
        return [said, *lora_choices(studio, len(fields))] if fields else said  # gradio takes no list for one output

    return on(button.upload, keep, button, [told, *fields])


def lora_choices(studio: Studio, fields: int) -> list[Any]:
    """New choices for as many fields of `lora_choice`. What was chosen stays."""
    choices = [("none", ""), *((name, name) for name in studio.home.lora_files())]
    return [gr.update(choices=choices)] * fields


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """Show a UsageError in the page, in the words of the command line."""

    @wraps(function)
    def handler(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except UsageError as error:
            raise gr.Error(escape(str(error)), title="This did not work", print_exception=False) from error

    return handler


def on(
    event: Callable[..., Any], function: Callable[..., Any], inputs: Any = None, outputs: Any = None, **more: Any
) -> Any:
    """Connect a component's event with a function, which the browser can call from the page alone."""
    return event(plainly(function), inputs, outputs, api_visibility="private", **more)


def kept_picture(studio: Studio, upload: object, label: str) -> Path:
    """The checked copy of an uploaded picture. UsageError if none was given."""
    if not isinstance(upload, str) or not upload:
        raise UsageError("there is no picture yet", label, "Drop one into the field.")
    return studio.home.keep(upload, "picture")


def filled(text: object, label: str, most: int = LONGEST) -> str:
    """A text field that may not be empty."""
    found = checked_text(text, label, most)
    if not found:
        raise UsageError("is empty", label, "Say in a word or two what it is.")
    return found


def number(value: object, label: str, least: float, most: float) -> float:
    """A number of a form, within its limits. UsageError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UsageError("is out of range", label, f"Give {least:g} to {most:g}.")
    return float(value)


def count(value: object, label: str, least: int, most: int) -> int:
    """A whole number of a form, within its limits. UsageError otherwise."""
    return int(number(whole(value, label), label, least, most))
