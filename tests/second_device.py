"""`second`: a torch device that is not the CPU but uses host memory, built from second_device.cpp on first use.

A forgotten `.cpu()`, `.numpy()` of a tensor on the device, mixed devices and a CPU generator fail on it as on CUDA. It
counts the operations that make the host wait.
"""

import hashlib
import shutil
import sysconfig
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

NAME = "second_device"  # no adapter may have this name, because torch adds a method of this name to every module
SOURCE = Path(__file__).with_suffix(".cpp")


@dataclass
class Copies:
    """Since it was created: how often the host waited for a value, and how often it sent one."""

    to_host: int = 0
    from_host: int = 0


@cache
def available() -> str:
    """Build, load and register the device. Returns an empty string, or the reason if there is no compiler; other errors are
    raised."""
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(compiler) or not cpp_extension.is_ninja_available():
        return f"the second device cannot be built: no {compiler} or no ninja here"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "the second device cannot be built: no Python.h here"
    made = _built()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module(made))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return ""


@pytest.fixture(scope="session")
def second() -> str:
    """The device's name. Skips the test if no compiler works."""
    if reason := available():
        pytest.skip(reason)
    return NAME


@contextmanager
def host_copies() -> Iterator[Copies]:
    """Counts copies inside the `with` block; read the result after it."""
    made, found = _built(), Copies()
    begin = made.to_host(), made.from_host()
    yield found
    found.to_host, found.from_host = made.to_host() - begin[0], made.from_host() - begin[1]


def allocated() -> int:
    """Bytes of the tensors on the device that were made there or copied to it. The results of operators are not counted."""
    return _built().allocated()


@cache
def _built() -> Any:
    """Compile once per source and version of torch. Test workers wait for each other."""
    from torch.utils import cpp_extension

    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    folder = Path(torch.hub._get_torch_home()) / "unbraid-tests" / f"second-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (folder / "lock").unlink(
            missing_ok=True
        )  # torch's, left by a build that was killed: it would be waited for without end
        return cpp_extension.load(
            "unbraid_second", [str(SOURCE)], build_directory=str(folder), extra_cflags=["-O1", "-std=c++20", "-w"]
        )


def _module(made: Any) -> types.ModuleType:
    """`torch.second`: the functions that torch's code expects from a device's module."""
    module = types.ModuleType(f"torch.{NAME}")
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
        "manual_seed": lambda seed: made.generator().manual_seed(seed),
        "manual_seed_all": lambda seed: made.generator().manual_seed(seed),
        "get_rng_state": lambda device=None: made.generator().get_state(),
        "set_rng_state": lambda state, device=None: made.generator().set_state(state),
    }
    module.__dict__.update(answers)
    return module
