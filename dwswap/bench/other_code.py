"""Code of another kernel between the launches of a benchmark, as there is in a network."""

from __future__ import annotations

from typing import Any

import torch

from dwswap.bench.timing import MOST_BUFFERS, time_launches

__all__ = ["OtherCode"]

SOURCE = """
extern "C" __global__ void other_code(float* never) {
  float a = threadIdx.x, b = a + 1, c = a + 2, d = a + 3;
#pragma unroll
  for (int i = 0; i < 1024; ++i) {
    a = fmaf(a, b, i * 0.3f), b = fmaf(b, c, i * 0.5f);
    c = fmaf(c, d, i * 0.7f), d = fmaf(d, a, i * 0.9f);
  }
  if (a + b + c + d == -1.0f) *never = a;
}
"""
"""4096 different instructions of 16 bytes, executed once: they take the place of all others in a
multiprocessor's instruction caches."""


class OtherCode:
    """A launch on one CUDA device that leaves no code of others in its instruction caches.

    Attributes:
        microseconds: what it takes, about 6 on an H200.

    Raises:
        RuntimeError: this PyTorch has no ``torch.cuda._compile_kernel`` (2.9 has it), or no NVRTC.
    """

    def __init__(self, device: torch.device) -> None:
        compile_kernel: Any = getattr(torch.cuda, "_compile_kernel", None)
        if compile_kernel is None:
            raise RuntimeError(
                "other code needs a PyTorch with torch.cuda._compile_kernel, got "
                f"{torch.__version__}"
            )
        with torch.cuda.device(device):
            try:
                self._kernel = compile_kernel(SOURCE, "other_code")
            except OSError as error:
                raise RuntimeError(f"other code needs NVRTC: {error}") from error
            self._grid = torch.cuda.get_device_properties(device).multi_processor_count
            self._never = torch.zeros(1, device=device)
        self.microseconds = 0.0
        self.microseconds = time_launches([self] * MOST_BUFFERS, device).microseconds

    def __call__(self) -> None:
        self._kernel(grid=(self._grid, 1, 1), block=(128, 1, 1), args=[self._never])
