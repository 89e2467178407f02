"""The studio: unbraid in a browser window. Pages, a queue of training runs, and the checks of what comes from a browser.

Pages call the Python functions of lower rooms; each training is a process of its own, `python -m unbraid …`. gradio is
imported by `pages` alone, so that queue and checks work without it. No mathematics, and no file formats."""
