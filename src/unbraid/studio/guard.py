"""What the studio's web server answers: its own pages, for its own host names, in requests of limited size.

`Guard` stands before gradio's web application. It is plain ASGI (the interface of Python's web servers), without a library.
"""

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unbraid.studio.safety import MOST, Home

Message = MutableMapping[str, Any]
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]
LOCAL = frozenset(("localhost", "127.0.0.1", "::1"))
MOST_BODY = 1 << 20  # bytes of a request other than an upload
MOST_URL = 4096  # characters
FILE = "/gradio_api/file="
PAGES = re.compile(  # what gradio's pages need; everything else that gradio could answer is refused
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/pwa_icon(/\d+)?|/log(in|out)/?"
    r"|/(assets|static|svelte)/[\w./@-]+"
    r"|/gradio_api/(user|login_check|token|app_id|info|theme\.css|startup-events|upload_progress|reset|cancel)/?"
    r"|/gradio_api/(queue/(join|data)|upload|component_server|heartbeat/\w+)/?"
)
POSTS = re.compile(r"/login/?|/gradio_api/(queue/join|upload|component_server|reset|cancel)/?")
HEADERS = {
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; worker-src 'self' blob:; font-src 'self' data:; "
    b"connect-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'; object-src 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


class Guard:
    """A web application that passes on to `app` only what the studio needs.

    `names`: the host names that a browser may use for it, besides those of this machine. Addresses such as 192.168.0.7
    are always accepted: a page of another site cannot make a browser use one (DNS rebinding needs a name)."""

    def __init__(self, app: App, home: Home, names: Collection[str] = ()) -> None:
        self.app, self.home, self.names = app, home, LOCAL | {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self.refusal(scope):
            await _answer(send, *refusal)
        else:
            most = MOST["LoRA"] + MOST_BODY if scope["path"].startswith("/gradio_api/upload") else MOST_BODY
            if _length(scope) > most:
                await _answer(send, 413, "This request is too large.")
                return
            limited: Receive = _Limited(receive, most)
            if scope["path"].startswith("/gradio_api/queue/join"):
                limited, body = await _buffered(limited)
                if body is None:
                    await _answer(send, 413, "This request is too large, or it was cut off.")
                    return
                if not self.names_own_files(body):
                    await _answer(send, 403, "Only files that were uploaded here can be used.")
                    return
            await self.app(scope, limited, _with_headers(send))

    def names_own_files(self, body: bytes) -> bool:
        """Whether all files that a request names are in the cache, where uploads are.

        gradio itself copies any file that a request names into its cache, unless it was started by `launch`."""
        try:
            pending = [json.loads(body or b"null")]
        except (ValueError, RecursionError):
            return False
        while pending:
            one = pending.pop()
            if isinstance(one, dict):
                path = one.get("path")
                if path is not None and not (isinstance(path, str) and self.home.uploaded(Path(path))):
                    return False
                pending += one.values()
            elif isinstance(one, list):
                pending += one
        return True

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Why a request is refused, as HTTP status and sentence; None if it is not."""
        path, method = scope["path"], scope["method"]
        raw = scope.get("raw_path") or b""
        hosts, origins = _headers(scope, b"host"), _headers(scope, b"origin")
        if len(hosts) != 1 or not self.known(hosts[0]):
            return 403, "The studio does not answer to this host name. Start it with --name NAME to allow it."
        if any(urlsplit(origin).netloc.lower() != hosts[0].lower() for origin in origins):
            return 403, "Pages of other sites may not use the studio."
        if method == "POST" and _headers(scope, b"sec-fetch-site") not in ([], ["same-origin"]):
            return 403, "Pages of other sites may not use the studio."
        if len(raw) + len(scope.get("query_string", b"")) > MOST_URL:
            return 414, "This address is too long."
        if method not in ("GET", "HEAD", "POST"):
            return 405, "The studio does not do this."
        if path.startswith(FILE):
            served = method != "POST" and path.isprintable() and self.home.serves(path.removeprefix(FILE))
            return None if served else (404, "There is no such file here.")
        if ".." in path or not path.isascii() or not (POSTS if method == "POST" else PAGES).fullmatch(path):
            return 404, "There is no such page here."
        return None

    def known(self, host: str) -> bool:
        """Whether a Host header names this machine: an address, a local name, or one of `names`."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if re.search(r"[^\w.:\[\]-]", host) or urlsplit(f"//{host}").port == 0:
                return False
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return True


class _Limited:
    """`receive` of a request, which reports that the client is gone once more than `most` bytes came."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.left = receive, most

    async def __call__(self) -> Message:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        return message if self.left >= 0 else {"type": "http.disconnect"}


async def _buffered(receive: Receive) -> tuple[Receive, bytes | None]:
    """A `receive` that gives the body of a request once more, and the body; None if it is too large, or did not all come."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    waiting = iter(messages)

    async def again() -> Message:
        return next(waiting, None) or await receive()

    if messages[-1]["type"] == "http.disconnect":
        return again, None
    return again, b"".join(message.get("body", b"") for message in messages)


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
        await send(message)

    return sent


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})


def _headers(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _length(scope: Scope) -> int:
    """The announced size of a request's body in bytes; 0 if it is not announced."""
    found = _headers(scope, b"content-length")
    return int(found[0]) if found and found[0].isascii() and found[0].isdigit() else 0
