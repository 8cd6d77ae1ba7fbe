"""The model that a case is about: the weights as the user has them, an input, exact outputs."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dwswap.bench.layers import DTYPES, LAYOUTS
from dwswap.bench.model_cases import Case
from dwswap.bench.model_peers import Runner
from dwswap.bench.model_results import Measured
from dwswap.precision import exact_float64

__all__ = ["Run", "Subject", "collect", "detects"]

CHECKED = 8
"""Images whose outputs are compared with float64. The error in a small output of one image, as the
last feature map of SSD, is mostly chance: small batches are compared as often as makes so many.
"""


@dataclass
class Subject:
    """Do not change ``model``: every way to run it gets a copy.

    Attributes:
        images: ``(batch, 3, size, size)``, in the dtype and the layout of the case.
        exact: outputs for some of the images and of the probes, in float64, of the weights as
            rounded to the dtype: only the arithmetic counts as error.
        eager_error: of the model as it is; see ``Measured.error``.
        eager_rms_error: see ``Measured.rms_error``.
        probes: more batches like ``images``, to be compared only.
    """

    case: Case
    model: nn.Module
    images: Tensor
    exact: list[Tensor]
    eager_error: float
    eager_rms_error: float | None = None
    probes: list[Tensor] = field(default_factory=list)

    @classmethod
    def make(cls, model: nn.Module, case: Case, device: torch.device) -> Subject:
        """Make up the images and compute the outputs; raises what the model raises."""
        generator = torch.Generator(device).manual_seed(case.batch)
        shape = (case.batch, 3, case.size, case.size)

        def batch() -> Tensor:
            images = torch.randn(shape, device=device, generator=generator).to(DTYPES[case.dtype])
            return images.contiguous(memory_format=LAYOUTS[case.layout])

        subject = cls(case, model, batch(), [], 0.0)
        subject.probes = [batch() for _ in range(-(-CHECKED // case.batch) - 1)]
        # A detection model finds other boxes after every rounding: its features are compared.
        part = subject.compared(model)
        wide = copy.deepcopy(part).double()
        few = torch.cat([images[subject.checked] for images in subject.batches])
        with exact_float64():
            subject.exact = subject._outputs(wide(few.double()))
        del wide
        collect(device)
        subject.eager_error, subject.eager_rms_error = subject.deviations(part)
        return subject

    @property
    def batches(self) -> list[Tensor]:
        """All that is compared, in the layout of the case."""
        return [self.images, *self.probes]

    @property
    def detects(self) -> bool:
        return detects(self.model)

    @property
    def checked(self) -> slice:
        """Some images of a batch, the last among them."""
        step = -(-self.case.batch // CHECKED)
        return slice((self.case.batch - 1) % step, None, step)

    @property
    def limit(self) -> float:
        """The rule for numbers: twice eager's error, and a unit in the last place."""
        return 2 * self.eager_error + torch.finfo(DTYPES[self.case.dtype]).eps

    @property
    def limits(self) -> dict[str, Any]:
        """What the result says of how large errors may be."""
        return {"error_limit": self.limit}

    def accepts(self, run: Measured) -> bool:
        """Whether its errors, where they are known, are within the limits."""
        return run.error is None or run.error <= self.limit

    def layout(self, runner: Runner) -> torch.memory_format:
        """That of the model and the images for ``runner``."""
        return LAYOUTS[runner.layout or self.case.layout]

    def argument(self, runner: Runner) -> Any:
        """What a model is called with: the images in the layout for ``runner``."""
        images = self.images.contiguous(memory_format=self.layout(runner))
        return list(images) if self.detects else images

    def call(
        self, runner: Runner, forward: Callable[[Any], Any], argument: Any
    ) -> Callable[[], Any]:
        """What is timed of ``forward``, which ``runner`` built to be called with ``argument``."""
        return partial(forward, argument)

    def check(self, run: Run, runner: Runner, forward: Callable[[Any], Any]) -> None:
        """Put the errors of ``run`` into it; raises what the model raises.

        Args:
            run: warm.
            runner: what it was built by.
            forward: what was built.
        """
        errors = self.errors(runner, forward)
        if errors is not None:
            run.error, run.rms_error = errors

    def compared(self, forward: Any) -> Any:
        """What is compared of a way to run the model: all of it, or the features."""
        return forward.backbone if self.detects else forward

    def errors(self, runner: Runner, forward: Callable[[Any], Any]) -> tuple[float, float] | None:
        """The deviations of what ``runner`` built; None where its features cannot be had."""
        if not self.detects:
            return self.deviations(forward, self.layout(runner))
        # A compiled model has the original's features as an attribute: not what it computes.
        compiled = type(forward).__module__.startswith("torch._dynamo")
        if compiled or not isinstance(getattr(forward, "backbone", None), nn.Module):
            return None
        return self.deviations(self.compared(forward))

    def deviations(
        self, forward: Callable[[Any], Any], layout: torch.memory_format | None = None
    ) -> tuple[float, float]:
        """The largest deviation of any output, relative to that output's largest value; and the
        root mean square of an output's deviations, relative to that of its values, the largest.

        Args:
            forward: called with tensors of images.
            layout: these are in; that of the case by default.

        Raises:
            ValueError: the outputs are of another number or shape, or not finite.
        """
        outputs = []
        for images in self.batches:
            output = forward(images if layout is None else images.contiguous(memory_format=layout))
            # A copy: a CUDA graph writes the next output over this one.
            outputs.append([leaf[self.checked].clone() for leaf in self._outputs(output)])
        found = [torch.cat(leaves) for leaves in zip(*outputs, strict=True)]
        if [leaf.shape for leaf in found] != [leaf.shape for leaf in self.exact]:
            shapes = [tuple(leaf.shape) for leaf in found]
            raise ValueError(f"outputs of other shapes than the model's: {shapes}")
        apart = [ours.double() - exact for ours, exact in zip(found, self.exact, strict=True)]

        def largest(size: Callable[[Tensor], Tensor]) -> float:
            pairs = zip(apart, self.exact, strict=True)
            return float(torch.stack([size(a) / size(e).clamp_min(1e-300) for a, e in pairs]).max())

        errors = largest(lambda x: x.abs().max()), largest(torch.Tensor.norm)
        if not all(map(math.isfinite, errors)):
            raise ValueError("outputs that are not finite, unlike those in float64")
        return errors

    def _outputs(self, output: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@dataclass
class Run:
    """One way to run a model, ready to be timed, or the reason why it is not."""

    name: str
    call: Callable[[], Any] | None = None
    build_s: float | None = None
    first_call_s: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    rms_error: float | None = None
    loss_error: float | None = None
    slow: bool = False
    summary: str = ""
    note: str | None = None
    reason: str | None = None

    def measured(
        self,
        subject: Subject,
        us: float | None,
        speedups: dict[str, float] | None = None,
        within: dict[str, float] | None = None,
    ) -> Measured:
        """With the time per call, where it has one, in microseconds."""
        ratio = _ratio(self.rms_error, subject.eager_rms_error)
        return Measured(
            self.name,
            us=us,
            images_per_second=None if us is None else subject.case.batch / us * 1e6,
            speedups=speedups or {},
            within=within or {},
            build_s=self.build_s,
            first_call_s=self.first_call_s,
            peak_bytes=self.peak_bytes,
            error=self.error,
            rms_error=self.rms_error,
            error_ratio=_ratio(self.error, subject.eager_error) if ratio is None else ratio,
            loss_error=self.loss_error,
            note=self.note,
            reason=self.reason,
        )


def _ratio(error: float | None, eager: float | None) -> float | None:
    return None if error is None or not eager else error / eager


def detects(model: nn.Module) -> bool:
    """Whether it takes a list of images, and returns as many boxes as it finds."""
    return type(model).__module__.startswith("torchvision.models.detection")


def collect(device: torch.device) -> None:
    """Give back what nothing uses any more, and what cuBLAS works in.

    A capture gives the latter back too, and that must not count for the model that is captured.
    """
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
