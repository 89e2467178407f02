"""What a split is for, as pictures: its subject in other styles, and other subjects in its style."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from unbraid.bases.words import words_of
from unbraid.methods import METHODS
from unbraid.runs.job import RARE, Job, prompts_of

MOST = 4  # pictures in a row
# Small bases know the first ones, all others the last ones.
SUBJECTS = ("bell", "doughnut", "castle", "panda", "teapot", "bicycle", "lighthouse")
STYLES = ("cartoon", "flat", "glossy", "sepia", "watercolour", "pencil sketch", "pixel art", "oil painting")


@dataclass(frozen=True)
class Row:
    """A row of the sheet: one adapter alone. prompts: label of a picture → what it is drawn with."""

    title: str
    adapter: str
    prompts: Mapping[str, str]


def rows(job: Job) -> list[Row]:
    """The rows for a job. Empty if its method has no adapter for content and for style, or prompts that name neither."""
    data, method = job.data, METHODS[job.method]
    subject, style = data.words.get("subject"), data.words.get("style")
    if not subject or not style or not {"content", "style"} <= method.outputs(job.settings).keys():
        return []

    def prompts(role: str, word: str, others: Iterable[str]) -> dict[str, str]:
        jobs = {other: replace(job, data=replace(data, words={**data.words, word: other})) for other in others}
        return {other: prompts_of(one).get(role, "") for other, one in jobs.items()}

    known = words_of(job.base)
    other_styles = _others(STYLES, known and known.styles, style)
    other_subjects = _others(SUBJECTS, known and known.subjects, subject)
    rare = data.words.get("rare", RARE) + " "  # it names this subject, not another one
    found = [
        Row(f"content: this {subject} in other styles", "content", prompts("both", "style", other_styles)),
        Row(
            f"style: other subjects in {style} style",
            "style",
            {word: text.replace(rare, "") for word, text in prompts("style", "subject", other_subjects).items()},
        ),
    ]
    return [row for row in found if len(set(row.prompts.values())) == MOST]


def _others(wanted: Sequence[str], known: Sequence[str] | None, given: str) -> list[str]:
    """Words other than the given one: the first of those that a small base knows, or the last ones."""
    some = [word for word in wanted if word != given and (known is None or word in known)]
    return some[:MOST] if known else some[-MOST:]
