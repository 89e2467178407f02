"""The tools that choose settings and that check the judge."""

from pathlib import Path

import pytest

from tools import choose, second_opinion
from unbraid.bases.families import BLOCKS
from unbraid.bench import results
from unbraid.bench.registry import all_rows
from unbraid.bench.results import Drawing, Unit
from unbraid.bench.rows.cost import Cost
from unbraid.bench.truth.art import held_out_art, to_image
from unbraid.bench.truth.subjects import held_out
from unbraid.bench.truth.tasks import FULL, OTHERS, PLACE, QUICK, SHOWN, TAUGHT
from unbraid.methods import METHODS
from unbraid.runs.settings import open_settings, resolve


def test_settings_are_chosen_on_other_pictures_than_those_of_the_benchmark() -> None:
    used = {*FULL.subjects, *QUICK.subjects, PLACE, *TAUGHT, *OTHERS, *SHOWN}
    assert set(choose.SUBJECTS) <= set(held_out()) and not set(choose.SUBJECTS) & used


@pytest.mark.parametrize("method", choose.SEARCHES)
def test_a_search_is_of_settings_that_its_method_has_and_of_a_row_that_trains_it(method: str) -> None:
    search = choose.SEARCHES[method]
    (row,) = (one for one in all_rows() if (one.task, one.name) == (search.task, search.row))
    assert method in row.methods and set(search.values) <= set(open_settings(METHODS[method]))
    for name, values in search.values.items():
        for value in values:
            METHODS[method].make(BLOCKS["sdxl"], **resolve(method, "icons", None, {name: value}))
    assert len(choose.todos(Path("work"), row, {}, "icons")) in (len(choose.SUBJECTS), len(choose.STYLES))


def test_a_value_must_be_ahead_by_more_than_its_standard_error() -> None:
    old = {"a": 0.5, "b": 0.5, "c": 0.5}
    assert choose.better({"a": 0.6, "b": 0.55, "c": 0.6}, old)
    assert not choose.better({"a": 0.9, "b": 0.4, "c": 0.4}, old)
    assert not choose.better(old, old)


@pytest.mark.slow
def test_another_network_finds_subjects_across_sets_and_agrees_with_a_judge_that_is_right(tmp_path: Path) -> None:
    """Chance is 0.05. Drawings that are the truth, or another subject: a judge that knows which gets a positive correlation."""
    embed, art = second_opinion.efficientnet(), held_out_art()
    assert second_opinion.content_top1(embed, art.values[:20]) > 0.5
    truth, wrong = (art.picture(name, "openmoji") for name in ("fox", "pizza"))
    drawings = []
    for i, (picture, content) in enumerate(
        [(truth, 1.0), (wrong, 0.1), ((truth + wrong) / 2, 0.6), (1 - wrong, 0.0), (truth * 0.9, 0.9)]
    ):
        to_image(picture).save(tmp_path / f"{i}.png")
        drawings.append(Drawing("both", "a fox", "fox", "line art", i, f"{i}.png", {"content": content}))
    unit = Unit("k", "separate", "row", "cell, seed 0", 0, tuple(drawings), None, Cost(), {})
    folder = tmp_path / "units" / "one"
    folder.mkdir(parents=True)
    results.write(unit, folder / "unit.json")
    found = second_opinion.correlations(tmp_path, embed)
    assert found["drawings"] == 5 and found["all"] > 0.6 and found["within"] > 0.6
