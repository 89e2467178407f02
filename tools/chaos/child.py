"""A case in a process of its own. It is forked, so that the libraries need not be imported again."""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from unbraid.common.errors import LONGEST as MESSAGE

LONGEST = 25.0  # seconds that a command may take
MEMORY = 8 * 2**30  # bytes of address space
Work = Callable[[], int]


@dataclass(frozen=True)
class Ended:
    """How a child ended. `code`: the exit status, negative for a signal. `text`: what it wrote to stderr."""

    code: int
    text: str
    seconds: float
    timed_out: bool = False


def start(work: Work, log: Path, limits: Mapping[int, int] | None = None) -> int:
    """Fork a child that does `work` and exits with what it returns; gives its process id. stdout and stderr go to `log`.

    `limits`: further limits of the kernel, such as RLIMIT_FSIZE → bytes."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child is ready to be interrupted
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return pid
    code = 70
    try:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(file, 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for which, value in {resource.RLIMIT_AS: MEMORY, **(limits or {})}.items():
            resource.setrlimit(which, (value, resource.getrlimit(which)[1]))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001 (the parent counts it as a broken promise)
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def wait(pid: int, log: Path, longest: float = LONGEST) -> Ended:
    """Wait for a child, and kill it if it takes too long."""
    begin, timed_out = time.monotonic(), False
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - begin > longest and not timed_out:
            os.kill(pid, signal.SIGKILL)
            timed_out = True
        time.sleep(0.005)
    text = log.read_text("utf-8", "replace") if log.exists() else ""
    return Ended(os.waitstatus_to_exitcode(done[1]), text, time.monotonic() - begin, timed_out)


def command(words: list[str]) -> Work:
    """The command line with these words, as work for `start`."""

    def work() -> int:
        from unbraid.cli.main import main

        sys.argv = ["unbraid", *words]
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        try:
            main()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return 0

    return work


def one_line(ended: Ended) -> str:
    """What is wrong with how a command ended; empty if it succeeded, or refused its input in one printable line."""
    lines = [line for line in ended.text.splitlines() if line.startswith("unbraid: ")]
    if ended.timed_out:
        return f"more than {LONGEST:g} s"
    if "Traceback" in ended.text or ended.code not in (0, 1, 2, 3):
        return f"exit {ended.code}: {ended.text.strip()[-300:]}"
    if ended.code == 1 and (
        len(lines) != 1 or not lines[0].isprintable() or len(lines[0]) > len("unbraid: ") + MESSAGE
    ):
        return f"no single printable line: {ended.text[:300]!r}"
    return ""
