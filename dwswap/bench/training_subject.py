"""The model that a case of training is about: weights, images, labels, exact gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dwswap.bench.layers import DTYPES, LAYOUTS
from dwswap.bench.model_cases import Case
from dwswap.bench.model_peers import Runner
from dwswap.bench.model_results import Measured
from dwswap.bench.model_subject import Run, Subject, collect
from dwswap.bench.training_results import TrainingResult
from dwswap.bench.training_step import CapturedStep, Step, without_randomness

__all__ = ["TrainingSubject", "gradient_error"]

LARGEST_SCALE = 2.0**16
"""What ``torch.amp.GradScaler`` starts with."""


@dataclass
class TrainingSubject(Subject):
    """See ``Subject``. Weights and images are float32; the dtype of the case is that of autocast.

    Errors are those of one step from these weights without dropout and stochastic depth, against
    the same step of the original in float64: ``gradient_error``, and that of the loss, relative.

    Attributes:
        exact: gradients in float64, one per parameter.
        labels: ``(batch,)``.
        exact_loss: in float64.
        eager_loss_error: of the model as it is.
        scale: of the loss in float16: the largest power of two at which the gradients of the model
            as it is are finite, as a ``GradScaler`` finds it, halved for those of the others.
    """

    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    exact_loss: float = 0.0
    eager_loss_error: float = 0.0
    scale: float = LARGEST_SCALE

    @classmethod
    def make(cls, model: nn.Module, case: Case, device: torch.device) -> TrainingSubject:
        """Make up images and labels, and compute the gradients.

        Args:
            model: in train mode.
            case: what is measured.
            device: where ``model`` is.

        Raises:
            ValueError: the model is no classifier, or its gradients are not finite.
        """
        generator = torch.Generator(device).manual_seed(case.batch)
        shape = (case.batch, 3, case.size, case.size)
        images = torch.randn(shape, device=device, generator=generator)
        images = images.contiguous(memory_format=LAYOUTS[case.layout])
        output = copy.deepcopy(model)(images[:2])
        if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the model's output must be (N, 2 or more) scores, got {got}")
        classes = output.shape[1]
        labels = torch.randint(classes, (case.batch,), device=device, generator=generator)
        subject = cls(case, model, images, [], 0.0, labels=labels)
        fixed = subject.fixed()
        wide = Step(fixed.double(), images.double(), labels, torch.float64, 1.0)
        subject.exact_loss = float(wide())
        subject.exact = wide.gradients()
        del wide, fixed
        collect(device)
        subject._find_scale()
        return subject

    @property
    def limits(self) -> dict[str, Any]:
        return {"error_limit": self.limit, "loss_limit": self.loss_limit}

    @property
    def loss_limit(self) -> float:
        """Twice eager's error, and a unit in the last place."""
        return 2 * self.eager_loss_error + torch.finfo(DTYPES[self.case.dtype]).eps

    def accepts(self, run: Measured) -> bool:
        loss = run.loss_error is None or run.loss_error <= self.loss_limit
        return loss and super().accepts(run)

    def fixed(self) -> nn.Module:
        """A copy of the model that draws no random numbers."""
        return without_randomness(copy.deepcopy(self.model))

    def call(self, runner: Runner, forward: Callable[[Any], Any], argument: Any) -> Step:
        kind = CapturedStep if runner.captured else Step
        return kind(forward, argument, self.labels, DTYPES[self.case.dtype], self.scale)

    def check(self, run: Run, runner: Runner, forward: Callable[[Any], Any]) -> None:
        """As for forwards, of a model that is built again: ``run`` has random numbers, and has
        changed its weights. Peers that compile are passed over, as that takes another minute.
        """
        if runner.compiled and run.name not in TrainingResult.ours:
            return
        model = self.fixed().to(memory_format=self.layout(runner))
        argument = self.argument(runner)
        step = self.call(runner, runner.build(model, argument), argument)
        run.error, run.loss_error = self.step_errors(step)

    def step_errors(self, step: Step) -> tuple[float, float]:
        """The errors of the gradients and of the loss of the first step, which this takes.

        Raises:
            ValueError: gradients of another number or shape, or not finite, or a loss that is not.
        """
        # For randomness that ``fixed`` does not know: at least the same in every step.
        torch.manual_seed(0)
        loss = float(step())
        found = step.gradients()
        if [grad.shape for grad in found] != [grad.shape for grad in self.exact]:
            raise ValueError("gradients of other shapes than the model's")
        errors = gradient_error(found, self.exact), abs(loss / self.exact_loss - 1)
        if not all(map(math.isfinite, errors)):
            raise ValueError(f"a loss of {loss:g} or gradients that are not finite")
        return errors

    def _find_scale(self) -> None:
        """Set ``scale`` and the errors of the model as it is; raises where none is finite."""
        while True:
            try:
                step = Step(
                    self.fixed(), self.images, self.labels, DTYPES[self.case.dtype], self.scale
                )
                self.eager_error, self.eager_loss_error = self.step_errors(step)
                break
            except ValueError:
                if self.case.dtype != "float16" or self.scale <= 1:
                    raise
                self.scale /= 2
        self.scale = max(1.0, self.scale / 2)


def gradient_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The root mean square over the parameters of ``|gradient - exact| / |exact|``.

    In Euclid's norm; each layer counts, however small its gradients are. Infinite or NaN where a
    gradient is.

    Args:
        found: gradients, one per parameter.
        exact: the same in float64.
    """
    norms = torch.stack([gradient.norm() for gradient in exact])
    whole = norms.norm()
    # What is zero but for rounding, as of a bias before BatchNorm, has no relative error.
    zero = norms <= torch.finfo(torch.float32).eps * whole
    scales = torch.where(zero, whole, norms)
    apart = [(ours.double() - wide).norm() for ours, wide in zip(found, exact, strict=True)]
    return float((torch.stack(apart) / scales).square().mean().sqrt())
