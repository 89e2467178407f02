"""How long a grid of many job folders takes to list, to report, and to resume when all is done: `python -m tools.grid_scale`."""

import json
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from unbraid.cli import grid, grid_file
from unbraid.runs import job_folder
from unbraid.runs.folder import JOB, RECORD
from unbraid.runs.grid import run
from unbraid.runs.grid_report import report
from unbraid.runs.job_folder import DONE

FIGURES = {"steps": 600, "loss": 0.1, "seconds": 60.0, "memory": 10**9, "machine": "one"}


def main(count: Annotated[int, typer.Option(help="Job folders, an even number.")] = 10_000) -> None:
    """Makes the folders, half of them done, and prints seconds. On a busy machine the processor time says more."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        Image.new("RGB", (32, 32), "orange").save(work / "fox.png")
        file, out = work / "grid.toml", work / "grid"
        file.write_text(
            f'verb = "split"\nsubject = "fox"\nstyle = "ink"\nout = "{out}"\nseeds = {list(range(count // 2))}\n'
            f'[[pictures]]\nimage = "{work / "fox.png"}"\n[settings]\nrank = [8, 16]\n'
        )
        _, runs = grid_file.read(file)
        job_folder.write_job(grid_file.job(runs[0], out, file))
        text = (out / runs[0].name / JOB).read_text()
        for i, one in enumerate(runs):
            folder = out / one.name
            folder.mkdir(exist_ok=True)
            rank = one.table["set"]["rank"]
            mine = text.replace("seed = 0", f"seed = {one.table['seed']}").replace("rank = 8", f"rank = {rank}")
            (folder / JOB).write_text(mine)
            if i % 2:
                (folder / RECORD).write_text(mine)
                (folder / DONE).write_text(
                    json.dumps(FIGURES | {"loss": 0.1 + 0.001 * (i % 7), "job": tomllib.loads(mine)})
                )
        begin = now()
        states = [job_folder.state(folder) for folder in job_folder.folders(out)]
        listed = now()
        lines = report(out, work / "report", "-loss")
        reported = now()
        for one in runs:
            (out / one.name / DONE).write_text(json.dumps(FIGURES))
        again = now()
        ended = sum(event.done for event in run(grid._written(file, None, "")))
        resumed = now()
    print(f"{len(states)} job folders, {states.count('done')} done; {ended} skipped; report of {len(lines)} lines")
    spent = zip(("list", "report", "resume"), (begin, listed, again), (listed, reported, resumed), strict=True)
    for what, before, after in spent:
        print(f"{what}: {after[0] - before[0]:.1f} s, of which on the processor {after[1] - before[1]:.1f} s")


def now() -> tuple[float, float]:
    """Seconds of the clock, and of this process on the processor, the system's work for it included."""
    return time.perf_counter(), time.process_time()


if __name__ == "__main__":
    typer.run(main)
