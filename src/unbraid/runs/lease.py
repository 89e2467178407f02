"""The lease on a job folder: which worker is at work in it, of all machines that share the folder.

A lease is a small file `.lease-N`. A worker takes it by creating the file with the next N, which only one can do: a hard link
is made atomically on local disks and on NFS alike. The time of the file is the holder's last sign of life. A lease that had none
for `TERM` has expired, and another worker may create N + 1; whoever holds N then finds that it is no longer the newest, and stops
before it writes anything. On one machine the lock of `folder.locked` already keeps runs apart; it is held when a lease is taken,
and the system frees it when a process dies, so a lease of this machine that is still there belongs to a dead process.
"""

import errno
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from uuid import uuid4

import psutil

from unbraid.common.errors import UsageError

TERM = 120.0  # seconds without a sign of life after which a lease has expired
BEAT = 15.0  # seconds between signs of life
SKEW = 60.0  # seconds by which the clocks of two machines may differ
PREFIX = ".lease-"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
Clock = Callable[[], float]


class AtWorkError(UsageError):
    """Another worker is at work in the folder."""


class NoLinksError(UsageError):
    """The folder's file system has no hard links, and so no leases."""


@dataclass(frozen=True)
class Holder:
    """Who holds the newest lease of a folder. `beat`: its last sign of life, in seconds since 1970."""

    number: int
    machine: str
    beat: float
    process: int = 0

    def alive(self, clock: Clock = time.time) -> bool:
        """Whether the lease may still be held, as seen from another machine."""
        return clock() < self.beat + TERM + SKEW

    def at_work(self) -> bool:
        """Whether the lease may still be held. Of this machine it is known if the process is there."""
        return self.alive() and (self.machine != this_machine() or psutil.pid_exists(self.process))


@cache
def this_machine() -> str:
    """The name of this machine, with what tells its boots and copies apart where the system says it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with suppress(OSError):
        return f"{platform.node()} {boot.read_text().strip()}"
    return platform.node()


def newest(out: Path) -> Holder | None:
    """The newest lease of a folder; None if there is none."""
    while numbers := _numbers(out):
        with suppress(FileNotFoundError), (out / f"{PREFIX}{numbers[-1]}").open("rb") as file:  # opened: NFS looks anew
            found = _parsed(file.read())
            machine, process = str(found.get("machine", "")), found.get("process")
            beat = os.fstat(file.fileno()).st_mtime
            return Holder(numbers[-1], machine, beat, process if isinstance(process, int) and process > 0 else 0)
    return None


def _parsed(data: bytes) -> dict[str, object]:
    """The content of a lease; empty if a machine that lost its power has left nothing or anything else there."""
    with suppress(ValueError):
        found = json.loads(data)
        return found if isinstance(found, dict) else {}
    return {}


def _numbers(out: Path) -> list[int]:
    names = (name.removeprefix(PREFIX) for name in os.listdir(out) if name.startswith(PREFIX))  # noqa: PTH208 (only names)
    return sorted(int(name) for name in names if name.isdecimal())


class Lease:
    """A lease that was taken. It is lost when it has expired, or when another worker has taken the next one."""

    def __init__(self, out: Path, number: int, machine: str, clock: Clock) -> None:
        self.out, self.number, self.machine, self.clock = out, number, machine, clock
        self.token, self.beat, self.lost = uuid4().hex, clock(), False
        self.path = out / f"{PREFIX}{number}"

    def held(self) -> bool:
        """Whether the folder is still this worker's."""
        if not self.lost:
            late = self.clock() >= self.beat + TERM
            self.lost = late or (self.out / f"{PREFIX}{self.number + 1}").exists() or not self._there()
        return not self.lost

    def _there(self) -> bool:
        try:
            return _parsed(self.path.read_bytes()).get("token") == self.token
        except FileNotFoundError:
            return False
        except OSError:  # the network is gone: until `TERM` nobody else can have taken the lease
            return True

    def check(self) -> None:
        """AtWorkError if the folder is no longer this worker's."""
        if not self.held():
            raise AtWorkError("another worker may have taken this run over", self.out, "It goes on from its last save.")

    def renew(self) -> None:
        """Give a sign of life. A lease that is lost stays lost."""
        if self.held():
            now = self.clock()
            with suppress(OSError):
                os.utime(self.path, (now, now))
                self.beat = now

    def release(self) -> None:
        """Give the folder back."""
        with suppress(OSError):
            if self._there():
                self.path.unlink()


def take(out: Path, machine: str = "", clock: Clock = time.time) -> Lease:
    """Take the lease of a folder. AtWorkError if another machine holds it, or is quicker. UsageError if the folder cannot hold one.

    The caller holds the lock of the folder, so a lease of its own machine is a dead worker's."""
    machine = machine or this_machine()
    busy = AtWorkError("another machine is at work in this folder", out, "Wait until it is done.")
    last = newest(out)
    if last and last.machine != machine and last.alive(clock):
        raise busy
    mine = Lease(out, last.number + 1 if last else 1, machine, clock)
    part = out / f".{mine.token}.part"
    try:
        part.write_text(json.dumps({"machine": machine, "process": os.getpid(), "token": mine.token}))
        os.utime(part, (mine.beat, mine.beat))
        os.link(part, mine.path)
    except FileNotFoundError as error:  # another worker, which has just taken the lease, tidied up
        raise busy from error
    except FileExistsError as error:
        if part.stat().st_nlink < 2:  # 2: NFS has made the link and lost the answer
            raise busy from error
    except OSError as error:
        fix = "Make room, or use a disk or NFS: a mounted bucket has no hard links."
        kind = NoLinksError if error.errno in NO_LINKS and part.exists() else UsageError
        raise kind(f"the lease cannot be written ({error.strerror})", out, fix) from error
    finally:
        part.unlink(missing_ok=True)
    if (_numbers(out) or [0])[-1] != mine.number:  # files came and went while they were listed
        mine.release()
        raise busy
    for number in _numbers(out)[:-1]:
        (out / f"{PREFIX}{number}").unlink(missing_ok=True)
    return mine


@contextmanager
def leased(out: Path, clock: Clock = time.time, needed: bool = True) -> Iterator[Lease | None]:
    """Hold the lease of a folder, with signs of life from a thread. If it is not `needed`: None where there cannot be one."""
    try:
        lease, ended = take(out, clock=clock), threading.Event()
    except NoLinksError:
        if needed:
            raise
        yield None
        return

    def beat() -> None:
        while not ended.wait(BEAT):
            lease.renew()

    thread = threading.Thread(target=beat, daemon=True, name="lease")
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        lease.release()
