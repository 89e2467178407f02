"""CUDA graphs: the kernels of a training step are recorded once for each form of step, then replayed in one call.

A step of SDXL launches some 10,000 kernels. If Python launches them one by one, a fast card is busy only 4 % of the
time. What is captured is a function of tensors that may add to the gradients of parameters: the forward and backward
passes of a step, or a prediction. Its inputs are copied into static buffers, and its gradients are added into buffers
at fixed addresses. The captured function must not wait for the device.

A form is a combination of key, input shapes and dtypes. Its first calls run without a graph and count as normal steps.
The last of these calls shows which parameters get a gradient.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbraid.common.errors import first_line

Call = Callable[[], Tensor]
WARM = 3  # calls of a form before it is captured; by then the libraries have created their handles and plans
MOST = 32  # captured forms; others (if there are many captions and shapes) run without a graph


@runtime_checkable
class Executor(Protocol):
    """Runs and captures calls on a device."""

    def eager(self, call: Call) -> Tensor:
        """Run `call` without capturing it, in such a way that it can be captured later."""
        ...

    def capture(self, call: Call) -> Call:
        """Record the kernels of `call` without running them. The returned function runs them, and returns the same
        tensor object every time."""
        ...


class CudaExecutor:
    """CUDA graphs that share one memory pool. This is safe because they are never replayed at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def eager(self, call: Call) -> Tensor:
        """Run `call` on the stream that is used for capturing, as torch requires."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = call()
        current.wait_stream(self.stream)
        return out

    def capture(self, call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            out = call()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@dataclass
class _Form:
    """One form of call: how often it was called, and, once it is captured, its buffers."""

    seen: int = 0
    inputs: tuple[Tensor, ...] = ()
    learning: tuple[nn.Parameter, ...] = ()  # the parameters that get a gradient
    replay: Call | None = None
    kept: object = None  # objects that the graph reads and that might otherwise be freed


class Graphs:
    """Captured calls by form. If a capture failed, `reason` is the error, and nothing is captured any more."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.reason = ""
        self.forms: dict[Hashable, _Form] = {}
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def __call__(
        self,
        key: Hashable,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[nn.Parameter] = (),
        keep: Callable[[], object] = tuple,
    ) -> Tensor:
        """Return `function(*inputs)`, from a captured graph if possible.

        `key`: what the function does may depend only on the key, on the shapes of the inputs, and on values at fixed
        addresses in memory. `parameters`: those that may get gradients. `keep`: returns objects to keep alive with the
        graph."""
        form = self._form((key, *((one.shape, one.dtype) for one in inputs)))
        if form is None:
            return self.executor.eager(lambda: function(*inputs)) if not self.reason else function(*inputs)
        if form.replay:
            return self._replay(form, inputs)
        form.seen += 1
        if form.seen < WARM:
            return self.executor.eager(lambda: function(*inputs))
        out, form.learning = self._observed(lambda: function(*inputs), parameters)
        form.inputs, form.kept = tuple(one.clone() for one in inputs), keep()
        self._capture(form, lambda: function(*form.inputs), parameters)
        return out

    def clear(self) -> None:
        """Free the memory of all graphs. A form that is called again is captured again."""
        self.forms.clear()
        self.gradients.clear()

    def _form(self, key: Hashable) -> _Form | None:
        if self.reason or (key not in self.forms and len(self.forms) == MOST):
            return None
        return self.forms.setdefault(key, _Form())

    def _observed(self, call: Call, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, tuple[nn.Parameter, ...]]:
        """Run `call` without capturing it. Returns its output and the parameters that got a gradient."""
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        out = self.executor.eager(call)
        learning = tuple(p for p in parameters if p.grad is not None)
        for p, old in zip(parameters, before, strict=True):
            if old is not None:
                p.grad = old if p.grad is None else old.add_(p.grad)
        return out, learning

    def _capture(self, form: _Form, call: Call, parameters: Sequence[nn.Parameter]) -> None:
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        for p in form.learning:
            p.grad = self.gradients.setdefault(p, torch.zeros_like(p, requires_grad=False))
        try:
            form.replay = self.executor.capture(call)
        except RuntimeError as error:  # torch's error for calls that cannot be captured; out of memory is one, too
            self.reason = first_line(error)
            self.clear()
        finally:
            for p, old in zip(parameters, before, strict=True):
                p.grad = old

    def _replay(self, form: _Form, inputs: Sequence[Tensor]) -> Tensor:
        for static, new in zip(form.inputs, inputs, strict=True):
            static.copy_(new, non_blocking=True)
        fresh = [p for p in form.learning if p.grad is None]
        for p in form.learning:
            buffer = self.gradients[p]
            if p.grad is not None and p.grad is not buffer:
                buffer.copy_(p.grad)
            p.grad = buffer
        if fresh:
            torch._foreach_zero_([self.gradients[p] for p in fresh])
        assert form.replay
        return form.replay().clone()
