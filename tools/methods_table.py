"""Makes docs/methods.md from the methods' entries: `python -m tools.methods_table` prints the page."""

from unbraid.methods import ENTRIES
from unbraid.methods.entry import Entry, Input
from unbraid.runs.settings import schema

HEAD = """# Methods

Made by `python -m tools.methods_table > docs/methods.md`. `unbraid explain METHOD` prints what a method does at every step, and all its
settings.

| method | paper | verb | starts from | makes |
|---|---|---|---|---|"""


def page() -> str:
    """The page, with one row per method."""
    return "\n".join([HEAD, *map(_row, ENTRIES)]) + "\n"


def _row(entry: Entry) -> str:
    settings = {name: parameter.default for name, parameter in schema(entry).items()}
    files = ", ".join(f"{stem}.safetensors" for stem in entry.outputs(settings))
    inputs = ", ".join(map(_input, entry.inputs.files))
    return f"| {entry.title} (`{entry.name}`) | {entry.paper} | `unbraid {entry.verb}` | {inputs} | {files} |"


def _input(one: Input) -> str:
    return f"{one.role}: {one.kind}" + (" (optional)" if one.optional else "")


if __name__ == "__main__":
    print(page(), end="")
