"""The form of a training: pictures, words, method, settings. It is made from the entries of the verb's methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from unbraid.common.errors import UsageError
from unbraid.methods.entry import Entry
from unbraid.studio import forms, presets
from unbraid.studio.pages.common import Studio, filled, on
from unbraid.studio.safety import checked_text

Files = Callable[[Sequence[object]], tuple[Path, ...]]  # values of the input components → checked files


@dataclass(frozen=True)
class Word:
    """A text field. `name`: the option of the verb that it fills."""

    name: str
    label: str
    example: str


@dataclass(frozen=True)
class Form:
    """The form of a verb's trainings. `files`: checks what was given as inputs. `settings`: (method, name) → component."""

    studio: Studio
    verb: str
    files: Files
    words: Mapping[Word, gr.Textbox]
    inputs: Sequence[Any]
    method: gr.Radio
    base: gr.Dropdown
    seed: gr.Number
    settings: Mapping[tuple[str, str], Any]

    @property
    def fields(self) -> list[Any]:
        """The components in the order in which gradio passes their values."""
        return [*self.inputs, *self.words.values(), self.method, self.base, self.seed, *self.settings.values()]

    def request(self, values: Sequence[object]) -> forms.Request:
        """The request that the filled form makes. UsageError for what is missing or wrong."""
        found = dict(zip(self.fields, values, strict=True))
        entries = {entry.name: entry for entry in forms.methods(self.verb)}
        entry = entries.get(str(found[self.method]))
        if entry is None:
            raise UsageError("is none of the methods", "Method", f"There are: {', '.join(entries)}.")
        texts = {one.name: filled(found[box], one.label) for one, box in self.words.items()}
        mine = {setting: found[box] for (owner, setting), box in self.settings.items() if owner == entry.name}
        return forms.Request(
            self.verb,
            self.files([found[one] for one in self.inputs]),
            texts,
            entry.name,
            self.studio.base(found[self.base]),
            forms.whole(found[self.seed], "seed"),
            forms.changed(entry, mine),
        )

    def begin(self, *values: object) -> str:
        folder = forms.enqueue(self.studio.home, self.request(values))
        return f"**{folder.name}** is in the queue. It goes on if you close this page; see *Queue*."

    def preview(self, *values: object) -> str:
        return forms.preview(self.studio.home, self.request(values))

    def usual(self, base: object) -> list[Any]:
        """What empty fields show on a base: the settings' usual values."""
        entries = forms.methods(self.verb)
        values = {entry.name: forms.usual(entry, self.studio.base(base)) for entry in entries}
        kinds = {(entry.name, one.name): one for entry in entries for one in forms.settings_of(entry)}
        return [
            gr.update(choices=choices_of(kinds[owner, name], values[owner][name]))
            if isinstance(one, gr.Dropdown)
            else gr.update(placeholder=values[owner][name])
            for (owner, name), one in self.settings.items()
        ]

    def save(self, name: object, *values: object) -> list[Any]:
        made = self.request(values)
        kept = presets.save(self.studio.home, checked_text(name, "Preset", 60), made.method, made.settings)
        return [f"Saved as **{kept}**.", gr.update(choices=presets.names(self.studio.home), value=kept)]

    def load(self, name: object, method: str) -> list[Any]:
        """The fields of a method with the values of a preset."""
        found = presets.load(self.studio.home, name, method) if name else {}
        return [gr.update(value=found.get(key)) if owner == method else gr.skip() for owner, key in self.settings]


def training_form(studio: Studio, verb: str, inputs: Sequence[Any], files: Files, words: Sequence[Word]) -> None:
    """Draw the form of a verb below its inputs, and connect its buttons."""
    boxes = {one: gr.Textbox(label=one.label, placeholder=one.example, max_length=300) for one in words}
    entries = forms.methods(verb)
    choices = [(f"{entry.title} ({entry.paper})", entry.name) for entry in entries]
    method = gr.Radio(choices, value=entries[0].name, label="Method", visible=len(entries) > 1)
    base = gr.Dropdown(list(studio.bases), value=studio.bases[0], label="Base", visible=len(studio.bases) > 1)
    settings: dict[tuple[str, str], Any] = {}
    with gr.Accordion("Settings", open=False):
        seed = gr.Number(0, label="seed", info="The same seed gives the same result.", precision=0)
        groups = [_settings(entry, studio.bases[0], settings, first=entry is entries[0]) for entry in entries]
        preset, name, keep = _presets(studio)
    with gr.Row():
        start = gr.Button("Start", variant="primary", elem_id=f"{verb}-start")
        look = gr.Button("What would it take?", elem_id=f"{verb}-look")
    told = gr.Markdown(elem_id=f"{verb}-told")
    form = Form(studio, verb, files, boxes, inputs, method, base, seed, settings)
    on(start.click, form.begin, form.fields, told)
    on(look.click, form.preview, form.fields, told)
    on(method.change, lambda name: [gr.update(visible=one.name == name) for one in entries], method, groups)
    on(base.change, form.usual, base, list(settings.values()))
    on(keep.click, form.save, [name, *form.fields], [told, preset])
    on(preset.input, form.load, [preset, method], list(settings.values()))


def _presets(studio: Studio) -> tuple[gr.Dropdown, gr.Textbox, gr.Button]:
    with gr.Row(equal_height=True):
        choice = gr.Dropdown(presets.names(studio.home), value=None, label="Preset", min_width=120)
        name = gr.Textbox(label="Save these settings as", placeholder="quick", max_length=60, min_width=120)
        keep = gr.Button("Save", min_width=80)
    return choice, name, keep


def _settings(entry: Entry, base: str, into: dict[tuple[str, str], Any], first: bool) -> gr.Column:
    """A field per setting of a method. An empty field leaves the setting as usual, which is shown in it."""
    usual = forms.usual(entry, base)
    with gr.Column(visible=first) as group:
        for one in forms.settings_of(entry):
            about: dict[str, Any] = {"label": one.name, "info": one.about}
            if one.kind == "choice":
                into[entry.name, one.name] = gr.Dropdown(choices_of(one, usual[one.name]), value="", **about)
            else:
                into[entry.name, one.name] = gr.Textbox(placeholder=usual[one.name], max_length=40, **about)
    return group


def choices_of(one: forms.Setting, usual: str) -> list[tuple[str, str]]:
    """What can be chosen for a setting; first, to leave it as usual."""
    return [(f"as usual: {usual}", ""), *((name, name) for name in one.choices)]
