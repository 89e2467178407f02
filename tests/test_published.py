"""Published tables: they are well-formed, have sources, and contain some known values."""

import math
import re
from pathlib import Path

import pytest

from unbraid.bench.reports.published import Table, _table, caption, cells, markdown, published, values
from unbraid.bench.reports.report import write
from unbraid.bench.results import Drawing, Unit
from unbraid.bench.rows.cost import Cost

SOURCE = re.compile(r"arXiv \d{4}\.\d{5}|[A-Z]{2,}[A-Za-z]* \d{4}")


@pytest.mark.parametrize("table", published(), ids=lambda t: f"{t.paper}-{t.title}")
def test_every_table_has_its_source_and_protocol(table: Table) -> None:
    assert SOURCE.fullmatch(table.source), table.source
    assert len(table.protocol) > 10 and table.protocol.endswith(".")
    assert table.rows and len(set(table.columns)) == len(table.columns)
    for name, row in table.rows.items():
        assert any(not math.isnan(value) for value in row), name
    for i, column in enumerate(table.columns):
        found = [row[i] for row in table.rows.values() if not math.isnan(row[i])]
        assert found, f"{column} is empty"
        if "%" in column:
            assert all(1 <= value <= 100 for value in found), column
        elif re.search("CLIP|DINO|CSD|DreamSim|harmonic|MARS", column):
            scale = 100 if "× 100" in table.protocol else 1
            assert all(0 < value < scale for value in found), column


def test_papers_and_baselines_are_there() -> None:
    papers = {table.paper for table in published()}
    assert {"ZipLoRA", "UnZipLoRA", "B-LoRA", "K-LoRA", "NP-LoRA", "ConsisLoRA", "DuoLoRA", "LoRA.rar"} <= papers
    assert len({(table.paper, table.title) for table in published()}) == len(published()), "titles tell tables apart"


@pytest.mark.parametrize(
    ("paper", "method", "metric", "value"),
    [
        ("UnZipLoRA", "UnZipLoRA", "style CSD", 0.265),
        ("UnZipLoRA", "B-LoRA", "prefer UnZipLoRA, recombination %", 77.14),
        ("ZipLoRA", "direct sum", "style CLIP-I", 0.702),
        ("ZipLoRA", "ZipLoRA", "seconds ↓", 560),
        ("B-LoRA", "B-LoRA", "style, single", 0.881),
        ("K-LoRA", "K-LoRA", "subject DINO", 46.9),
        ("NP-LoRA", "NP-LoRA", "users %", 49.5),
        ("ConsisLoRA", "B-LoRA", "style DreamSim ↓", 0.573),
        ("DuoLoRA", "ZipLoRA", "CLIP-T", 0.285),
    ],
)
def test_known_values(paper: str, method: str, metric: str, value: float) -> None:
    found = [one.value for one in values(method) if (one.paper, one.metric) == (paper, metric)]
    assert value in found


def test_what_is_not_reported_is_no_value() -> None:
    assert not any(math.isnan(one.value) for one in values())
    assert [one for one in values("ZipRank alone") if one.metric == "CLIP-T"] == []
    assert len(list(values())) == sum(
        not math.isnan(value) for table in published() for row in table.rows.values() for value in row
    )


def test_a_table_as_markdown() -> None:
    (table,) = (one for one in published() if (one.paper, one.title) == ("DuoLoRA", "alignment"))
    text = markdown([table])
    assert text.startswith("*Published figures") and "not comparable" in text
    assert "| ZipRank alone | 0.53 | 0.64 | – | 0.42 |" in text
    assert "| DuoLoRA | 0.56 | 0.69 | 0.314 | 0.48 |" in text
    assert caption(table) in text and "not checked" in caption(table)
    assert cells(table)[0] == ["", "DINO", "CLIP-I", "CLIP-T", "style CSD"]
    assert markdown().count("|---") == sum(len(one.columns) + 1 for one in published())


def test_a_row_of_another_length_is_refused() -> None:
    rest = {"paper": "a", "source": "b", "title": "c", "protocol": "d"}
    with pytest.raises(ValueError, match="x has 1 values for 2 columns"):
        _table(columns=["p", "q"], rows=[["x", 1.0]], evidence="paper", **rest)
    with pytest.raises(ValueError, match="evidence 'hearsay'"):
        _table(columns=["p"], rows=[["x", 1.0]], evidence="hearsay", **rest)  # type: ignore[arg-type]


def test_the_report_shows_every_table_as_not_comparable(tmp_path: Path) -> None:
    drawing = Drawing("both", "a dog", "dog", "ink", 0, "0.png", {"content": 0.5, "style": 0.5})
    write(
        [Unit("", "none", "a row", "", 0, (drawing,), None, Cost(), {"truth": "", "base": ""})], 1, tmp_path, tmp_path
    )
    html = (tmp_path / "report.html").read_text("utf-8")
    assert html.count("not comparable") == len(published())
    assert "UnZipLoRA, alignment (arXiv 2412.04465" in html and "<td>0.265</td>" in html


def test_results_without_a_digest_of_judge_and_art_are_reported(tmp_path: Path) -> None:
    """Such results were written before keys had versions."""
    drawing = Drawing("both", "p", "fox", "line art", 0, "f.png", {"content": 0.5, "style": 0.5})
    made = {"code": "10394e8c5413", "base": "c2cacf301c8c"}
    old = Unit("", "combine", "a row", "a cell, seed 0", 0, (drawing,), None, Cost(), made)
    write([old], 1, tmp_path, tmp_path)
    assert "judge and art not recorded" in (tmp_path / "table.md").read_text()
