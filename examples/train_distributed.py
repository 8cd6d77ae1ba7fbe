"""Train the model of train_digits.py in several processes, one GPU each, with dwswap.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py

``dwswap.optimize`` comes before ``DistributedDataParallel``: it swaps the depthwise layers, whose
Parameters DDP then watches like all others. At the end all ranks must hold equal parameters, and
rank 0 optimizes the trained model for inference; the accuracy must not move.

Without GPUs (``--device cpu``) the processes talk through gloo. ``python
examples/train_distributed.py`` trains in one process.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from digits import (
    BATCH,
    accuracy,
    check_inference,
    new_model,
    new_optimizer,
    predict,
    split_digits,
    train_steps,
)
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset

import dwswap


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on digits in several processes.")
    parser.add_argument(
        "--epochs", type=int, default=8, help="default: 8; fewer than 4 may not pass the check"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="arrays images and target")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=devices, default=devices[-1])
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > BATCH:
        parser.error(f"torchrun must start at most {BATCH} processes (a batch), got {processes}")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if args.device == "cuda" and here > gpus:
        parser.error(
            f"--device cuda needs a GPU per process: --nproc-per-node must be at most {gpus}, "
            f"got {here}; --device cpu takes any number"
        )
    return args


def join(device: torch.device) -> None:
    """Join the processes that torchrun started; alone, be a group of one."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, missing in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def mean_over_ranks(value: float, device: torch.device) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def equal_on_all_ranks(model: nn.Module) -> bool:
    """Whether every parameter has the bits that it has on rank 0; every rank gets the answer."""
    ours = nn.utils.parameters_to_vector(model.parameters()).detach()
    of_rank_0 = ours.clone()
    dist.broadcast(of_rank_0, src=0)
    equal = torch.tensor(int(torch.equal(ours, of_rank_0)), device=ours.device)
    dist.all_reduce(equal, op=dist.ReduceOp.MIN)
    return bool(equal)


def train(args: argparse.Namespace, device: torch.device) -> int:
    rank, world = dist.get_rank(), dist.get_world_size()
    console = Console(highlight=False, quiet=rank != 0)
    torch.manual_seed(args.seed)  # the same split and the same weights on every rank
    training, test = split_digits(args.data, device)
    # Before DDP: it hooks the Parameters of the model that it is given.
    model = dwswap.optimize(new_model(device))
    console.print(dwswap.report(model).summary(), markup=False, soft_wrap=True)
    parallel = DistributedDataParallel(model)

    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
        TensorDataset(*training), seed=args.seed
    )
    share = BATCH // world  # of a batch; all ranks together train on the batches of one process
    optimizer, schedule = new_optimizer(parallel, args.epochs * -(-len(sampler) // share))
    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)
        parallel.train()
        batches = torch.tensor(list(sampler)).split(share)
        losses = train_steps(parallel, training, batches, optimizer, schedule)
        loss = mean_over_ranks(sum(losses) / len(losses), device)
        if rank == 0:
            reached = accuracy(predict(model.eval(), test.images), test.labels)
            console.print(f"epoch {epoch}: loss {loss:.4f}, test accuracy {reached:.2%}")

    equal = equal_on_all_ranks(model)
    passed = equal
    console.print(f"{world} ranks: parameters are {'equal' if equal else 'NOT equal'}")
    if rank == 0:
        passed = check_inference(model, test, console)[2] and passed
    dist.barrier()  # rank 0 is busy for longer, and keeps the store of all ranks
    return 0 if passed else 1


def main() -> int:
    args = arguments()
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    join(device)
    try:
        return train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
