"""Does unbraid work here? Everything that it does, on the base and the device at hand, in the shortest runs that there are."""

import platform
import shutil
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from unbraid.bases.devices import pick_device
from unbraid.bases.pipeline import location, quiet
from unbraid.common.errors import UsageError, first_line, suggestion
from unbraid.runs.selftest.checks import Check, checks
from unbraid.runs.selftest.scene import Scene

LIBRARIES = ("unbraid", "torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Row:
    """How a check went. `seconds`; `peak` and `estimate` in bytes of the device's memory, where they are known."""

    name: str
    passed: bool
    seconds: float
    note: str = ""  # a remark, or in one line why it failed
    peak: int | None = None
    estimate: int | None = None
    trace: str = ""


def selftest(
    base: str = "icons", *, device: str | None = None, only: Sequence[str] = (), keep: str | Path | None = None
) -> list[Row]:
    """All checks, or those of the names in `only`. They work in a temporary folder, or in `keep`, a new one that stays."""
    where = pick(device)
    chosen = choose(where, only)
    with working(keep) as folder:
        return list(run_checks(chosen, Scene(base, where, folder)))


def pick(device: str | None) -> str:
    """A device that there is. UsageError if there is no such one."""
    name = device or pick_device()
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch's, of a build without that kind of device too
        what = f"there is no such device ({first_line(error)})"
        raise UsageError(what, f"--device {name}", f"Leave it out for {pick_device()}.") from error
    return name


def choose(device: str, only: Sequence[str] = ()) -> tuple[Check, ...]:
    """The rows of a device, or those of the names given. UsageError for a name that there is not."""
    all_of_them = checks(device)
    names = [check.name for check in all_of_them]
    for name in only:
        if name not in names:
            raise UsageError(f"there is no row {name!r} on {device}", "--only", suggestion(name, names))
    return tuple(check for check in all_of_them if not only or check.name in only)


@contextmanager
def working(keep: str | Path | None) -> Iterator[Path]:
    """A folder to work in: a temporary one, or `keep`. UsageError if that is not empty."""
    if keep is None:
        with TemporaryDirectory(prefix="unbraid-selftest-") as name:
            yield Path(name)
        return
    folder = Path(keep)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("is not an empty folder", folder, "Give --keep a new one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot be made ({error.strerror})", folder, "Choose another folder.") from error
    yield folder


def run_checks(chosen: Sequence[Check], scene: Scene) -> Iterator[Row]:
    """Each check's row as it is done. One that fails does not stop the others; a base that cannot be found stops all."""
    location(scene.base)
    for check in chosen:
        with quiet():
            row = _row(check, scene)
        yield row


def _row(check: Check, scene: Scene) -> Row:
    on_cuda = scene.device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(scene.device)
    begin = time.perf_counter()
    try:
        found = check.function(scene)
    except UsageError as error:
        return Row(check.name, False, time.perf_counter() - begin, first_line(error), trace=traceback.format_exc())
    except Exception as error:  # noqa: BLE001  # whatever a strange driver or library raises is what this command is to report
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Row(check.name, False, time.perf_counter() - begin, reason, trace=traceback.format_exc())
    peak = torch.cuda.max_memory_allocated(scene.device) if on_cuda and found.peak is None else found.peak
    return Row(check.name, True, time.perf_counter() - begin, found.note, peak, found.estimate)


def about(base: str, device: str) -> dict[str, str]:
    """What somebody who is to help has to know."""
    kind = torch.device(device).type
    facts = {name: _version(name) for name in LIBRARIES}
    facts |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    facts |= {"device": f"{device} ({_device_name(device)})"}
    if kind == "cuda":
        facts |= {"cuda": str(torch.version.cuda or torch.version.hip), "driver": _driver()}
    return facts | {"base": base}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()
