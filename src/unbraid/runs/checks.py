"""What is checked of jobs before a base is loaded."""

from collections.abc import Sequence

from unbraid.bases.loadable import check_loading
from unbraid.common.errors import UsageError
from unbraid.images.crop import check_size
from unbraid.methods import METHODS
from unbraid.runs import folder
from unbraid.runs.job import Job, opened_images, prompts_of, record


def check(job: Job, resume: bool) -> None:
    """Check words, pictures, the base and the folder of a job. UsageError for the first that is wrong."""
    texts = prompts_of(job)
    _check_pictures(job)
    check_loading(job.base, job.loading)
    folder.claimable(job.out, record(job, texts), resume)


def check_all(jobs: Sequence[Job]) -> None:
    """Check words, pictures and bases of many jobs, each picture once for each method, and each base once for each way to open it."""
    pictures = {(job.method, tuple(job.data.images.items())): job for job in jobs}
    bases = {(job.base, job.loading): job for job in jobs}
    for some, one_check in (
        (jobs, prompts_of),
        (pictures.values(), _check_pictures),
        (bases.values(), lambda job: check_loading(job.base, job.loading)),
    ):
        for job in some:
            try:
                one_check(job)
            except UsageError as error:
                raise UsageError(error.what, f"{job.out.name}: {error.where}", error.fix) from error


def _check_pictures(job: Job) -> None:
    opened = opened_images(job)
    for role, images in opened.items():
        for image, path in zip(images, job.data.images[role], strict=True):
            check_size(image, path)
    METHODS[job.method].inputs.check(opened, job.data.images)
