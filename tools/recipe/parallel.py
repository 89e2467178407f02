"""Training whose weights several processes share: the two long stages, autoencoder and UNet.

On a CPU the work is spread over single-threaded processes (two threads of one process disturb each
other whenever the machine does anything else); on a GPU it is one process. Both run this code. Batches
are a function of (step, worker), so a killed run goes on exactly where it was.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.recipe.config import Schedule
from unbraid.core.graphs import CudaExecutor, Graphs

SAVE_EVERY = 100  # steps
KEPT = ("weights", "ema", "exp_avg", "exp_avg_sq", "step", "seen")  # seen: examples so far
State = dict[str, Tensor]


def half(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix products are about twice as fast in it, or more (a GPU, a CPU with AMX tiles or AVX-512's bf16), else
    float32."""
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def start_state(
    module: nn.Module, saved: Path, workers: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> State:
    """Fresh or resumed training state as flat vectors, shared between workers when on the CPU.

    `weights` are the master copy, in float32; networks compute with `compute`, their copy in `dtype`."""
    if saved.exists():
        state = load_file(saved)
    else:
        weights = _flat(module)
        zero = torch.zeros_like(weights)
        state = {
            "weights": weights,
            "ema": weights.clone(),
            "exp_avg": zero,
            "exp_avg_sq": zero.clone(),
            "step": torch.zeros(1),
            "seen": torch.zeros(1),
        }
    state["compute"] = state["weights"].to(dtype)
    state["grads"] = torch.zeros(workers, len(state["weights"]), dtype=dtype)
    state["norms"] = torch.zeros(workers)
    if device.type == "cpu":
        return {key: value.share_memory_() for key, value in state.items()}
    return {key: value.to(device) for key, value in state.items()}


def spawn(worker: Callable[..., None], state: State, *arguments: Any) -> None:
    """Run `worker(rank, barrier, state, *arguments)` in as many processes as `state` has room for."""
    workers = len(state["grads"])
    barrier = mp.get_context("spawn").Barrier(workers)
    if workers == 1:
        worker(0, barrier, state, *arguments)
    else:
        mp.spawn(worker, (barrier, state, *arguments), nprocs=workers)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Training:
    """One stage's training. `draw(seed)` gives a batch as tensors; `loss(*batch)` is the loss of it, a mean over the batch."""

    draw: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    schedule: Schedule
    saved: Path


def train(rank: int, barrier: Any, state: State, module: nn.Module, training: Training) -> None:
    """One worker's part of a training. Gradients are averaged over workers and clipped to norm 1; each worker then steps its own
    share of the parameters. On a GPU the whole step is one CUDA graph."""
    workers, device, schedule = len(state["grads"]), state["weights"].device, training.schedule
    if device.type == "cpu":
        torch.set_num_threads(1)
    share = _Share(rank, state, module, schedule)

    def step(*batch: Tensor) -> Tensor:
        value = training.loss(*batch)
        value.backward()
        barrier.wait()  # all gradients are there
        share.take()
        barrier.wait()  # all have read them
        share.step()
        barrier.wait()  # all weights are new
        return value.detach()

    graphs = graphs_of(device)
    start, began, recent = int(state["step"].item()), time.monotonic(), deque[Tensor](maxlen=100)
    for i in range(start, schedule.steps):
        share.set_rate(i)
        batch = training.draw(i * workers + rank)
        recent.append((graphs("step", step, batch) if graphs else step(*batch)).clone())
        if rank:
            continue
        state["step"].fill_(i + 1)
        state["seen"] += len(batch[0]) * workers
        last = i + 1 == schedule.steps
        if (i + 1) % SAVE_EVERY and not last:
            continue
        mean = torch.stack(list(recent)).mean().item()
        if not math.isfinite(mean + state["norms"].sum().item()):
            raise FloatingPointError(
                f"{training.saved.stem}: loss {mean} before step {i + 1}: lower the rate and resume"
            )
        speed = (i + 1 - start) / (time.monotonic() - began)
        images, left = speed * len(batch[0]) * workers, (schedule.steps - i) / speed / 60
        line = (
            f"{training.saved.stem} {i + 1}/{schedule.steps} loss {mean:.4f} {images:.0f} images/s {left:.0f} min left"
        )
        print(line, flush=True)
        part = training.saved.with_suffix(".part")
        save_file({key: state[key] for key in KEPT}, part)
        part.replace(training.saved)


def graphs_of(device: torch.device) -> Graphs | None:
    return Graphs(CudaExecutor(device)) if device.type == "cuda" else None


def smoothed(module: nn.Module, saved: Path) -> tuple[Any, int]:
    """`module` with the averaged weights of the latest checkpoint, which are what ships, and how many examples it has seen."""
    state = load_file(saved)
    _view(module, state["ema"])
    return module.eval().requires_grad_(False), int(state["seen"].item())


class _Share:
    """The parameters that one worker steps: a contiguous run of them, about equally many weights for each."""

    def __init__(self, rank: int, state: State, module: nn.Module, schedule: Schedule) -> None:
        workers, size = len(state["grads"]), len(state["weights"])
        self.rank, self.state, self.schedule = rank, state, schedule
        _view(module, state["compute"], state["grads"][rank])
        mine: list[tuple[str, nn.Parameter, slice]] = []
        offset = 0
        for name, p in module.named_parameters():
            if offset * workers // size == rank:
                mine.append((name, p, slice(offset, offset + p.numel())))
            offset += p.numel()
        self.span = slice(mine[0][2].start, mine[-1][2].stop)
        self.own = [nn.Parameter(state["weights"][where].view_as(p)) for _, p, where in mine]
        inner = [schedule.muon is not None and is_inner(name, p) for name, p, _ in mine]
        rest = [p for p, is_one in zip(self.own, inner, strict=True) if not is_one]
        on_gpu = state["weights"].device.type == "cuda"
        self.now, self.keep = (
            torch.zeros((), device=state["weights"].device) for _ in range(2)
        )  # read by a captured step
        self.adam = torch.optim.AdamW(
            [{"params": rest}],
            lr=torch.zeros_like(self.now),
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=True,
            capturable=on_gpu,
        )
        self.muon = defaultdict[torch.Size, list[tuple[nn.Parameter, Tensor]]](list)  # by shape
        for (_, _, where), p, is_one in zip(mine, self.own, inner, strict=True):
            first, second = (state[key][where].view_as(p) for key in ("exp_avg", "exp_avg_sq"))
            if is_one:
                self.muon[p.flatten(1).shape].append((p, first))
            else:
                step = torch.tensor(float(state["step"].item()), device=p.device)
                self.adam.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def take(self) -> None:
        """The mean of all workers' gradients, and its part of the squared norm."""
        mean = self.state["grads"][:, self.span].float().mean(0)
        self.state["norms"][self.rank] = mean.square().sum()
        for p, grad in zip(self.own, mean.split([p.numel() for p in self.own]), strict=True):
            p.grad = grad.view_as(p)

    def set_rate(self, step: int) -> None:
        """The share of the full rate at a step, and how much of the old average the new one keeps."""
        schedule = self.schedule
        self.now.fill_(min((step + 1) / schedule.warmup, 1 - step / schedule.steps))
        self.keep.fill_(min(schedule.ema, (1 + step) / (10 + step)))
        self.adam.param_groups[0]["lr"].fill_(self.now * schedule.rate)

    @torch.no_grad()
    def step(self) -> None:
        self.state["grads"][self.rank].zero_()
        clip = (1 / self.state["norms"].sum().sqrt()).clamp(max=1)
        torch._foreach_mul_([p.grad for p in self.own], clip)  # type: ignore[arg-type]
        self.adam.step()
        for group in self.muon.values():
            updates = []
            for p, momentum in group:
                assert p.grad is not None
                momentum.lerp_(p.grad, 0.1)
                updates.append(p.grad.lerp(momentum, 0.9).flatten(1))
            rows, columns = updates[0].shape
            scale = -(self.schedule.muon or 0) * max(1, rows / columns) ** 0.5 * self.now
            solved = orthogonal(torch.stack(updates).to(self.state["compute"].dtype)).float()
            for (p, _), update in zip(group, solved, strict=True):
                p.add_(update.view_as(p) * scale)
        weights = self.state["weights"][self.span]
        self.state["ema"][self.span].lerp_(weights, 1 - self.keep)
        self.state["compute"][self.span].copy_(weights)


def is_inner(name: str, p: Tensor) -> bool:
    """Convolutions and transformer layers between hidden layers, which Muon is for; the first and last ones keep to AdamW, as do
    the scales and shifts of a transformer's norms, which start at zero."""
    if p.ndim == 4:
        return not any(part in name for part in ("conv_in", "conv_out", "quant", "pos_embed"))
    return p.ndim == 2 and "transformer_blocks" in name and "norm1" not in name


def orthogonal(matrices: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices to `[n, a, b]`, by five quintic Newton-Schulz steps (Muon, K. Jordan 2024).

    torch.optim.Muon does this for one matrix at a time, and not for convolutions; those are flattened to `[out, in·h·w]` here."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def _flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def _view(module: nn.Module, weights: Tensor, grads: Tensor | None = None) -> None:
    """Make every parameter (and gradient) a view of one vector."""
    offset = 0
    for p in module.parameters():
        span = slice(offset, offset + p.numel())
        p.data = weights[span].view_as(p)
        if grads is not None:
            p.grad = grads[span].view_as(p)
        offset += p.numel()
