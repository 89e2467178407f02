"""`python -m tools.chaos`: draw cases at random, and print what was broken, and how many cases there were in a minute."""

import gc
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer

from tools.chaos.hostile import Hostile
from tools.chaos.kills import Kills
from tools.chaos.material import material, tiny_base

KINDS = ("kills", "full disks", "settings", "files")


def chaos(
    work: Path,
    base: Path,
    seed: int,
    minutes: float = 1e9,
    cases: int = 10**9,
    only: str = "",
    steps: tuple[int, int] = (40, 80),
) -> tuple[Counter[str], list[str]]:
    """Run cases until the time or their number is reached. Returns the number of cases of each kind, and what was broken.

    A case depends on the seed and on its number alone, so a broken one can be repeated."""
    given = material(base, work / "given")
    gc.freeze()
    kills, hostile = Kills(base, given, work / "runs", steps), Hostile(base, given, work / "hostile")
    done, broken, begin = Counter[str](), list[str](), time.monotonic()
    for number in range(cases):
        if time.monotonic() - begin > 60 * minutes:
            break
        rng = random.Random(f"{seed}:{number}")
        kind = only or rng.choice(KINDS)
        if kind in ("kills", "full disks"):
            name, problem = kills.case(rng, number, kind == "full disks")
        else:
            name, problem = (hostile.settings if kind == "settings" else hostile.files)(rng, number)
        done[kind] += 1
        if problem:
            broken.append(f"{kind} {seed}:{number}: {name}: {problem}")
            print(f"BROKEN {broken[-1]}", flush=True)
    spent = max(time.monotonic() - begin, 1e-9) / 60
    print(f"{done.total()} cases in {spent:.1f} minutes, {done.total() / spent:.1f} a minute: {dict(done)}")
    print(
        f"broken: {len(broken)}; processes interrupted: {kills.interrupted}; hostile files and settings refused: {hostile.refused}"
    )
    print(f"batches at most {kills.worst:.2g} of the norm off")
    return done, broken


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 10.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same cases.")] = 0,
    only: Annotated[str, typer.Option(help=f"One kind of cases: {', '.join(KINDS)}.")] = "",
    cases: Annotated[int, typer.Option(help="At most so many cases.")] = 10**9,
    work: Annotated[Path | None, typer.Option(help="Folder to keep; default: a temporary one.")] = None,
) -> None:
    """Break things at random, and check what was promised. Exit status 1 if something was broken."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        _, broken = chaos(folder, tiny_base(folder / "base"), seed, minutes, cases, only)
    raise typer.Exit(bool(broken))


if __name__ == "__main__":
    typer.run(main)
