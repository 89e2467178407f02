"""The page Library: every LoRA of the studio's folder, checked for a tool, converted, resized, merged."""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import gradio as gr

from unbraid.common.errors import UsageError
from unbraid.files.formats.encode import Dialect
from unbraid.files.formats.tool_rules import TOOLS
from unbraid.files.merge import Size
from unbraid.files.merge_methods import METHODS as MERGES
from unbraid.files.tools import Done, Source, convert, merge_files, resize
from unbraid.studio import library
from unbraid.studio.pages.common import DRAWING, Studio, count, on, uploaded_loras


def library_page(studio: Studio) -> tuple[Callable[[], list[Any]], list[Any]]:
    """Draw the page. Returns the function that reads the folder anew, and the components that it fills."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            cards = gr.HTML(elem_id="cards")
        with gr.Column(min_width=320):
            ticked = gr.CheckboxGroup([], label="Tick one, or several to merge", elem_id="ticked", elem_classes="list")
            uploaded = uploaded_loras(studio, [], elem_id="library-upload")
            with gr.Row():
                tools = [("every tool", ""), *((tool.name, name) for name, tool in TOOLS.items())]
                tool = gr.Dropdown(tools, value="", label="My tool", min_width=120)
                check = gr.Button("Does it load?", elem_id="doctor", variant="primary")
            with gr.Row():
                dialect = gr.Dropdown(
                    [("as most tools read it", ""), *get_args(Dialect)], value="", label="Names", min_width=120
                )
                change = gr.Button("Convert", elem_id="convert")
            with gr.Row():
                rank = gr.Number(16, label="Rank", precision=0, minimum=1, min_width=120)
                small = gr.Button("Make it smaller", elem_id="resize")
            with gr.Row():
                how = gr.Dropdown(list(MERGES), value=next(iter(MERGES)), label="How", min_width=120)
                join = gr.Button("Merge those ticked", elem_id="merge-ticked")
            told = gr.Markdown(elem_id="library-told")
            file = gr.File(label="Download", interactive=False, visible=False, elem_id="library-file")

    def refresh() -> list[Any]:
        return [library.html(library.cards(studio.home)), gr.update(choices=[*studio.home.lora_files()])]

    def made(done: Done) -> list[Any]:
        return [library.written(done), gr.update(value=str(done.path), visible=True), *refresh()]

    shown = [told, file, cards, ticked]
    on(uploaded.then, refresh, None, [cards, ticked])
    on(check.click, lambda names, name: _examined(studio, names, name), [ticked, tool], told)
    on(change.click, lambda *given: made(_converted(studio, *given)), [ticked, dialect], shown, **DRAWING)
    on(small.click, lambda *given: made(_resized(studio, *given)), [ticked, rank], shown, **DRAWING)
    on(join.click, lambda *given: made(_merged(studio, *given)), [ticked, how], shown, **DRAWING)
    return refresh, [cards, ticked]


def _names(names: object, least: int, most: int) -> Sequence[str]:
    """The names that are ticked. UsageError for too few or too many."""
    found = [str(name) for name in names] if isinstance(names, list) else []
    if not least <= len(found) <= most:
        wanted = "one" if most == 1 else f"{least} or more"
        raise UsageError(f"{len(found)} are ticked", "Library", f"Tick {wanted}.")
    return found


def _examined(studio: Studio, names: object, tool: object) -> str:
    found = _names(names, 1, 20)
    return "\n\n".join(f"**{name}**\n\n{library.examined(studio.home.lora(name), str(tool or ''))}" for name in found)


def _converted(studio: Studio, names: object, dialect: object) -> Done:
    source = studio.home.lora(_names(names, 1, 1)[0])
    if dialect not in ("", *get_args(Dialect)):
        raise UsageError("is none of the choices", "Names", "Choose one of the list.")
    to: Any = dialect or None
    return convert(source, studio.home.new_file("loras", f"{source.stem}-{to or 'converted'}", ".safetensors"), to)


def _resized(studio: Studio, names: object, rank: object) -> Done:
    source, size = studio.home.lora(_names(names, 1, 1)[0]), count(rank, "Rank", 1, 4096)
    out = studio.home.new_file("loras", f"{source.stem}-rank-{size}", ".safetensors")
    return resize(source, out, Size(size))


def _merged(studio: Studio, names: object, how: object) -> Done:
    sources = [Source(studio.home.lora(name)) for name in _names(names, 2, 20)]
    if how not in MERGES:
        raise UsageError("is none of the choices", "How", "Choose one of the list.")
    wish = "-".join(source.path.stem for source in sources)
    return merge_files(sources, studio.home.new_file("loras", f"{wish}-{how}", ".safetensors"), str(how))
