"""A training as a process of its own, which goes on when the studio ends. Its folder records which process it is."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from unbraid.common.atomic import atomic
from unbraid.common.errors import UsageError

RECORD, LOG = "process.json", "log.txt"
PYTHON = (sys.executable, "-P", "-m", "unbraid")  # -P: no module is imported from the folder in which it runs
_children: list[subprocess.Popen[bytes]] = []  # those that this studio started: their exit status must be read


def start(words: Sequence[str], folder: Path, device: str) -> None:
    """Start `unbraid WORDS` in a session of its own, with its output in the folder's log.txt. `device`: for the record."""
    command = [*PYTHON, *words, *(["--device", device] if device else [])]
    with (folder / LOG).open("ab") as log:
        child = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    _children.append(child)
    try:
        born = psutil.Process(child.pid).create_time()
    except psutil.Error:  # it has ended already
        born = 0.0
    write_json(folder / RECORD, record(folder) | {"pid": child.pid, "born": born, "device": device})


def record(folder: Path) -> dict[str, Any]:
    """What the studio has written down of a folder's process; empty if it has started none, and has not been asked to stop it."""
    return read_json(folder / RECORD)


def found(folder: Path) -> psutil.Process | None:
    """The running process of a folder, or None. A later process with the same number is not taken for it."""
    for child in _children[:]:
        if child.poll() is not None:
            _children.remove(child)
    known = record(folder)
    try:
        process = psutil.Process(int(known["pid"]))
        same = abs(process.create_time() - float(known["born"])) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return None
    return process if same else None


def interrupt(folder: Path) -> None:
    """Interrupt the process of a folder as Ctrl-C does."""
    if process := found(folder):
        try:
            process.terminate() if os.name == "nt" else process.send_signal(signal.SIGINT)
        except psutil.Error as error:
            raise UsageError("cannot be stopped", f"process {process.pid}", "Stop it by hand.") from error


def terminate(folder: Path) -> None:
    """End the process of a folder that did not react to `interrupt`. What it saved stays."""
    if process := found(folder):
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            return


def tail(folder: Path, size: int = 4000, name: str = LOG) -> str:
    """The last `size` bytes of a folder's log.txt, or of another file, as text; empty if there is none."""
    try:
        with (folder / name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty if there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(value, indent=1), "utf-8")
