"""The lease on a job folder, with a stopped clock and several machines: no two workers ever hold it."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from unbraid.common.errors import UsageError
from unbraid.runs import folder, lease
from unbraid.runs.lease import SKEW, TERM, AtWorkError, Lease, newest, take, this_machine


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_second_machine_waits_until_the_lease_has_expired(tmp_path: Path, clock: Clock) -> None:
    first = take(tmp_path, "one", clock)
    for moment in (0, TERM - 1, TERM + SKEW - 1):
        clock.now = first.beat + moment
        with pytest.raises(AtWorkError, match="another machine is at work"):
            take(tmp_path, "other", clock)
        assert first.held() == (moment < TERM), "the holder stops long before another one may begin"
    clock.now = first.beat + TERM + SKEW
    second = take(tmp_path, "other", clock)
    assert second.held() and not first.held()
    with pytest.raises(AtWorkError, match="may have taken this run over"):
        first.check()


def test_signs_of_life_keep_it(tmp_path: Path, clock: Clock) -> None:
    first = take(tmp_path, "one", clock)
    for _ in range(20):
        clock.now += TERM - 1
        first.renew()
        with pytest.raises(AtWorkError):
            take(tmp_path, "other", clock)
    first.check()


def test_what_was_lost_stays_lost(tmp_path: Path, clock: Clock) -> None:
    """Also for a machine whose clock stood still, as that of a paused virtual machine: the file of the next holder tells it."""
    asleep = Clock()
    first = take(tmp_path, "one", asleep)
    clock.now += TERM + SKEW
    second = take(tmp_path, "other", clock)
    first.renew()
    assert not first.held() and second.held()
    second.release()
    first.renew()
    first.release()
    assert not first.held() and newest(tmp_path) is None
    third = take(tmp_path, "third", clock)  # its file has the number that the first one had
    assert third.path == first.path and third.held() and not first.held()
    fourth = Lease(tmp_path, 1, "one", clock)  # never taken
    fourth.release()
    assert not fourth.held() and third.held()


def test_of_many_at_one_moment_one_gets_it(tmp_path: Path, clock: Clock) -> None:
    """Round after round, with an expired lease in the way: exactly one of eight machines."""
    for _ in range(20):
        start, got = threading.Barrier(8), list[Lease]()

        def one(name: str, start: threading.Barrier = start, got: list[Lease] = got) -> None:
            start.wait()
            with suppress(AtWorkError):
                got.append(take(tmp_path, name, clock))

        threads = [threading.Thread(target=one, args=(f"machine {i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and got[0].held()
        assert [path.name for path in tmp_path.iterdir()] == [got[0].path.name]
        clock.now += TERM + SKEW


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path: Path, clock: Clock) -> None:
    """Whoever takes a lease has the folder's lock, which the system takes from a process that dies."""
    dead = take(tmp_path, this_machine(), clock)
    assert take(tmp_path, this_machine(), clock).held() and not dead.held()


def test_of_this_machine_it_is_known_whether_the_process_is_there(tmp_path: Path) -> None:
    held = take(tmp_path, this_machine())
    assert (holder := newest(tmp_path)) and holder.process == os.getpid() and holder.at_work()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    held.path.write_text(json.dumps({"machine": this_machine(), "process": ended.pid}))
    assert (holder := newest(tmp_path)) and holder.alive() and not holder.at_work()
    held.path.write_text(json.dumps({"machine": "another", "process": ended.pid}))
    assert (holder := newest(tmp_path)) and holder.at_work(), "of another machine it is not"


def test_a_folder_without_hard_links_is_told(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(UsageError, match=r"the lease cannot be written .Operation not permitted..*bucket"):
        take(tmp_path, "one", clock)
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_job_folder_is_a_lease_too(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / folder.JOB).touch()
    with folder.locked(tmp_path, clock) as check:
        held = newest(tmp_path)
        assert held and held.machine == this_machine() and held.alive(clock)
        check()
        clock.now += TERM
        with pytest.raises(AtWorkError):
            check()
    assert newest(tmp_path) is None
    other = take(tmp_path, "other", clock)
    part = tmp_path / ".1-0.part"  # what the other machine is just writing
    part.touch()
    with pytest.raises(AtWorkError), folder.locked(tmp_path, clock):
        pass
    assert part.exists() and other.held()


def test_the_signs_of_life_come_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.01)
    with lease.leased(tmp_path) as held:
        assert held
        before, deadline = held.beat, time.monotonic() + 60
        while held.beat == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held.beat > before and held.path.stat().st_mtime == pytest.approx(held.beat, abs=0.1)
    assert not list(tmp_path.iterdir())
