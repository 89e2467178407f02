"""The training methods, one or a few per file, each with its `Entry`. A new method needs a file here, its name in FILES,
a test and a row in the docs. This package does not depend on files, base models or run folders."""

from importlib import import_module

from unbraid.methods.entry import Entry

FILES = (  # in the order in which methods are listed; the first method of a verb is its default
    "unziplora",
    "ziplora",
    "nplora",
    "pair",
    "slider",
    "blora",
    "consislora",
    "b4m",
    "dreambooth",
    "qrlora",
)
ENTRIES: tuple[Entry, ...] = tuple(entry for file in FILES for entry in import_module(f"{__name__}.{file}").ENTRIES)
METHODS = {entry.name: entry for entry in ENTRIES}
