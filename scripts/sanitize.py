"""Ragged shapes through every family of kernels, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck python scripts/sanitize.py
    compute-sanitizer --tool initcheck python scripts/sanitize.py --no-bulk-stores
    compute-sanitizer --tool racecheck python scripts/sanitize.py

initcheck does not see what a bulk copy from shared memory writes, so with --no-bulk-stores whatever
would run a family with such copies runs as it does on GPUs without them.
Every tensor is an allocation of its own, so an access beyond its end is an error that memcheck
sees. Results are compared with float64 on the CPU. The problems are in scripts/sanitizer.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

# Read when torch starts CUDA.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from sanitizer import (
    batch_norm,
    channel_means,
    channel_norm,
    channel_scale,
    depthwise_conv2d,
    depthwise_conv2d_backward,
    interleave_channels,
    pooled_linear,
    separable_conv2d,
    squeeze_excitation,
    stem_conv2d,
)

from dwswap import build

# Those without bulk stores, in the order in which they run.
OTHERS = (
    squeeze_excitation,
    interleave_channels,
    channel_means,
    channel_norm,
    batch_norm,
    channel_scale,
    stem_conv2d,
    pooled_linear,
    separable_conv2d,
)


def all_checks(bulk_stores: bool) -> list[partial[str | None]]:
    """A check per problem, which is the first of its arguments."""
    checks = [
        partial(depthwise_conv2d.check, problem, bulk_stores)
        for problem in depthwise_conv2d.problems()
    ]
    for problem in depthwise_conv2d_backward.problems():
        # Gradients of the input run forward families.
        portable = problem._replace(portable=not bulk_stores)
        checks.append(partial(depthwise_conv2d_backward.check, portable))
    for operator in OTHERS:
        checks += [partial(operator.check, problem) for problem in operator.problems()]
    return checks


def main(arguments: list[str]) -> int:
    bulk_stores = "--no-bulk-stores" not in arguments
    if not torch.cuda.is_available():
        print("sanitize: PyTorch sees no CUDA GPU", file=sys.stderr)
        return 1
    count, failures = 0, 0
    with torch.no_grad():
        for check in all_checks(bulk_stores):
            wrong = check()
            count += 1
            if wrong is not None:
                failures += 1
                print(f"{check.args[0]}: {wrong}", file=sys.stderr)
    torch.cuda.synchronize()
    if not build.status().loaded:
        print(f"sanitize: no kernels of ours ran: {build.status().reason}", file=sys.stderr)
        return 1
    print(f"sanitize: {count} cases, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
