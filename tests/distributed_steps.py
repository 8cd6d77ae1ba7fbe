"""Three steps of SGD on every rank, with dwswap and without; run by ``torchrun``.

    torchrun --standalone --nproc-per-node 2 tests/distributed_steps.py KIND BACKEND

KIND is ``ddp`` or ``fsdp``, BACKEND ``gloo`` (CPU) or ``nccl`` (one GPU per rank). Fails where the
parameters, the buffers or the outputs of the two runs differ.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from tiny_models import InvertedResidual
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dwswap


def sharded(model: nn.Module) -> nn.Module:
    # Without a mesh it takes GPUs wherever there are any, for a model on the CPU as well.
    kind = next(model.parameters()).device.type
    mesh = dist.init_device_mesh(kind, (dist.get_world_size(),))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp": sharded,
}


def steps(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """What ``model`` holds after three steps on data that every rank has of its own."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        x = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64).to(device)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    state = model.state_dict()
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}


def main() -> None:
    kind, backend = sys.argv[1:]
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    torch.manual_seed(0)
    model = nn.Sequential(InvertedResidual(), InvertedResidual()).double().to(device).train()
    fast = dwswap.optimize(copy.deepcopy(model))
    assert len(dwswap.report(fast).swapped) == 2
    ours, theirs = steps(KINDS[kind](fast), device), steps(KINDS[kind](model), device)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank}: {len(theirs)} tensors are equal", flush=True)
    # Threads of gloo that still run when the interpreter ends abort the process, once in a while.
    os._exit(0)


if __name__ == "__main__":
    main()
