"""What the studio refuses: paths, uploads and requests that are not for it. Nothing outside of its folder is read."""

import asyncio
import io
import json
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unbraid.common.errors import UsageError
from unbraid.core.lora import Lora
from unbraid.files.lora_file import write
from unbraid.studio.guard import MOST_BODY, Guard
from unbraid.studio.safety import MOST, Home, checked_text, open_home, slug

MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    found = open_home(tmp_path / "studio")
    (found.folder / "cache" / "shown.png").write_bytes(b"picture")
    (found.folder / "cache" / "link.png").symlink_to(tmp_path / "secret.png")
    (found.folder / "cache" / ".hidden.png").write_bytes(b"hidden")
    (found.folder / "runs" / "away").symlink_to(tmp_path)
    (found.folder / "presets" / "mine.toml").write_text("")
    return found


def ask(home: Home, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """The status and body with which the guard answers; 200 and the path's text where it passes a request on."""
    sent: list[dict[str, Any]] = []
    left = [body[i : i + 65536] for i in range(0, len(body), 65536)] or [b""]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"passed on"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(dict(message))

    pairs = {"host": "127.0.0.1:7860", **{key.replace("_", "-"): value for key, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": b"",
        "headers": [(key.encode(), value.encode()) for key, value in pairs.items()],
    }
    try:
        asyncio.run(Guard(app, home, ("studio.example",))(scope, receive, send))
    except ConnectionError:
        return 413, b""
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "[::1]:7860", "192.168.0.7:7860", "studio.example"])
def test_own_hosts_are_answered(home: Home, host: str) -> None:
    assert ask(home, "/", host=host, origin=f"http://{host}") == (200, b"passed on")


def test_own_files_are_served(home: Home) -> None:
    assert ask(home, f"/gradio_api/file={home.folder}/cache/shown.png")[0] == 200


HOSTILE_HEADERS = [
    {"host": "evil.example"},
    {"host": "localhost.evil.example"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "localhost@evil.example"},
    {"host": "evil.example@localhost"},
    {"host": "localhost/evil"},
    {"host": "localhost:0"},
    {"host": "localhost:99999999"},
    {"host": ""},
    {"host": "[::1"},
    {"host": "0x7f.1.evil"},
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:9999"},
    {"origin": "http://127.0.0.1:7860.evil.example"},
]


@pytest.mark.parametrize("headers", HOSTILE_HEADERS, ids=str)
def test_other_hosts_and_origins_are_refused(home: Home, headers: dict[str, str]) -> None:
    assert ask(home, "/", "GET", b"", **headers)[0] == 403


HOSTILE_PATHS = [
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=/etc/../etc/hosts.png",
    "/gradio_api/file=HOME/../secret.png",
    "/gradio_api/file=HOME/cache/../../secret.png",
    "/gradio_api/file=HOME/cache/link.png",
    "/gradio_api/file=HOME/cache/.hidden.png",
    "/gradio_api/file=HOME/runs/away/secret.safetensors",
    "/gradio_api/file=HOME/presets/mine.toml",
    "/gradio_api/file=HOME/task.json",
    "/gradio_api/file=HOME/runs/a/state.pickle",
    "/gradio_api/file=HOME",
    "/gradio_api/file=cache/shown.png",
    "/gradio_api/file=C:\\Windows\\win.ini",
    "/gradio_api/file=\\\\server\\share\\a.png",
    "/gradio_api/file=file:///etc/passwd",
    "/gradio_api/file=http://169.254.169.254/a.png",
    "/gradio_api/file=/proc/self/environ",
    "/gradio_api/file=HOME/cache/shown.png\x00.txt",
    "/gradio_api/file=HOME/cache/shown.png\n",
    "/gradio_api/file/etc/passwd",
    "/gradio_api/proxy=http://localhost:22/",
    "/gradio_api/vibe-code/",
    "/gradio_api/run/predict",
    "/gradio_api/stream/a/b/c/playlist.m3u8",
    "/gradio_api/dev/reload",
    "/gradio_api/mcp/",
    "/gradio_api/deep_link",
    "/monitoring",
    "/static/../../../etc/passwd",
    "/assets/..\\..\\secret",
    "/custom_component/a/b/c/d",
    "//evil.example/",
    "/\ud800",
    "/" + "a" * 9000,
]


