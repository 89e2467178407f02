"""Measures what a training step costs, and compares it with the published form of the method. `python -m tools.speed`

`count`: FLOPs and bytes kept for gradients at SDXL's shapes, on fake tensors without weights. `time`: seconds on the
embedded base and on an SDXL of half width. `passes`: seconds by how many branches share a pass. `compile`: with
torch.compile. `gpu`: steps at full size (eager, as CUDA graphs, compiled), whole runs, and peak memory. `sampling`:
sampling with style guidance. docs/speed.md explains what the published step contains.
"""

import argparse
from collections.abc import Callable, Sequence

import torch

from tools.speed.cases import CASES
from tools.speed.count import RANK, counted
from tools.speed.gpu import RUNS, WAYS, product, ways, whole_run
from tools.speed.sampling import evaluations
from tools.speed.time import compiled, one_by_one, timed
from tools.speed.workload import full, half, icons


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
    for workload, steps, rounds, warm in ((icons(device), 9, 5, 17), (half(device), 3, 3, 2)):
        print(f"\n| {workload.title} | {unit} per step | times as fast |\n|---|---|---|", flush=True)
        for name in names:
            times = timed(name, workload, steps, rounds, warm)
            for way, seconds in times:
                print(f"| {name}: {way} | {seconds:.3f} | {times[0][1] / seconds:.2f} |", flush=True)


def passes(names: list[str]) -> None:
    several, device = [name for name in names if name in ("zip", "pair", "break")], _device()
    print(f"\n| {device}, seconds per step | branches of a step | | times as fast |\n|---|---|---|---|", flush=True)
    for workload, steps, rounds in ((icons(device), 9, 5), (half(device), 3, 3)):
        for name in several:
            times = one_by_one(name, workload, steps, rounds)
            for way, seconds in times:
                print(f"| {name}, {workload.title} | {way} | {seconds:.3f} | {times[0][1] / seconds:.2f} |", flush=True)


def compilation(names: list[str]) -> None:
    device = _device()
    print(f"\n| {device} | | s per step | times as fast | s to the first step |\n|---|---|---|---|---|", flush=True)
    for workload, steps, rounds in ((icons(device), 9, 5), (half(device), 3, 3)):
        for name in names:
            first, times = compiled(name, workload, steps, rounds)
            for (way, seconds), waited in zip(times, ("", f"{first:.0f}"), strict=True):
                ratio = times[0][1] / seconds
                print(f"| {name}, {workload.title} | {way} | {seconds:.3f} | {ratio:.2f} | {waited} |", flush=True)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu(names: list[str], chosen: Sequence[str] = tuple(WAYS)) -> None:
    if not torch.cuda.is_available():
        print("\nNo GPU here: steps at full size are not measured.")
        return
    most = product()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: bf16 products at {most:.0f} TFLOP/s")
    print("| bf16, rank 64 | s per step | times as fast | GPU computes | TFLOP/s | s to the first step | peak GB |")
    print("|---" * 7 + "|", flush=True)
    for name, side in [(name, side) for name, side in RUNS if name in names]:
        workload, eager = full("cuda", side), None
        for way, one in ways(name, workload, chosen):
            eager = eager or one.seconds
            figures = f"{one.seconds:.3f} | {eager / one.seconds:.2f} | {one.busy:.0%} | {one.tflop / one.seconds:.0f}"
            print(f"| {name}, {side} px: {way} | {figures} | {one.first:.1f} | {one.peak:.1f} |", flush=True)
    print(
        f"\n| {torch.cuda.get_device_name()}, whole run, graphs | steps | s | peak GB |\n|---|---|---|---|", flush=True
    )
    for name, side in [(name, side) for name, side in RUNS if name in names]:
        seconds, peak = whole_run(name, full("cuda", side))
        print(f"| {name}, {side} px | {CASES[name].steps} | {seconds:.1f} | {peak:.1f} |", flush=True)


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
    parser = argparse.ArgumentParser(prog="python -m tools.speed", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--method", action="append", choices=list(CASES), help="repeatable; default: all")
    parser.add_argument(
        "--way", action="append", choices=list(WAYS), help="how `gpu` runs steps; repeatable; default: all"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for part in arguments.parts or PARTS:
        names = arguments.method or list(CASES)
        gpu(names, arguments.way or tuple(WAYS)) if part == "gpu" else PARTS[part](names)


if __name__ == "__main__":
    main()
