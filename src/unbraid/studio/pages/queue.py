"""The page Queue: all trainings, what they are at, and what came of them. It is read anew from run folders every time."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from unbraid.runs.folder import read_events
from unbraid.studio import process, queue
from unbraid.studio.checkpoint import checkpoint
from unbraid.studio.pages.common import DRAWING, Studio, on, shown_picture

EVERY = 2.0  # seconds between looks at the run folders
POINTS = 200  # of the curve of the loss


def queue_page(studio: Studio) -> None:
    """Draw the page. Its timer begins when the page is opened: gradio draws pages when they are first looked at."""
    seen = gr.State("")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            chosen = gr.Radio([], label="Trainings", elem_id="runs", elem_classes="list")
            with gr.Row():
                stop = gr.Button("Stop", elem_id="stop", min_width=90)
                again = gr.Button("Go on", elem_id="go-on", min_width=90)
                remove = gr.Button("Remove", elem_id="remove", min_width=90)
                try_it = gr.Button("Try it now", elem_id="try-it", min_width=90)
            told = gr.Markdown(elem_id="queue-told")
            gr.Markdown(
                "*Stop* ends it after its step, and writes the LoRAs so far; *Go on* continues from there. *Remove* moves "
                "the training into the folder `removed`. *Try it now* puts the LoRAs of the last save into the library, "
                "while the training goes on. Trainings go on when this page or the studio is closed."
            )
        with gr.Column(min_width=320):
            about = gr.HTML(elem_id="about")
            sheet = shown_picture("What it draws", visible=False, elem_id="sheet")
            files = gr.File(label="LoRAs", file_count="multiple", interactive=False, visible=False, elem_id="loras")
            with gr.Accordion("Log", open=False):
                log = gr.Code(language=None, label="log.txt", lines=8, max_lines=20, interactive=False)

    def tick(name: object, last: str) -> list[Any]:
        return _tick(studio, name, last)

    def act(action: Any) -> Any:
        def acted(name: object, last: str) -> list[Any]:
            action(studio.home.run(str(name or "")))
            return _tick(studio, name, last)

        return acted

    def tried(name: object) -> str:
        made = checkpoint(studio.home, studio.home.run(str(name or "")))
        return f"In the library: {', '.join(path.name for path in made)}. Draw with them on the page *Generate*."

    state, shown = [chosen, seen], [chosen, about, sheet, files, log, seen]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    on(gr.Timer(EVERY).tick, tick, state, shown, trigger_mode="always_last", **quiet)
    on(chosen.change, tick, state, shown, **quiet)
    on(stop.click, act(queue.stop), state, shown, **quiet)
    on(again.click, act(queue.go_on), state, shown, **quiet)
    on(try_it.click, tried, chosen, told, **DRAWING)
    on(remove.click, act(lambda folder: queue.remove(studio.home, folder)), state, shown, **quiet)


def _tick(studio: Studio, name: object, last: str) -> list[Any]:
    """What the page shows now. Pictures and files are sent only if they changed."""
    found = queue.runs(studio.home)
    names = [run.name for run in found]
    run = (
        found[names.index(str(name))]
        if name in names
        else next((run for run in found if run.alive), *found[:1] or [None])
    )
    choices = gr.update(choices=[(title(one), one.name) for one in found])
    if str(name) not in names:  # else nothing is set, so that a choice made meanwhile stays
        choices["value"] = run.name if run else None
    if run is None:
        empty = "<p>No training yet. Start one on the page <i>Split</i>.</p>"
        return [choices, empty, gr.update(visible=False), gr.update(visible=False), "", ""]
    picture, loras = newest_picture(run.folder), sorted(run.folder.glob("*.safetensors"))
    loras = [path for path in loras if path.stem != "state"]
    now = f"{run.name} {picture} {loras}"
    if now == last:
        changed: list[Any] = [gr.skip(), gr.skip()]
    else:
        changed = [
            gr.update(value=str(picture) if picture else None, visible=bool(picture)),
            gr.update(value=[str(path) for path in loras], visible=bool(loras)),
        ]
    return [choices, details(run), *changed, process.tail(run.folder), now]


def title(run: queue.Run) -> str:
    """A run in a few words: `cat-ink · running, step 40 of 300`."""
    at = f", step {run.done} of {run.total}" if run.total and run.state in ("running", "stopping", "stopped") else ""
    return f"{run.name} · {run.state}{at}"


def status(studio: Studio) -> str:
    """The line above all pages: what is at work, and how much waits."""
    found = queue.runs(studio.home)
    waiting = sum(run.state == "waiting" for run in found)
    busy = "; ".join(escape(title(run)) for run in found if run.alive) or "nothing is training"
    return f"<p class='strip' role='status'>{busy}{f'; {waiting} waiting' if waiting else ''}</p>"


def details(run: queue.Run) -> str:
    """A run's state, its progress and the curve of its loss, as HTML."""
    share = 100 * run.done / run.total if run.total else 0
    on_card = f" on {escape(run.device)}" if run.device else ""
    loss = f" · loss {run.loss:.4f}" if run.loss is not None else ""
    message = f"<p class='message'>{escape(run.message)}</p>" if run.message else ""
    return (
        f"<h3>{escape(run.name)}</h3><p>{run.state}{on_card}: step {run.done} of {run.total or '?'}{loss}</p>"
        f"<progress max='100' value='{share:.1f}'></progress>{message}{curve(losses(run.folder))}"
    )


def losses(folder: Path) -> list[float]:
    """The loss over the steps, as at most POINTS means of neighbours."""
    all_ = [event["loss"] for event in read_events(folder)]
    size = max(1, -(-len(all_) // POINTS))
    return [sum(part) / len(part) for i in range(0, len(all_), size) if (part := all_[i : i + size])]


def curve(values: Sequence[float]) -> str:
    """A line through values, as SVG in the colour of the text; empty if there are fewer than two."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    points = " ".join(
        f"{300 * i / (len(values) - 1):.1f},{78 - 76 * (value - low) / ((high - low) or 1):.1f}"
        for i, value in enumerate(values)
    )
    return (
        f"<svg class='curve' viewBox='0 0 300 80' role='img' aria-label='loss: {values[0]:.3g} to {values[-1]:.3g}'>"
        f"<polyline points='{points}'/></svg><p class='axis'>loss, from {high:.3g} (top) to {low:.3g}</p>"
    )


def newest_picture(folder: Path) -> Path | None:
    """The sheet of a finished run; else its newest preview; else none."""
    if (folder / "sheet.png").exists():
        return folder / "sheet.png"
    return max((folder / "previews").glob("step_*.png"), default=None)
