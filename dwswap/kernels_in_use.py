"""Which implementation of the operator runs, in words."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dwswap import build

__all__ = ["kernels_in_use"]


def kernels_in_use(tensors: Iterable[Tensor], *, load: bool) -> str:
    """What runs the operator on the devices of ``tensors``, for a report.

    Args:
        load: load the CUDA kernels where a tensor is on CUDA, and build them where needed.
    """
    devices = {tensor.device.type for tensor in tensors}
    if "cuda" in devices:
        if load:
            build.load()
        status = build.status()
        if status.loaded:
            built = "" if status.seconds is None else f", built in {status.seconds:.0f} s"
            return f"CUDA kernels{built}"
        return f"aten on CUDA: {status.reason}"
    return f"composite ({', '.join(sorted(d.upper() for d in devices)) or 'CPU'})"
