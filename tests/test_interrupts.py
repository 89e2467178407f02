"""Ctrl-C while weights are read ends as an interruption, not as a report of a damaged file that a user might then delete."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError

from unbraid.bases import base as bases
from unbraid.bench.field import models
from unbraid.bench.truth import judge
from unbraid.common.interrupts import interrupts_kept
from unbraid.files.formats import header
from unbraid.runs import folder


def swallowed() -> None:
    """SIGINT, and what torch does where it makes a tensor of bytes."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        return
    raise AssertionError("no signal came")


def unreadable(*given: Any, **named: Any) -> NoReturn:
    swallowed()
    raise SafetensorError("could not determine the shape")


def test_a_swallowed_interrupt_is_raised_again_and_the_handler_is_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        swallowed()
    with pytest.raises(KeyboardInterrupt), interrupts_kept(), interrupts_kept():
        unreadable()
    with pytest.raises(ValueError, match="another"), interrupts_kept():
        raise ValueError("another")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_and_an_ignored_signal_stay_as_they_are() -> None:
    seen: list[Any] = []

    def inside() -> None:
        with interrupts_kept():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inside()
    signal.signal(signal.SIGINT, before)
    assert seen == [before, signal.SIG_IGN]


def _lora(path: Path) -> None:
    with header.opened(path):
        pass


@pytest.mark.parametrize(
    ("module", "name", "read"),
    [
        (folder, "safe_open", lambda path: folder.load_state(path.parent)),
        (header, "safe_open", _lora),
        (judge, "load_file", judge.load_judge),
        (models, "load_file", lambda path: models._read(path, "CSD")),
        (bases, "open_pipeline", lambda path: bases.load()),
    ],
)
def test_no_reader_takes_an_interrupt_for_damage(
    module: Any, name: str, read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save_state(tmp_path, {"a": torch.ones(1)})
    monkeypatch.setattr(module, name, unreadable)
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / folder.STATE)
