"""The commands on LoRA files: merge, convert, doctor, inspect, resize, edit. They only parse, call and print.

Torch is imported on use."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unbraid.cli.file_lines import print_diagnosis, print_done
from unbraid.common.errors import UsageError, printable

if TYPE_CHECKING:
    import torch

    from unbraid.files.tools import Source

app = typer.Typer(no_args_is_help=True)
To = Annotated[
    Literal["kohya", "diffusers"] | None, typer.Option(help="Dialect; default: what most tools of the family read.")
]
Dtype = Annotated[
    Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="Default: as in the file, nothing is rounded.")
]
Rank = Annotated[int | None, typer.Option(help="Highest rank of each module.")]
Energy = Annotated[float | None, typer.Option(help="Share of the squared norm to keep, such as 0.99.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")]
In = Annotated[Path, typer.Argument(metavar="IN", help="A LoRA file of any dialect.")]
Base = Annotated[Path | None, typer.Option(help="For DoRA: the checkpoint that it was trained on.")]


@app.command()
def merge(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE[:WEIGHT[:BLOCKS]]...", help="Weight 1 where none is given.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    method: Annotated[str, typer.Option(help="concat, ties, dare, prune, knots, np-lora, blocks or roles.")] = "concat",
    rank: Rank = None,
    energy: Energy = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the entries to keep: ties, dare, prune, knots.")
    ] = None,
    mu: Annotated[float | None, typer.Option(help="Strength of np-lora's projection.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of dare.")] = None,
    blocks: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="For --method blocks or roles: icons, b-lora, unziplora, splitflux, b-lora-flux, or a TOML file.",
        ),
    ] = "",
    to: To = None,
    base: Base = None,
) -> None:
    """Merge LoRAs into one. `a.safetensors:0.7 b.safetensors:0.4` is a at 0.7 stacked on b at 0.4, exactly."""
    from unbraid.core.selectors import open_blocks
    from unbraid.files.merge import Size
    from unbraid.files.tools import merge_files

    given = {"density": density, "mu": mu, "seed": seed, "blocks": open_blocks(blocks) if blocks else None}
    settings = {key: value for key, value in given.items() if value is not None}
    print_done(merge_files([source_of(file) for file in files], out, method, Size(rank, energy), to, base, **settings))


@app.command()
def convert(source: In, out: Out, to: To = None, dtype: Dtype = None, base: Base = None) -> None:
    """Write a LoRA in another dialect.

    Without loss unless you give a dtype. LoHa, LoKr, DoRA and full changes become LoRAs."""
    from unbraid.files.tools import convert as run

    print_done(run(source, out, to, dtype_of(dtype), base))


@app.command()
def resize(
    source: In,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    to: To = None,
    dtype: Dtype = None,
    base: Base = None,
) -> None:
    """Make a LoRA smaller.

    The best approximation at a rank, or the smallest one that keeps a share of the squared norm."""
    from unbraid.files.merge import Size
    from unbraid.files.tools import resize as run

    print_done(run(source, out, Size(rank, energy), to, dtype_of(dtype), base))


@app.command()
def edit(
    source: In,
    out: Out,
    block: Annotated[list[str] | None, typer.Option(help="NAME=X or an LBW vector; 0 takes the block out.")] = None,
    strength: Annotated[float, typer.Option(help="Scale the whole LoRA.")] = 1.0,
    title: Annotated[str, typer.Option(help="Its name in the tools.")] = "",
    trigger: Annotated[str, typer.Option(help="The words that call it.")] = "",
    description: Annotated[str, typer.Option(help="What it is.")] = "",
    thumbnail: Annotated[Path | None, typer.Option(help="A picture to store in the file.")] = None,
    sidecar: Annotated[
        bool, typer.Option("--sidecar", help="Also write NAME.json for A1111, Forge, InvokeAI.")
    ] = False,
    to: To = None,
    role: Annotated[
        str,
        typer.Option("--lora-role", metavar="content|style", help="Leave out the layers that serve the other one."),
    ] = "",
    blocks: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help="For --lora-role: which layers have which role, a table or TOML file."),
    ] = "",
) -> None:
    """Scale blocks or the whole, leave out a role, set the metadata.

    Exact: what stays is not rounded."""
    from unbraid.core.selectors import open_blocks
    from unbraid.files.formats.header import read_header
    from unbraid.files.formats.metadata import card, write_sidecar
    from unbraid.files.tools import edit as run

    metadata = card(title, trigger, description=description, thumbnail=thumbnail)
    print_done(run(source, out, block or (), strength, metadata, to, role, open_blocks(blocks) if blocks else None))
    if sidecar:
        typer.echo(f"{write_sidecar(out, read_header(out).metadata)}: sidecar")


@app.command()
def doctor(
    file: In,
    tool: Annotated[str | None, typer.Option("--for", help="comfyui, a1111, forge, invokeai or diffusers.")] = None,
    all_keys: Annotated[bool, typer.Option("--all", help="List every key that is dropped.")] = False,
) -> None:
    """Show what each tool loads of a LoRA file, drops or refuses.

    Prints the command that mends the file, if there is one."""
    from unbraid.files.doctor import diagnoses
    from unbraid.files.formats.tool_rules import TOOLS

    found = diagnoses(file, [tool] if tool else TOOLS)
    for one in found:
        print_diagnosis(one, all_keys)
    for line in dict.fromkeys(one.mend for one in found if one.mend):
        typer.echo(f"to mend it: {line}")


@app.command()
def inspect(
    file: In,
    second: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Another one, to compare it with.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison into a PNG file.")] = None,
) -> None:
    """Show what a LoRA holds, block by block.

    With two LoRAs it also shows how much they interfere."""
    from unbraid.files.formats.names import KINDS
    from unbraid.files.report import interference, report

    if plot and not second:
        raise UsageError("there is nothing to plot", "--plot", "Give two files.")
    for path in [file, *([second] if second else [])]:
        one = report(path)
        ranks, alphas = (", ".join(f"{k:g} (×{n})" for k, n in counts.items()) for counts in (one.ranks, one.alphas))
        by = "" if one.catalogue.verdict.by == "nothing" else f" (by {one.catalogue.verdict.by})"
        typer.echo(
            f"{printable(path)}: {one.family}{by}, names {', '.join(one.namings)}, {', '.join(one.dtypes)},"
            f" rank {printable(ranks or 'none')}, alpha {printable(alphas or 'none')}"
        )
        for kind, count in one.catalogue.kinds.items():
            more = {"DoRA": ": its magnitudes are not in the norms below"}.get(kind, "")
            more = ": not shown below" if kind in KINDS or kind == "norms and biases" else more
            typer.echo(f"  {count} tensors of {kind}{more}")
        if unknown := one.catalogue.unknown:
            typer.echo(f"  {len(unknown)} tensors are no part of a LoRA, such as {printable(unknown[0], 80)}")
        for name, what in list(one.incomplete.items())[:1]:
            more = f"such as {printable(name, 90)}, which has no {what}"
            typer.echo(f"  {len(one.incomplete)} modules are incomplete, {more}: not shown below")
        if kept := one.catalogue.kept:
            typer.echo(f"  {len(kept)} modules that no table knows, such as {printable(kept[0], 80)}")
        for key in ("modelspec.title", "modelspec.trigger_phrase", "modelspec.merged_from"):
            if key in one.metadata:
                typer.echo(f"  {key.partition('.')[2]}: {printable(one.metadata[key])}")
        typer.echo(f"  {'block':26}{'modules':>8}{'norm':>12}{'share':>8}")
        for block in one.blocks:
            typer.echo(f"  {printable(block.block, 60):26}{block.modules:8}{block.norm:12.4g}{block.share:8.1%}")
    if second:
        found = interference(file, second)
        typer.echo(f"  {'block':26}{'cosine':>8}{'columns |cos|':>15}{'overlap':>9}")
        for item in found:
            typer.echo(
                f"  {printable(item.block, 60):26}{item.cosine:8.3f}{float(item.columns.mean()):15.3f}{item.overlap:9.3f}"
            )
        if plot:
            from unbraid.files.plot import plot_interference

            plot_interference(found, plot, (file.stem, second.stem))
            typer.echo(f"{plot}: written")


def source_of(text: str) -> "Source":
    """Parse `FILE`, `FILE:WEIGHT` or `FILE:WEIGHT:BLOCKS`. The colon of a Windows drive is part of the file name."""
    from unbraid.files.formats.block_weights import number
    from unbraid.files.tools import Source

    form = r"(?P<file>.+?\.[A-Za-z]+)(:(?P<weight>[^:/\\]*)(:(?P<blocks>.+))?)?"
    found = re.fullmatch(form, text, re.DOTALL)  # a file's name may hold a newline
    if not found:
        raise UsageError("not FILE[:WEIGHT[:BLOCKS]]", text, "Give a .safetensors file, such as a.safetensors:0.7.")
    weight = found["weight"]
    return Source(
        Path(found["file"]), 1.0 if not weight else number(weight, text), (found["blocks"],) if found["blocks"] else ()
    )


def dtype_of(name: str | None) -> "torch.dtype | None":
    import torch

    return None if name is None else {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
