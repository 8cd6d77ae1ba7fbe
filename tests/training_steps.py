"""Steps of training of small models on a GPU, for the tests of the kernels that training has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dwswap.bench.capture import capture


def draw(shape: Sequence[int], seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device="cuda")


def three_steps(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of ``model`` after them; half precision under autocast."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return {name: value.clone() for name, value in model.state_dict().items()}


def second_gradients(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of the squared gradient of ``loss`` of the output by ``x``: by ``x`` and all parameters."""
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(model(leaf)), leaf, create_graph=True)
    tensors = (leaf, *model.parameters())
    return list(
        torch.autograd.grad(
            slope.square().sum(), tensors, allow_unused=True, materialize_grads=True
        )
    )


def peak_memory(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward with its backward needs beyond what there was before."""
    for _ in range(2):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).sum().backward()
    return torch.cuda.max_memory_allocated() - before


def captured_backward(model: nn.Module, x: Tensor) -> torch.cuda.CUDAGraph:
    """A graph of one forward and backward, after three; gradients are those of its replays."""

    def step() -> None:
        model.zero_grad()
        model(x).sum().backward()

    return capture(step)[0]
