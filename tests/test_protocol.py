"""The benchmark's rows on a user's own pictures, end to end, killed and resumed; with a tiny base, tiny CLIP and DINO."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from test_bench import count_once
from tiny_models import save_clip, save_dino

from unbraid.bench import results
from unbraid.bench.field.given import read_given, words
from unbraid.bench.field.models import FieldModels, load_models
from unbraid.bench.field.protocol import NEED_TRUTH, PROTOCOLS, Protocol, Selection, cells, chosen_rows, items, protocol
from unbraid.bench.field.report import ALL_FOUR, HARMONIC, cell_means, markdown, tables, write
from unbraid.bench.field.scores import embed, measure
from unbraid.bench.grid import Done
from unbraid.bench.registry import ROWS
from unbraid.bench.reports.published import published
from unbraid.bench.results import Drawing, Unit
from unbraid.bench.rows.cost import Cost
from unbraid.bench.rows.row import BASE, CEILING, COPY
from unbraid.common.errors import UsageError
from unbraid.images.crop import open_image

TINY = Protocol(
    "a test",
    {
        "content": ("a {rare} {subject}",),
        "style": ("a cat in {style} style",),
        "both": ("a {rare} {subject} in {style} style",),
    },
    draws=2,
    steps=2,
)
TRAINING: dict[str, Any] = {
    "dreambooth": {"rank": 2, "steps": 2},
    "blora": {"rank": 2, "steps": 2},
    "unziplora": {"rank": 2, "steps": 3, "sample_times": 1, "window": 1},
    "ziplora": {"steps": 2},
    "break": {"rank": 4, "steps": 2},
    "make": {"fine_tune": 2, "rank": 4},
    "consislora": {"rank": 2, "steps": 1, "style_steps": 1},
    "qr-lora": {"rank": 2, "steps": 2},
    "qr-split": {"rank": 2, "steps": 2},
}


TASKS = ("separate", "combine")
NAMES = (
    "base alone",
    "copy of the input",
    "DreamBooth-LoRA",
    "DreamBooth-LoRA, layers by role",
    "UnZipLoRA",
    "UnZipLoRA, layers by role",
    "B-LoRA",
    "QR-LoRA",
    "QR-LoRA, split",
    "ConsisLoRA",
    "direct sum",
    "KnOTS",
    "ZipRank",
)
NAMES += ("Break-for-Make, at once", "Break-for-Make, fine-tuned", "joint training")
ROWS_RUN = chosen_rows(TASKS, NAMES)


def draw(path: Path, colour: str, round_one: bool) -> None:
    image = Image.new("RGB", (48, 48), "white")
    pen = ImageDraw.Draw(image)
    (pen.ellipse if round_one else pen.rectangle)((8, 8, 40, 40), fill=colour, outline="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def given_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images")
    draw(out / "contents" / "red_dog" / "1.png", "#d02020", True)
    draw(out / "contents" / "red_dog" / "2.png", "#f05050", True)
    draw(out / "styles" / "cat-in-line.png", "#ffffff", False)
    draw(out / "styles" / "teapot in noir style.png", "#222222", True)
    for kind, text in (("contents", "a teapot"), ("styles", "a teapot in cartoon style")):
        for i, colour in enumerate(("#2040c0", "#20c040", "#c0c020")):
            draw(out / "partners" / kind / f"{i}.png", colour, False)
            (out / "partners" / kind / f"{i}.txt").write_text(text)
    return out


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), tokenizer_folder)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def models(clip_folder: Path, dino_folder: Path) -> FieldModels:
    return load_models(str(clip_folder), str(dino_folder), device="cpu")


@pytest.fixture(autouse=True)
def tiny_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "tiny", TINY)


def test_names_are_words(given_folder: Path) -> None:
    given = read_given(given_folder)
    assert list(given.contents) == ["red dog"] and len(given.contents["red dog"]) == 2
    assert {style: some[0].subject for style, some in given.styles.items()} == {"line": "cat", "noir": "teapot"}
    assert given.partners["content"][0][1] == "a teapot in cartoon style"
    assert given.partners["style"][0][1] == "a teapot"
    assert words(Path("a/Red_dog-2.png")) == "Red dog 2"


def test_captions_say_it_in_other_words(given_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(given_folder, tmp_path / "in")
    (tmp_path / "in/contents/red_dog.txt").write_text("corgi")
    (tmp_path / "in/styles/cat-in-line.txt").write_text("a cat in a hat in line art style")
    draw(tmp_path / "in/styles/melting gold/house.png", "#c0a020", False)
    draw(tmp_path / "in/styles/melting gold/x.png", "#c0a020", True)
    (tmp_path / "in/styles/melting gold/x.txt").write_text("a tree")
    given = read_given(tmp_path / "in")
    assert list(given.contents) == ["corgi"]
    assert {style: [one.subject for one in some] for style, some in given.styles.items()} == {
        "line art": ["cat in a hat"],
        "melting gold": ["house", "tree"],
        "noir": ["teapot"],
    }


def test_layouts_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no contents and no styles"):
        read_given(tmp_path)
    draw(tmp_path / "styles/sunset.png", "red", True)
    with pytest.raises(UsageError, match="does not give a subject and a style"):
        read_given(tmp_path)
    (tmp_path / "styles/sunset.txt").write_text("a beach in oil style")
    assert list(read_given(tmp_path).styles) == ["oil"]
    draw(tmp_path / "styles/dog in oil.png", "red", True)
    with pytest.raises(UsageError, match="two styles 'oil'"):
        read_given(tmp_path)
    (tmp_path / "styles/dog in oil.png").unlink()
    draw(tmp_path / "contents/dog.png", "red", True)
    draw(tmp_path / "contents/dog/1.png", "red", True)
    with pytest.raises(UsageError, match="two of the name 'dog'"):
        read_given(tmp_path)
    shutil.rmtree(tmp_path / "contents/dog")
    draw(tmp_path / "partners/styles/a.png", "red", True)
    with pytest.raises(UsageError, match="without its prompt"):
        read_given(tmp_path)


def test_the_rows_are_the_benchmark_s() -> None:
    rows = chosen_rows()
    assert {(row.task, row.name) for row in ROWS if row.task != "transfer" and not row.ablation} <= {
        (r.task, r.name) for r in rows
    } | {("combine", "direct sum, tuned")}
    assert {row.task for row in rows} == {"separate", "combine", "recombine"}
    assert not {row.name for row in rows} & set(NEED_TRUTH)
    assert [row.task for row in chosen_rows(names=[BASE])] == ["separate", "combine", "recombine"]
    for name in ("Pair", CEILING):
        with pytest.raises(UsageError, match="needs true counterparts or pairs"):
            chosen_rows(names=[name])


def test_every_content_meets_every_style(given_folder: Path) -> None:
    found = list(cells(read_given(given_folder), (0, 3)))
    assert [cell.task for cell in found[:6]] == ["separate"] * 2 + ["combine"] * 2 + ["recombine"] * 2
    assert len(found) == 12 and {cell.seed for cell in found[6:]} == {3}
    assert (found[4].content.subject, found[4].style.style) == ("cat", "noir")
    wanted = items(found[8], TINY)
    assert [(item.use, item.prompt, item.seeds) for item in wanted] == [("both", "a sks red dog in line style", (6, 7))]
    assert [item.use for item in items(found[0], TINY)] == ["content", "style", "both"]


@pytest.mark.parametrize("way", PROTOCOLS.values(), ids=list(PROTOCOLS))
def test_protocols_ask_for_what_they_can(way: Protocol, given_folder: Path) -> None:
    assert "arXiv" in way.source and way.note
    for cell in cells(read_given(given_folder), (0,)):
        for item in items(cell, way):
            assert "{" not in item.prompt and len(item.seeds) == way.draws
            assert cell.style.style in item.prompt or item.use == "content"
            assert item.truth.subject in item.prompt or item.use == "style"


@pytest.fixture(scope="module")
def run_once(
    tmp_path_factory: pytest.TempPathFactory, v_base: Path, given_folder: Path, models: FieldModels
) -> Iterator[tuple[Path, list[Done]]]:
    """A row of every kind, on one style and one subject; run once for all tests that use it."""
    work, images = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("less")
    shutil.copytree(given_folder, images, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "tiny", TINY)
        count_once(patch)
        (images / "styles" / "teapot in noir style.png").unlink()
        done = list(
            protocol(
                work, str(v_base), images, models, name="tiny", selection=Selection(TASKS, NAMES), training=TRAINING
            )
        )
    yield work, done


def units(done: Iterable[Done]) -> list[Unit]:
    return [one.unit for one in done if one.unit]


def errors(done: Iterable[Done]) -> list[str]:
    return [results.to_json(unit) for unit in units(done)]


@pytest.mark.slow
def test_every_row_runs_on_a_user_s_pictures(run_once: tuple[Path, list[Done]]) -> None:
    _, done = run_once
    assert [f"{one.todo.row}: {one.error}" for one in done if one.unit is None] == []
    assert {row.make for row in chosen_rows(TASKS) if not row.ablation} == {row.make for row in ROWS_RUN}
    assert len(units(done)) == len(ROWS_RUN)
    assert {method for row in ROWS_RUN for method in row.methods} == TRAINING.keys(), "the others take all their steps"
    for unit in units(done):
        assert unit.drawings, unit.row
        for drawing in unit.drawings:
            assert {"CLIP-T", "CLIP-I diversity"} <= set(drawing.scores)
            wanted = {"content": {"content"}, "style": {"style"}, "both": {"content", "style"}}[drawing.use]
            assert {name.removeprefix("DINO to ") for name in drawing.scores if name.startswith("DINO to")} == wanted


@pytest.mark.slow
def test_scores_are_those_of_the_saved_pictures(
    run_once: tuple[Path, list[Done]], models: FieldModels, given_folder: Path
) -> None:
    work, done = run_once
    (unit,) = (unit for unit in units(done) if (unit.row, unit.task) == ("direct sum", "combine"))
    images = [open_image(work / drawing.file) for drawing in unit.drawings]
    contents = [open_image(given_folder / "contents/red_dog" / name) for name in ("1.png", "2.png")]
    styles = [open_image(given_folder / "styles/cat-in-line.png")]
    found = measure(models, images, ["a red dog in line style"] * 2, contents, styles)
    for name, values in found.items():
        assert [drawing.scores[name] for drawing in unit.drawings] == pytest.approx(values, abs=2e-4)
    assert models.dino
    rows = embed(models.dino, images)
    assert unit.drawings[0].scores["DINO diversity"] == pytest.approx(float(1 - rows[0] @ rows[1]), abs=2e-4)


@pytest.mark.slow
def test_the_copy_is_what_these_scores_reward(run_once: tuple[Path, list[Done]]) -> None:
    """As docs/field-metrics.md says, a copy of the input has the highest similarity to it by every metric."""
    _, done = run_once
    split = {unit.row: unit for unit in units(done) if unit.task == "separate"}
    for use, column in (("content", "DINO to content"), ("style", "CLIP-I to style")):
        means = {name: cell_means(unit, use)[column] for name, unit in split.items()}
        assert means.pop(COPY) == pytest.approx(1, abs=1e-4)
        assert means and max(means.values()) < 0.999
    assert cell_means(split[COPY], "both")["DINO diversity"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_again_repeats_nothing(
    run_once: tuple[Path, list[Done]],
    v_base: Path,
    given_folder: Path,
    models: FieldModels,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    work, done = run_once
    images = tmp_path / "images"
    shutil.copytree(given_folder, images)
    (images / "styles" / "teapot in noir style.png").unlink()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("drawn or trained again")

    monkeypatch.setattr("unbraid.bench.rows.training_cache.run", never)
    monkeypatch.setattr("unbraid.bench.rows.training_cache.render", never)
    options = {"name": "tiny", "selection": Selection(TASKS, NAMES), "training": TRAINING}
    again = errors(protocol(work, str(v_base), images, models, **options))
    assert again == errors(done)
    fewer = FieldModels(dino=models.dino)  # with other models, drawings are scored again but not drawn again
    other = errors(protocol(work, str(v_base), images, fewer, **options))
    assert other and not any("CLIP-T" in unit for unit in other)
    back = errors(protocol(work, str(v_base), images, models, **options))
    assert back == errors(done)


@pytest.mark.slow
def test_other_pictures_are_another_unit(
    run_once: tuple[Path, list[Done]], v_base: Path, given_folder: Path, tmp_path: Path
) -> None:
    work, done = run_once
    images = tmp_path / "images"
    shutil.copytree(given_folder, images)
    draw(images / "contents/red_dog/2.png", "#00ff00", False)
    options = {"name": "tiny", "selection": Selection(["combine"], [BASE]), "training": TRAINING}
    one = next(protocol(work, str(v_base), images, FieldModels(), **options))
    (known,) = (unit for unit in units(done) if (unit.row, unit.task) == (BASE, "combine"))
    assert one.unit and one.unit.key != known.key


@pytest.mark.slow
def test_tables(run_once: tuple[Path, list[Done]]) -> None:
    work, done = run_once
    found = {(table.task, table.use): table for table in tables(results.collect(work))}
    assert {("separate", use) for use in ("content", "style", "both")} <= set(found)
    combined = found["combine", "both"]
    assert "direct sum" in combined.rows and HARMONIC in combined.columns
    text = markdown(units(done))
    assert "DINO patch distance to content ↓" in text and "diversity ↓" not in text
    assert "| base alone |" in text


(NP_LORA,) = (table for table in published() if table.paper == "NP-LoRA" and "alignment" in table.title)


@pytest.mark.parametrize("row", NP_LORA.rows)
def test_the_harmonic_mean_is_np_lora_s(row: str) -> None:
    """The published columns give the published mean, to its two decimal places."""
    *four, mean, _ = NP_LORA.rows[row]
    scores: dict[str, float] = dict(zip(ALL_FOUR, four, strict=True))
    drawing = Drawing("both", "a dog", "dog", "ink", 0, "0.png", scores)
    unit = Unit("", "combine", row, "", 0, (drawing,), None, Cost(), {})
    assert NP_LORA.columns[:5] == ("content CLIP", "style CLIP", "content DINO", "style DINO", "harmonic mean")
    assert cell_means(unit, "both")[HARMONIC] == pytest.approx(mean, abs=0.01)


@pytest.mark.slow
def test_the_report_names_the_models_and_quotes_the_papers(
    run_once: tuple[Path, list[Done]], clip_folder: Path, tmp_path: Path
) -> None:
    work, done = run_once
    files = write(units(done), PROTOCOLS["tiny"], work, tmp_path / "report")
    text = (tmp_path / "report" / "table.md").read_text()
    assert f"CLIP-I: {clip_folder}" in text and "a test" in text
    assert "not comparable" in text and "UnZipLoRA, alignment" in text
    assert len(results.read(tmp_path / "report" / "results.jsonl")) == len(units(done))
    sheets = [file for file in files if file.suffix == ".webp"]
    assert len(sheets) == 2 and all(open_image(file).width > 128 for file in sheets)


def test_break_for_make_says_where_partners_go(
    v_base: Path, given_folder: Path, models: FieldModels, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(given_folder, images)
    shutil.rmtree(images / "partners")
    rows = ["Break-for-Make, at once", BASE]
    done = list(
        protocol(
            tmp_path / "work",
            str(v_base),
            images,
            models,
            name="tiny",
            selection=Selection(["combine"], rows),
            training=TRAINING,
        )
    )
    failed = [one for one in done if one.unit is None]
    assert {one.todo.row for one in failed} == {"Break-for-Make, at once"} and "field-metrics" in failed[0].error
    assert [one.todo.row for one in done if one.unit] == [BASE] * 2, "the others are done"


def test_an_unknown_protocol(tmp_path: Path, given_folder: Path) -> None:
    with pytest.raises(UsageError, match="no protocol 'mine'"):
        next(protocol(tmp_path, "icons", given_folder, FieldModels(), name="mine"))


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from unbraid.bench.field import protocol as p
from unbraid.bench.field.models import load_models
work, base, images, dino = sys.argv[1:]
way = p.Protocol("a test", {"content": (), "style": (), "both": ("a {rare} {subject} in {style} style",)}, draws=2, steps=2)
p.PROTOCOLS["tiny"] = way
models = load_models(dino=dino, device="cpu")
rows = ["base alone", "direct sum"]
for one in p.protocol(Path(work), base, Path(images), models, name="tiny", selection=p.Selection(["combine"], rows),
                      training={"dreambooth": {"rank": 2, "steps": int(sys.stdin.readline())}}):
    print(one.todo.row, one.error, flush=True)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("bases_from_disk")
def test_killed_and_started_again(
    v_base: Path, given_folder: Path, dino_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real kill in the middle of a training; the second start continues, and repeats no unit."""
    work = tmp_path / "work"
    command = [sys.executable, "-c", SCRIPT, str(work), str(v_base), str(given_folder), str(dino_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        process.stdin.write("8\n")
        process.stdin.flush()
        assert process.stdout.readline() == "base alone \n"
        while not list(work.glob("made/*/run.toml")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    first = {file: file.stat().st_mtime_ns for file in work.glob("units/*/*")}
    assert sum(file.name == "unit.json" for file in first) == 1
    way = {"content": (), "style": (), "both": TINY.prompts["both"]}
    monkeypatch.setitem(PROTOCOLS, "tiny", replace(TINY, prompts=way))
    models, rows = (
        load_models(dino=str(dino_folder), device="cpu"),
        Selection(["combine"], ["base alone", "direct sum"]),
    )
    training = {"dreambooth": {"rank": 2, "steps": 8}}
    again = protocol(work, str(v_base), given_folder, models, name="tiny", selection=rows, training=training)
    assert [(one.todo.row, one.error) for one in again] == [("base alone", ""), ("direct sum", "")] * 2
    assert {file: file.stat().st_mtime_ns for file in first} == first, "nothing was repeated"
    found = results.collect(work)
    assert len(found) == 4 and all(len(unit.drawings) == 2 for unit in found)
    assert all(json.loads(unit.made["models"]) == {"DINO": str(dino_folder)} for unit in found)
