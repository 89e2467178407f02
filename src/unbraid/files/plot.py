"""The plot of `inspect A B --plot`: how similar the columns of two LoRAs are, per block (ZipLoRA's measure)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unbraid.common.errors import UsageError
from unbraid.files.report import Interference


def plot_interference(found: Sequence[Interference], path: Path, names: tuple[str, str]) -> None:
    """Left: the distribution of the columns' |cos| per block. Right: norms, and the overlap of the input subspaces.

    Errors: a file that cannot be written, an unknown image type.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.45 * len(found) + 2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    edges = np.linspace(0, 1, 41)
    density = np.stack([np.histogram(one.columns, edges)[0] / max(one.columns.size, 1) for one in found])
    image = left.imshow(density, aspect="auto", extent=(0, 1, len(found) - 0.5, -0.5), cmap="magma")
    figure.colorbar(image, ax=left, label="share of the block's columns")
    left.set_yticks(range(len(found)), [one.block for one in found])
    left.set_xlabel("|cos| between a column of ΔW₁ and the same column of ΔW₂")
    left.set_title("0: no interference. 1: full interference", fontsize=10)
    rows = np.arange(len(found))
    for shift, name, i in ((-0.2, names[0], 0), (0.2, names[1], 1)):
        right.barh(rows + shift, [one.norms[i] for one in found], 0.38, label=f"‖ΔW‖ of {name}")
    right.legend(loc="lower right", fontsize=8)
    right.set_xlabel("‖ΔW‖")
    over = right.twiny()
    over.plot([one.overlap for one in found], rows, "k.-", label="overlap")
    over.set_xlim(0, 1)
    over.set_xlabel("overlap of the input subspaces (dots)")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the picture cannot be written ({error})", path, "Give a .png in a folder that exists."
        ) from error
