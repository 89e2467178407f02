"""The methods, each with its `Entry` in its own file. A new one is a file here, its name below, a test and a row in the docs.
Nothing here knows files, models, or how a run is conducted."""

from importlib import import_module

from unbraid.methods.entry import Entry

FILES = (  # in the order in which they are listed; the first method of a verb is its default
    "unziplora",
    "ziplora",
    "nplora",
    "pair",
    "slider",
    "blora",
    "b4m",
    "dreambooth",
    "qrlora",
)
ENTRIES: tuple[Entry, ...] = tuple(entry for file in FILES for entry in import_module(f"{__name__}.{file}").ENTRIES)
METHODS = {entry.name: entry for entry in ENTRIES}
