"""What a figure depends on beside its settings: the code that can change a picture, and the base."""

import ast
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path

import unbraid

PACKAGE = Path(unbraid.__file__).parent
FRONTS = ("cli", "cli_batch", "cli_bench", "cli_files", "cli_run", "cli_train", "demo", "explain", "__main__")
SHOWN = ("report", "tables", "plots", "published", "stats", "claims", "results")  # of the bench: how figures are shown
SPEED = (  # other benchmarks
    *("file_cost", "judge_validation", "many", "memory_table"),
    *("speed", "speed_cases", "speed_count", "speed_published", "speed_sampling", "speed_time", "speed_world"),
)
FIELD = ("field", "field_models", "field_report", "csd", "given", "protocol")  # scores of a user's pictures, taken anew
NOT_OURS = ("recipe", "studio", "formats")  # making the base (it has a digest of its own), other programs' spellings


@cache
def code_digest() -> str:
    """Of the code that figures depend on, without comments, docstrings and layout: the same code, the same pictures."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        shown = parts[0] == "bench" and parts[-1] in SHOWN + SPEED + FIELD
        if parts[0] in FRONTS or shown or set(parts[:-1]) & set(NOT_OURS):
            continue
        digest.update("/".join(parts).encode())
        digest.update(ast.dump(_bare(ast.parse(file.read_text("utf-8")))).encode())
    return digest.hexdigest()[:12]


@cache
def base_digest(name: str) -> str:
    """Of a base's files; of a hub id, its name."""
    folder = Path(str(files("unbraid.bases").joinpath("icons"))) if name == "icons" else Path(name)
    some = sorted(one for one in folder.rglob("*") if one.suffix in (".safetensors", ".json", ".toml", ".txt"))
    if folder.is_file():
        some = [folder]
    digest = hashlib.sha256(name.encode() if not some else b"")
    for file in some:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _bare(tree: ast.AST) -> ast.AST:
    """Without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return tree