@pytest.mark.parametrize("path", HOSTILE_PATHS, ids=lambda path: ascii(path)[:60])
def test_other_paths_are_refused(home: Home, path: str) -> None:
    status, body = ask(home, path.replace("HOME", str(home.folder)))
    assert status in (404, 414) and b"secret" not in body


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(home: Home, method: str) -> None:
    assert ask(home, "/", method)[0] == 405


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "HOME/../secret.png",
        "HOME/cache/../../secret.png",
        "HOME/cache/link.png",
        "HOME/runs/away/secret.png",
        "HOME/presets/mine.toml",
        "HOME",
        "secret.png",
        "../secret.png",
        "http://127.0.0.1/a.png",
        "",
        "\x00",
        7,
        ["a"],
    ],
    ids=ascii,
)
def test_requests_name_uploaded_files_alone(home: Home, path: Any) -> None:
    def join(path: Any) -> int:
        body = json.dumps({"data": [None, {"background": {"path": path}, "layers": [[{"path": None}]]}]}).encode()
        return ask(home, "/gradio_api/queue/join", "POST", body)[0]

    assert join(path.replace("HOME", str(home.folder)) if isinstance(path, str) else path) == 403
    assert join(f"{home.folder}/cache/shown.png") == 200
    assert ask(home, "/gradio_api/queue/join", "POST", b"[" * 99999)[0] == 403
    assert ask(home, "/gradio_api/queue/join", "POST", b"{")[0] == 403


def test_posts_come_from_the_studio_and_are_small(home: Home) -> None:
    join = "/gradio_api/queue/join"
    assert ask(home, join, "POST", b"{}", sec_fetch_site="same-origin")[0] == 200
    assert ask(home, join, "POST", b"{}", sec_fetch_site="cross-site")[0] == 403
    assert ask(home, "/", "POST")[0] == 404
    assert ask(home, join, "POST", b"x" * (MOST_BODY + 1))[0] == 413
    assert ask(home, join, "POST", content_length=str(10**12))[0] == 413


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../studio", "away", "a/b", "a\\b", "/etc", "a\x00", "-rf", ".hidden", "a" * 5000, "nothing"],
)
def test_names_of_runs_and_loras_are_those_of_the_folder(home: Home, name: str) -> None:
    with pytest.raises(UsageError, match="in the studio's folder"):
        home.run(name)
    with pytest.raises(UsageError, match="in the studio's folder"):
        home.lora(name)
    with pytest.raises(UsageError, match="in the studio's folder"):
        home.lora(f"runs/{name}/secret.safetensors")


@pytest.mark.parametrize("wish", ["../../x", "CON", "nul", "a/b", "\x00", "-rf", ".x", "🦊", "Ölbild", "x" * 900])
def test_new_folders_are_inside(home: Home, wish: str) -> None:
    first, second = home.new_run(wish), home.new_run(wish)
    assert first != second and {first.parent, second.parent} == {home.runs} and home.run(first.name) == first
    assert not slug(wish).startswith(("-", "."))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that announces many pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 9999))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
    )


