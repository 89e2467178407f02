"""What a training step costs, ours beside the published form, on one base in one run. `python -m unbraid.bench.speed`

FLOPs and bytes kept for gradients are counted at SDXL's shapes on fake tensors, so without weights (`count`). Times are taken on the
embedded base and on an SDXL of half width, the ways in turn (`time`), also by how many branches share a pass (`passes`) and with
torch.compile (`compile`); on a GPU also whole runs at full size, with peak memory (`gpu`).
Sampling with style guidance: `sampling`. docs/speed.md says what the published step contains.
"""

import argparse
from collections.abc import Callable

import torch

from unbraid.bench.speed_cases import CASES
from unbraid.bench.speed_count import RANK, counted
from unbraid.bench.speed_sampling import evaluations
from unbraid.bench.speed_time import compiled, one_by_one, timed, whole_run
from unbraid.bench.speed_world import full, half, icons

RUNS = (("split", 1024), ("zip", 1024), ("pair", 512))


def count(names: list[str]) -> None:
    print(
        f"| SDXL, rank {RANK}, one step | TFLOP | of these the autoencoder | ratio | without the autoencoder | GB kept for gradients |"
    )
    print("|---" * 6 + "|", flush=True)
    for name in names:
        first = None
        for way, found in counted(name):
            first = first or found
            ratio, bare = found.tflop / first.tflop, (found.tflop - found.encoding) / (first.tflop - first.encoding)
            numbers = f"{found.tflop:.2f} | {found.encoding:.2f} | {ratio:.3f} | {bare:.3f} | {found.kept:.2f}"
            print(f"| {name}, {CASES[name].side} px: {way} | {numbers} |", flush=True)


def clock(names: list[str]) -> None:
    device = _device()
    unit = "s" if device == "cuda" else "processor s"
    for world, steps, rounds, warm in ((icons(device), 9, 5, 17), (half(device), 3, 3, 2)):
        print(f"\n| {world.said} | {unit} per step | times as fast |\n|---|---|---|", flush=True)
        for name in names:
            times = timed(name, world, steps, rounds, warm)
            for way, seconds in times:
                print(f"| {name}: {way} | {seconds:.3f} | {times[0][1] / seconds:.2f} |", flush=True)


def passes(names: list[str]) -> None:
    several, device = [name for name in names if name in ("zip", "pair", "break")], _device()
    print(f"\n| {device}, seconds per step | branches of a step | | times as fast |\n|---|---|---|---|", flush=True)
    for world, steps, rounds in ((icons(device), 9, 5), (half(device), 3, 3)):
        for name in several:
            times = one_by_one(name, world, steps, rounds)
            for way, seconds in times:
                print(f"| {name}, {world.said} | {way} | {seconds:.3f} | {times[0][1] / seconds:.2f} |", flush=True)


def compilation(names: list[str]) -> None:
    device = _device()
    print(f"\n| {device} | | s per step | times as fast | s to the first step |\n|---|---|---|---|---|", flush=True)
    for world, steps, rounds in ((icons(device), 9, 5), (half(device), 3, 3)):
        for name in names:
            first, times = compiled(name, world, steps, rounds)
            for (way, seconds), waited in zip(times, ("", f"{first:.0f}"), strict=True):
                ratio = times[0][1] / seconds
                print(f"| {name}, {world.said} | {way} | {seconds:.3f} | {ratio:.2f} | {waited} |", flush=True)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu(names: list[str]) -> None:
    if not torch.cuda.is_available():
        print("\nNo GPU here: whole runs at full size and their peak memory are not measured.")
        return
    print(
        f"\n| {torch.cuda.get_device_name()}, bf16, rank {RANK} | s for the run | s per step | peak GB |\n|---|---|---|---|"
    )
    for name, side in [(name, side) for name, side in RUNS if name in names]:
        world = full("cuda", side)
        for checkpointing in (False, True):
            seconds, peak = whole_run(name, world, checkpointing=checkpointing)
            said = f"{name}, {side} px, {CASES[name].steps} steps{', gradient checkpointing' if checkpointing else ''}"
            print(f"| {said} | {seconds:.1f} | {seconds / CASES[name].steps:.3f} | {peak:.1f} |", flush=True)


def sampling(names: list[str]) -> None:
    del names
    print("\n| style guidance, icons, one thread | processor s per sampling step | times as fast |\n|---|---|---|")
    times = evaluations()
    for way, seconds in times:
        print(f"| {way} | {seconds:.3f} | {times[0][1] / seconds:.2f} |")


PARTS: dict[str, Callable[[list[str]], None]] = {
    "count": count,
    "time": clock,
    "passes": passes,
    "compile": compilation,
    "gpu": gpu,
    "sampling": sampling,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unbraid.bench.speed", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--method", action="append", choices=list(CASES), help="repeatable; default: all")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for part in asked.parts or PARTS:
        PARTS[part](asked.method or list(CASES))


if __name__ == "__main__":
    main()
