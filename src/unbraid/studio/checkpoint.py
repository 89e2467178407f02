"""The LoRAs of a training that is still at work, as its last save has them, to be tried."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from unbraid.bases.savings import drop_foreign_moments
from unbraid.common.errors import UsageError
from unbraid.runs import folder as run_folder
from unbraid.runs.batch import recorded
from unbraid.runs.job import opened_images, prompts_of
from unbraid.runs.outputs import written
from unbraid.runs.prepare import prepare
from unbraid.studio.drawing import using
from unbraid.studio.safety import Home


def checkpoint(home: Home, folder: Path) -> list[Path]:
    """Write the LoRAs of a run's last save into the studio's folder `loras`. The run itself goes on undisturbed.

    UsageError if nothing is saved yet."""
    saved = run_folder.load_state(folder)
    if saved is None:
        raise UsageError("it has no saved state", folder.name, "A training saves every 20 seconds, until it is done.")
    job = recorded(folder / run_folder.RECORD)
    texts, opened = prompts_of(job), opened_images(job)
    with ExitStack() as undo:
        base = undo.enter_context(using(job.base))
        out = Path(undo.enter_context(TemporaryDirectory(dir=home.folder / "cache")))
        ready = prepare(replace(job, out=out), texts, opened, base)
        undo.callback(ready.adapters.detach)
        ready.state.restore(drop_foreign_moments(saved, job.loading.preset)[0])
        made = [*written(ready, texts)]
        name = f"{folder.name}-step-{ready.state.step}"
        return [one.replace(home.new_file("loras", f"{name}-{one.stem}", ".safetensors")) for one in made]
