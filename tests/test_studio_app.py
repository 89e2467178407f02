"""The studio over HTTP, as a browser uses it: forms, queue, and requests that must be refused."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from studio_client import Client
from test_run import cli_in_process

from tools.screenshots import running
from unbraid.bases.base import load
from unbraid.core.lora import Lora
from unbraid.files.lora_file import write
from unbraid.methods import ENTRIES
from unbraid.runs.settings import open_settings
from unbraid.runs.shortest import settings
from unbraid.studio import process, queue
from unbraid.studio.safety import Home, open_home

pytest.importorskip("gradio", reason="the studio needs gradio: pip install unbraid[studio]")
pytestmark = pytest.mark.slow
FEW = {name: value for name, value in settings("unziplora").items() if not isinstance(value, bool)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("studio")
    (folder / "secret.png").write_bytes(b"secret")
    return open_home(folder / "studio")


@pytest.fixture(scope="module")
def url(home: Home, v_base: Path) -> Iterator[str]:
    with running(home.folder, "--base", str(v_base)) as address:
        yield address
    for run in queue.runs(home):
        process.terminate(run.folder)


@pytest.fixture
def client(url: str) -> Client:
    return Client(url)


def finished(home: Home, name: str) -> queue.Run:
    end = time.monotonic() + 240
    while (run := queue.look(home.run(name))).state not in ("done", "failed", "stopped"):
        assert time.monotonic() < end, (run, process.tail(run.folder))
        time.sleep(0.2)
    return run


def split(client: Client, picture: Path, base: Path, **more: Any) -> dict[str, Any]:
    given = {"split-picture": client.upload("cat.png", picture.read_bytes()), "Subject": "cat", "Style": "ink"}
    return client.call("split-start", {**given, "Base": str(base), **FEW, **more})


def test_split_from_upload_to_loras(client: Client, home: Home, picture: Path, v_base: Path) -> None:
    answer = split(client, picture, v_base)
    assert answer["success"], answer
    name = answer["output"]["data"][0].split("**")[1]
    assert (run := finished(home, name)).state == "done", process.tail(run.folder)
    shown = client.tick()["output"]["data"]
    assert f"<h3>{name}</h3>" in shown[1] and "done" in shown[1]
    files = {Path(one["path"]).name: one["url"] for one in shown[3]["value"]}
    assert files.keys() == {"content.safetensors", "style.safetensors"}
    status, data = client.ask("GET", files["style.safetensors"].partition(client.host)[2])
    assert status == 200 and data == (run.folder / "style.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("reads", "refused"), [("", ""), ("own", ""), ("style", "style is called"), ("all", "choices")]
)
def test_what_a_lora_reads(client: Client, home: Home, reads: str, refused: str) -> None:
    layer, name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "reads.safetensors"
    lora = Lora(torch.zeros(2, 256), torch.zeros(256, 2), 2.0)
    write(home.loras / name, {layer: lora}, family="sdxl", metadata={"unbraid.prompt": "a cat in ink style"})
    given = {"Prompt": "a dog", "lora-0": f"loras/{name}", "Reads": reads, "Steps": 1, "How many pictures": 1}
    answer = client.call("draw", given)
    assert answer["success"] == (not refused), answer
    assert refused in json.dumps(answer), "its file names no style; there is no such choice"


@pytest.mark.parametrize(
    ("acts", "refused"), [("all", ""), ("content", ""), ("style", "has no layers besides"), ("both", "choices")]
)
def test_where_a_lora_acts(client: Client, home: Home, v_base: Path, acts: str, refused: str) -> None:
    """A LoRA whose only layer serves content on this base."""
    name = "acts.safetensors"
    layer = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    width = load(str(v_base)).denoiser.get_submodule(layer).in_features
    write(home.loras / name, {f"unet.{layer}": Lora(torch.zeros(2, width), torch.zeros(width, 2), 2.0)}, family="sdxl")
    given = {"Prompt": "a dog", "lora-0": f"loras/{name}", "Acts in": acts, "Steps": 1, "How many pictures": 1}
    answer = client.call("draw", {**given, "Base": str(v_base)})
    assert answer["success"] == (not refused), answer
    assert refused in json.dumps(answer)


def test_the_form_has_every_setting_of_the_methods(client: Client) -> None:
    labels = {one["props"].get("label") for one in client.config["components"]}
    for entry in ENTRIES:
        if entry.verb == "split":
            assert open_settings(entry).keys() <= labels


def test_what_would_it_take(client: Client, picture: Path, v_base: Path) -> None:
    given = {"split-picture": client.upload("cat.png", picture.read_bytes()), "Subject": "cat", "Style": "ink"}
    text = client.call("split-look", {**given, "Base": str(v_base), **FEW})["output"]["data"][0]
    assert "memory, estimated" in text and "--set rank=2" in text and "time, estimated" in text


BAD = {
    "Subject": ["", "  ", "x" * 301, "a\x00b", None, {"path": "/etc/passwd"}],
    "Base": ["/etc", "someone/else", "../icons", 7],
    "rank": [0, -1, 1e300, 2.5, "four", "0x10", True, 10**9],
    "compat": ["none; rm -rf ~", 7],
    "Method": ["zip", "../x", 7],
    "seed": [-1, "x", 2**70],
    "split-picture": [
        None,
        "/etc/passwd",
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "HOME/../secret.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "HOME/cache/../../secret.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "x", "url": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}},
        {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}},
        {"path": None, "url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}},
    ],
}


@pytest.mark.parametrize(("field", "value"), [(key, one) for key, some in BAD.items() for one in some], ids=ascii)
def test_bad_fields_are_refused(
    client: Client, home: Home, picture: Path, v_base: Path, field: str, value: Any
) -> None:
    before = {run.name for run in queue.runs(home)}
    value = json.loads(json.dumps(value).replace("HOME", str(home.folder)))
    answer = split(client, picture, v_base, **{field: value})
    assert not answer["success"] and not [*home.folder.rglob("*secret*"), *home.folder.rglob("*passwd*")]
    assert {run.name for run in queue.runs(home)} == before


def test_names_of_uploads_do_not_lead_out(client: Client, home: Home) -> None:
    for name in ("../../../out.png", "/etc/out.png", "..\\..\\out.png", "a/../../out.png", ".hidden.png", "con.png"):
        path = Path(client.upload(name, b"x")["path"])
        assert path.resolve().is_relative_to(home.folder / "cache"), name


@pytest.mark.parametrize("name", ["", "..", "../studio", "/etc", "a\x00", None, 7, ["x"]], ids=ascii)
def test_buttons_of_the_queue_know_their_own_runs_alone(client: Client, home: Home, name: Any) -> None:
    before = sorted(home.folder.parent.rglob("*"))
    assert not client.call("remove", {"runs": name})["success"]
    assert [path for path in before if not path.exists() and "cache" not in path.parts] == []


def test_an_error_is_a_sentence_of_the_command_line(client: Client, picture: Path, v_base: Path) -> None:
    answer = split(client, picture, v_base, rank=0)
    assert answer["output"]["error"].startswith("setting rank: 0 is out of range")
    given = {"split-picture": client.upload("cat.png", b"hello"), "Subject": "cat", "Style": "ink"}
    answer = client.call("split-start", {**given, "Base": str(v_base)})
    assert answer["output"]["error"].startswith("cat.png: this is not an image that can be read")


def test_other_hosts_need_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBRAID_STUDIO_PASSWORD", "")
    monkeypatch.chdir(tmp_path)
    code, text = cli_in_process(["studio", "--host", "0.0.0.0", "--port", "0", "--no-open"])
    assert code == 1 and "needs a password" in text
    with running(tmp_path / "one", "--host", "0.0.0.0", env={"UNBRAID_STUDIO_PASSWORD": "open"}) as address:
        host = address.replace("http://0.0.0.0", "127.0.0.1")
        stranger = object.__new__(Client)
        stranger.host = host
        assert stranger.ask("GET", "/config")[0] == 401
        assert stranger.ask("POST", "/gradio_api/queue/join", b"{}", content_type="application/json")[0] == 401
        form = {"content_type": "application/x-www-form-urlencoded"}
        assert stranger.ask("POST", "/login", b"username=unbraid&password=wrong", **form)[0] == 400
        assert stranger.ask("POST", "/login", b"username=unbraid&password=open", **form)[0] == 200
