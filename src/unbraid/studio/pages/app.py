"""The window: all pages in one gradio application, behind `Guard`, on a server of this machine."""

import socket
from collections.abc import Sequence
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from unbraid.common.errors import UsageError
from unbraid.studio.guard import LOCAL, Guard
from unbraid.studio.pages.combine import combine_page
from unbraid.studio.pages.common import Studio, lora_choices
from unbraid.studio.pages.generate import generate_page
from unbraid.studio.pages.library import library_page
from unbraid.studio.pages.pair import pair_page
from unbraid.studio.pages.queue import EVERY, queue_page, status
from unbraid.studio.pages.split import split_page
from unbraid.studio.queue import cards, keep_advancing
from unbraid.studio.safety import MOST, SERVED, Home

USER = "unbraid"
CSS = """
.strip { margin: 0; opacity: .8; }
.list .wrap { flex-direction: column; }
.message { border-left: 4px solid #d97706; padding-left: .7em; }
progress { width: 100%; height: .6em; accent-color: #0f766e; }
.curve { width: 100%; max-height: 12em; }
.curve polyline { fill: none; stroke: currentColor; stroke-width: 1.2; }
.axis { opacity: .7; margin: 0; font-size: .85em; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: .6em; }
.card { display: flex; gap: .6em; align-items: flex-start; overflow-wrap: anywhere; }
.card p { margin: .1em 0; }
.card img, .card .blank { width: 72px; height: 72px; object-fit: cover; border-radius: 6px; background: #8884; flex: none; }
.grid-wrap.fixed-height { max-height: none !important; }
.secondary-wrap input { padding-right: 2.4em !important; text-overflow: ellipsis; } /* a long name ends before the arrow */
pre code { white-space: pre-wrap !important; overflow-wrap: anywhere; }
footer { display: none !important; }
@media (max-width: 640px) {
  .tab-container button { padding: 0 6px !important; font-size: 13px !important; }
  button { min-height: 44px; }
}
"""
HEAD = (  # not in CSS, which gradio applies to what is inside of this element
    "<style>@media (max-width: 640px) { .fillable.app { padding: 8px !important; } }</style>"
)
CONTRAST: dict[str, Any] = {  # white on gradio's own teal is hard to read
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "block_title_text_color": "*primary_800",
    "block_label_text_color": "*primary_800",
    "checkbox_label_background_fill_selected": "*primary_700",
}
DARK = "() => { document.body.classList.toggle('dark'); }"


def build(studio: Studio) -> gr.Blocks:
    """All pages."""
    with gr.Blocks(title="unbraid studio", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        with gr.Row():
            gr.Markdown("# unbraid studio")
            dark = gr.Button("Light or dark", size="sm", scale=0, min_width=120)
        strip = gr.HTML(elem_id="strip")
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        gr.on([gr.Timer(EVERY).tick, blocks.load], lambda: status(studio), None, strip, **hidden)
        with gr.Tabs():
            with gr.Tab("Split", id="split"):
                split_page(studio)
            with gr.Tab("Pair", id="pair"):
                pair_page(studio)
            with gr.Tab("Combine", id="combine") as combine:
                combined = combine_page(studio)
            with gr.Tab("Generate", id="generate") as generate:
                drawn = generate_page(studio)
            with gr.Tab("Library", id="library") as library:
                refresh, listed = library_page(studio)
            with gr.Tab("Queue", id="queue"):
                queue_page(studio)
        combine.select(lambda: lora_choices(studio, len(combined)), None, combined, **hidden)
        generate.select(lambda: lora_choices(studio, len(drawn)), None, drawn, **hidden)
        library.select(refresh, None, listed, **hidden)
        dark.click(None, js=DARK)
    return blocks


def application(studio: Studio, password: str = "", names: Sequence[str] = ()) -> Guard:
    """The web application. With a `password`, the user `unbraid` must log in. `names`: see `Guard`."""
    blocks = build(studio)
    theme = gr.themes.Soft(
        primary_hue="teal", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    ).set(**CONTRAST)
    mounted = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        auth=[(USER, password)] if password else None,
        auth_message=f"The user is {USER}.",
        allowed_paths=[str(studio.home.folder / name) for name in SERVED],
        max_file_size=MOST["LoRA"],
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=CSS,
        head=HEAD,
    )
    blocks.has_launched = True  # without it, gradio does not check which files it copies into its cache
    return Guard(mounted, studio.home, names)


def serve(home: Home, bases: Sequence[str], address: tuple[str, int], password: str, names: Sequence[str]) -> None:
    """Answer requests until Ctrl-C. `address`: host and port; port 0 takes a free one.

    UsageError for a host other than this machine without a password, and for an address that cannot be used."""
    host, port = address
    if host not in LOCAL and not password:
        fix = "Set the environment variable UNBRAID_STUDIO_PASSWORD."
        raise UsageError("a studio that others can reach needs a password", f"--host {host}", fix)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot be listened to ({error})", f"{host}:{port}", "Choose another --port.") from error
    devices = cards()
    app: Any = application(Studio(home, tuple(bases), tuple(devices)), password, names)
    ended = keep_advancing(home, devices)
    print(f"unbraid studio: http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}", flush=True)
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run([listening])
    finally:
        ended.set()