def header(shapes: dict[str, Any]) -> bytes:
    text = json.dumps(shapes).encode()
    return struct.pack("<Q", len(text)) + text


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
BAD_PICTURES = {
    "bomb.png": bomb(60000, 60000),
    "flat.png": bomb(100000, 20),
    "empty.png": b"",
    "text.png": b"hello",
    "page.html": b"<script>alert(1)</script>",
    "page.png": b"<script>alert(1)</script>",
    "drawing.svg": SVG,
    "drawing.png": SVG,
    "print.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n",
    "print.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n",
    "program.exe": b"MZ" + b"\0" * 200,
    "cut.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF",
}
HUGE = {"lora_unet_x.lora_down.weight": {"dtype": "F16", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}
BAD_LORAS = {
    "code.safetensors": pickle.dumps({"a": 1}),
    "code.pt": pickle.dumps({"a": 1}),
    "code.ckpt": b"PK\x03\x04" + b"\0" * 99,
    "empty.safetensors": b"",
    "long.safetensors": struct.pack("<Q", 2**60) + b"{}",
    "huge.safetensors": header(HUGE) + b"\0" * 4,
    "deep.safetensors": struct.pack("<Q", 40000) + b"[" * 40000,
    "picture.safetensors": bomb(10, 10),
}


def uploaded(home: Home, name: str, data: bytes) -> Path:
    path = home.folder / "cache" / "upload" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_refused(home: Home, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        home.keep(uploaded(home, name, BAD_PICTURES[name]), "picture")
    assert str(home.folder) not in str(caught.value) and not [*(home.folder / "inputs").iterdir()]


@pytest.mark.parametrize("name", BAD_LORAS)
def test_bad_loras_are_refused(home: Home, name: str) -> None:
    with pytest.raises(UsageError):
        home.keep(uploaded(home, name, BAD_LORAS[name]), "LoRA")
    assert not [*(home.folder / "loras").iterdir()]


def test_files_that_are_too_large_are_refused_unread(home: Home) -> None:
    path = uploaded(home, "large.png", b"")
    with path.open("r+b") as file:
        file.truncate(MOST["picture"] + 1)
    with pytest.raises(UsageError, match="too large"):
        home.keep(path, "picture")


def test_only_uploads_are_kept(home: Home, tmp_path: Path, picture: Path) -> None:
    link = home.folder / "cache" / "cat.png"
    link.symlink_to(picture)
    for path in (picture, link, tmp_path / "secret.png", Path("/etc/passwd"), home.folder / "cache" / ".." / "x.png"):
        with pytest.raises(UsageError, match="not an uploaded file"):
            home.keep(path, "picture")


def test_good_files_are_kept_under_a_plain_name(home: Home) -> None:
    data = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(data, "PNG")
    kept = home.keep(uploaded(home, "Mein Bild; rm -rf ~.PNG", data.getvalue()), "picture")
    assert kept.parent == home.folder / "inputs" and kept.name.startswith("mein-bild-rm-rf-") and kept.suffix == ".png"
    lora = {MODULE: Lora(torch.randn(2, 64), torch.randn(64, 2), 2.0)}
    path = home.folder / "cache" / "ink.safetensors"
    write(path, lora, family="sdxl")
    kept = home.keep(path, "LoRA")
    assert [*home.lora_files()] == [f"loras/{kept.name}"] and home.lora(f"loras/{kept.name}") == kept
    save_file({"a": torch.zeros(2)}, home.folder / "cache" / "other.safetensors")
    with pytest.raises(UsageError, match="no part of a LoRA"):
        home.keep(home.folder / "cache" / "other.safetensors", "LoRA")


@pytest.mark.parametrize("text", ["x" * 301, "a\x00b", "a\nb", "\ud800", "\x1b[31m", 7, ["a"], {"a": 1}], ids=ascii)
def test_texts_are_checked(text: object) -> None:
    with pytest.raises(UsageError):
        checked_text(text, "Subject")
    assert checked_text("  Füchse 🦊 ", "Subject") == "Füchse 🦊"


OPENED: list[tuple[str, int]] = []  # path, flags: every file that this process opens while `watched`
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DECOYS = ("secret.png", "secret.safetensors", "/etc/passwd", "/etc/hosts", "/proc/self/environ")
_watching: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and not isinstance(arguments[0], int):
        OPENED.append((os.fsdecode(arguments[0]), int(arguments[2] or 0)))


@pytest.fixture
def watched() -> Iterator[list[tuple[str, int]]]:
    """The files that are opened during a test."""
    if not OPENED:
        sys.addaudithook(_hook)  # it cannot be removed again
        OPENED.append(("", 0))
    del OPENED[1:]
    _watching.append(True)
    yield OPENED
    _watching.clear()


def hostile(home: Home) -> Iterator[tuple[object, bool]]:
    """Requests and uploads, each with whether it is refused."""
    for headers in HOSTILE_HEADERS:
        yield headers, ask(home, "/", "GET", b"", **headers)[0] == 403
    for path in HOSTILE_PATHS:
        yield path, ask(home, path.replace("HOME", str(home.folder)))[0] in (404, 414)
    for path in ("/etc/passwd", "HOME/../secret.png", "HOME/cache/link.png", "HOME/runs/away/secret.png", "secret.png"):
        body = json.dumps({"data": [{"path": path.replace("HOME", str(home.folder))}]}).encode()
        yield body, ask(home, "/gradio_api/queue/join", "POST", body)[0] == 403
    yield "a large body", ask(home, "/gradio_api/queue/join", "POST", b"x" * (MOST_BODY + 1))[0] == 413
    for kind, files in (("picture", BAD_PICTURES), ("LoRA", BAD_LORAS)):
        for name, data in files.items():
            yield name, refuses(home.keep, uploaded(home, name, data), kind)
    for path in (home.folder / "cache" / "link.png", home.folder.parent / "secret.png", Path("/etc/passwd")):
        yield path, refuses(home.keep, path, "picture")
    for name in ("..", "../studio", "away", "/etc", "a\x00", "."):
        yield name, refuses(home.run, name) and refuses(home.lora, f"runs/{name}/secret.safetensors")
    for text in ("x" * 301, "a\x00b", "\ud800", {"path": "/etc/passwd"}):
        yield text, refuses(checked_text, text, "Subject")


def refuses(function: Any, *given: object) -> bool:
    try:
        function(*given)
    except UsageError:
        return True
    return False


def test_hostile_requests_read_and_write_nothing_outside(
    home: Home, tmp_path: Path, watched: list[tuple[str, int]]
) -> None:
    def outside() -> dict[Path, tuple[int, int]]:
        found = [path for path in tmp_path.rglob("*") if home.folder not in (path, *path.parents)]
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}

    before = outside()
    asked = list(hostile(home))
    assert len(asked) >= 50 and not [what for what, refused in asked if not refused]
    assert outside() == before and len(before) == 2
    files = [(path, flags) for path, flags in watched[1:] if "__pycache__" not in path and path != os.devnull]
    assert [path for path, _ in files if path.startswith(str(home.folder / "cache"))], "opened files are seen"
    assert not [path for path, _ in files if path.endswith(DECOYS)]
    assert not [path for path, flags in files if flags & WRITES and not path.startswith(str(home.folder))]
