"""Imports go one way: errors ← lora ← {files, merge, adapters} ← optim ← train ← {base, data, sample} ← methods ← run ← {cli, studio, bench}."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "unbraid"
LEVELS: dict[str, float] = {
    "errors": 0,
    "presets": 1,
    "image_files": 1,
    "captions": 1,
    "picture_folders": 2,
    "clip_tokenizer": 1,
    "lora": 1,
    "packing": 1.25,
    "stacked": 1.5,
    "layout": 1,
    "graphs": 1,
    "fp8": 1,
    "compiling": 1,
    "folder": 1,
    "adapters": 2,
    "optim": 3,
    "optim8": 4,
    "files": 2,
    "pictures": 2,
    "sniff": 3,
    "checkpoint_config": 4,
    "single_file": 5,
    "pipeline": 5.5,
    "long_prompts": 5.75,
    "mergers": 3,
    "merger_plot": 3,
    "recipe": 4,
    "passes": 4.5,
    "train": 5,
    "many": 6,
    "data": 5,
    "base": 6,
    "canvas": 7,
    "samplers": 7,
    "sample": 8,
    "combine": 9,
    "invert": 9,
    "render": 10,
    "sweep": 11,
    "methods": 7,
    "settings": 8,
    "job": 9,
    "savings": 5,
    "memory": 10.5,
    "run": 11,
    "runs": 12,
    "spread": 13,
    "api": 12,
    "modules": 13,
    "demo": 13,
    "explain": 13,
    "cli_files": 13,
    "cli_checkpoints": 14,
    "cli_run": 13,
    "cli_train": 14,
    "cli_batch": 15,
    "selftest_compare": 13.5,
    "selftest_scene": 14,
    "selftest_checks": 14.5,
    "selftest": 15,
    "cli_selftest": 15.5,
    "cli": 16,
    "bases": 13,
    "bench": 14,
    "cli_bench": 15,
    "making": 15,
}
TORCH_ALONE = (
    "graphs",
    "fp8",
    "packing",
    "stacked",
    "layout",
    "lora",
    "adapters",
    "optim",
    "optim8",
    "merge",
    "recipe",
    "passes",
    "train",
)
LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL", "numpy", "typer", "rich")


FILES = (
    "formats",
    "merge",
    "merge_methods",
    "lowrank",
    "lora_report",
    "lora_plot",
    "file_tools",
    "doctor",
    "changes",
    "checkpoint_file",
    "bake",
    "extract",
)  # with files


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MAKING = ("judge.py", "card.py", "__main__.py")  # the recipe's last stages, which measure with the bench


def area(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    if parts[:2] == ("bases", "recipe") and parts[-1] in MAKING:
        return "making"
    return layer(parts[0].removesuffix(".py"))


def layer(name: str) -> str:
    return "files" if name in FILES else name


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = area(path)
    if own in ("__init__", "__main__"):
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "unbraid" and len(parts) > 1 and layer(parts[1]) not in (own, "__init__"):
            assert LEVELS[layer(parts[1])] < LEVELS[own], f"{own} imports {name}"
    if path.stem in TORCH_ALONE:
        heavy = {name for name in imports(path) if name.split(".")[0] in LIBRARIES}
        assert not heavy, f"{own} may import torch alone, not {heavy}"


def test_fronts_do_not_know_each_other() -> None:
    for path in SOURCE.rglob("*.py"):
        others = {"cli", "studio", "bench"} - {area(path)}
        if area(path) in ("cli", "studio", "bench"):
            assert not {name.split(".")[1] for name in imports(path) if name.startswith("unbraid.")} & others
