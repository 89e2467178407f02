"""A client that uses a studio as a browser does: over HTTP, by the ids of its components."""

import http.client
import json
import uuid
from typing import Any
from urllib.parse import quote, urlsplit


class Client:
    """A browser's session."""

    def __init__(self, url: str) -> None:
        self.host = urlsplit(url).netloc
        self.session = uuid.uuid4().hex
        self.config = json.loads(self.ask("GET", "/config")[1])
        self.ids = {one["props"].get("elem_id") or one["id"]: one["id"] for one in self.config["components"]}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """The status and body of an answer."""
        connection = http.client.HTTPConnection(self.host, timeout=300)
        try:
            connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        """Upload a file, and describe it as a browser does."""
        border = uuid.uuid4().hex
        head = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode("utf-8", "surrogateescape") + data + f"\r\n--{border}--\r\n".encode()
        kind = f"multipart/form-data; boundary={border}"
        status, answer = self.ask("POST", "/gradio_api/upload", body, content_type=kind)
        assert status == 200, answer
        return {"path": json.loads(answer)[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def event(self, target: str, kind: str = "click") -> dict[str, Any]:
        """The event of a component, by its elem_id."""
        wanted = [self.ids[target], kind]
        return next(one for one in self.config["dependencies"] if wanted in [list(pair) for pair in one["targets"]])

    def call(self, target: str, values: dict[str, Any], kind: str = "click") -> dict[str, Any]:
        """Fire an event. `values`: elem_id or label → value; other fields have the values of a fresh page.

        Returns the message with which gradio answers."""
        event = self.event(target, kind)
        parts = {one["id"]: one["props"] for one in self.config["components"]}
        data = []
        for number in event["inputs"]:
            props = parts[number]
            names = (props.get("elem_id"), props.get("label"))
            data.append(next((values[name] for name in names if name in values), props.get("value")))
        return self.send(event["id"], data)

    def tick(self) -> dict[str, Any]:
        """What the page Queue asks for every two seconds."""
        radio = self.ids["runs"]
        ticks = (one for one in self.config["dependencies"] if any(pair[1] == "tick" for pair in one["targets"]))
        event = next(one for one in ticks if radio in one["outputs"])
        return self.send(event["id"], [None] * len(event["inputs"]))

    def send(self, number: int, data: list[Any]) -> dict[str, Any]:
        body = {"fn_index": number, "data": data, "session_hash": self.session, "event_data": None, "trigger_id": None}
        status, answer = self.ask(
            "POST", "/gradio_api/queue/join", json.dumps(body).encode(), content_type="application/json"
        )
        if status != 200:
            return {"success": False, "status": status, "output": {"error": answer.decode()}}
        return self._listen(json.loads(answer)["event_id"])

    def _listen(self, event: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.host, timeout=300)
        try:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={quote(self.session)}")
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    message = json.loads(line[6:])
                    if message["msg"] == "process_completed" and message["event_id"] == event:
                        return message
        finally:
            connection.close()
        raise AssertionError("no answer")
