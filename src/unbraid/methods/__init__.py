"""The methods, each with its `Entry` in its own file. A new one is a file here, a line below, a test and a row in the docs.
Nothing here knows files, models, or how a run is conducted."""

from unbraid.methods import b4m, blora, dreambooth, nplora, pair, slider, unziplora, ziplora

ENTRIES = (
    unziplora.ENTRY,
    ziplora.ENTRY,
    nplora.ENTRY,
    pair.ENTRY,
    slider.ENTRY,
    blora.ENTRY,
    *b4m.ENTRIES,
    dreambooth.ENTRY,
)
METHODS = {entry.name: entry for entry in ENTRIES}
