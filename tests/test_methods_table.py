"""docs/methods.md is made from the methods' entries, and recipes use the inputs that their entries declare."""

import re
from pathlib import Path

import pytest

from tools.methods_table import page
from unbraid.bases.families import BLOCKS
from unbraid.methods import ENTRIES, METHODS
from unbraid.methods.entry import Entry

DOCS = Path(__file__).parent.parent / "docs" / "methods.md"


def test_the_table_is_the_entries() -> None:
    assert DOCS.read_text() == page(), "run python -m tools.methods_table > docs/methods.md"


@pytest.mark.parametrize("entry", ENTRIES, ids=METHODS)
def test_a_method_reads_the_inputs_that_it_declares(entry: Entry) -> None:
    """`partner2` and `before3` are further pictures of a role."""
    pictures = {one.role for one in entry.inputs.of_kind("picture", "pictures")}
    assert pictures and len({one.role for one in entry.inputs.of_kind("LoRA", "module")}) in (0, 2)
    for recipe in entry.make(BLOCKS["sdxl"]):
        read = {branch.image for step in range(recipe.steps) for branch in recipe.branches(step)}
        assert {re.sub(r"\d+$", "", role) for role in read} <= pictures
