"""unbraid: take an image apart into a content LoRA and a style LoRA, and put LoRAs together again."""

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from unbraid.common.errors import UsageError

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import advises on torchvision, which is not used
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads of torch that wait in a loop starve on a busy machine

if TYPE_CHECKING:
    from unbraid.runs.api import learn, learn_job, pair, pair_job, split, split_job, zip, zip_job
    from unbraid.runs.batch import batch
    from unbraid.runs.break_make import break_job, break_module, make, make_job
    from unbraid.runs.cluster import Cluster
    from unbraid.runs.drawing import generate
    from unbraid.runs.grid import grid
    from unbraid.runs.push import push
    from unbraid.runs.run_path import Run
    from unbraid.sampling.render import Use

__all__ = [
    "Cluster", "Run", "UsageError", "Use", "batch", "break_job", "break_module", "generate", "grid", "learn", "learn_job",
    "make", "make_job", "pair", "pair_job", "push", "split", "split_job", "zip", "zip_job",
]  # fmt: skip
__version__ = version("unbraid")
BREAK_MAKE = ("break_job", "break_module", "make", "make_job")


def __getattr__(name: str) -> Any:
    """The verbs, loaded when they are first used: the file tools need no diffusers."""
    if name not in __all__:
        raise AttributeError(f"module 'unbraid' has no attribute {name!r}")
    from unbraid.runs import api, batch, break_make, cluster, drawing, grid, push, run_path
    from unbraid.sampling import render

    rooms = {
        "Cluster": cluster,
        "Run": run_path,
        "Use": render,
        "batch": batch,
        "generate": drawing,
        "grid": grid,
        "push": push,
        **dict.fromkeys(BREAK_MAKE, break_make),
    }
    return getattr(rooms.get(name, api), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
