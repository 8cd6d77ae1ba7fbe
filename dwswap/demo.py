"""What ``dwswap demo`` computes: a photograph, a model that reacts to it, errors and timings.

The command (``dwswap/cli/demo.py``) only prints it. Needs torchvision and Pillow.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dwswap.bench.random_weights import randomize
from dwswap.bench.timing import Timing, time_side_by_side
from dwswap.precision import exact_float64, float32_convolutions
from dwswap.report import LayerErrors, Report, report
from dwswap.rewrite import optimize
from dwswap.verify import compare as judge

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Comparison",
    "Variant",
    "compare",
    "photograph",
    "preprocessing",
    "randomize",
    "variants",
    "views",
]

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def photograph(path: str | os.PathLike[str] | None = None) -> tuple[Image.Image, str]:
    """Open a photograph, and say which it is.

    Args:
        path: an image file; None takes one that an installed package brings along: the temple of
            scikit-learn's sample images, else the portrait of matplotlib's sample data.

    Raises:
        OSError: the file cannot be read, or is no image; or there is no path and no such package.
    """
    from PIL import Image

    if path is not None:
        return Image.open(path).convert("RGB"), os.fspath(path)
    for origin, find in (("scikit-learn", _scikit_learn), ("matplotlib", _matplotlib)):
        try:
            file = find()
        except ModuleNotFoundError:
            continue
        if file.is_file():
            return Image.open(file).convert("RGB"), f"{file.name} of {origin}"
    raise FileNotFoundError(
        "no installed package brings a photograph: pip install 'dwswap[bench]', or give one"
    )


def preprocessing(model_name: str) -> tuple[Callable[[Image.Image], Tensor], list[str]]:
    """Return torchvision's own preprocessing for a classification model, and the class names.

    For most models: resize the shorter side to 256, crop 224 x 224 in the middle, normalize.

    Raises:
        ValueError: torchvision has no classification model of this name.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if model_name not in names:
        raise ValueError(f"model must be a torchvision classification model, got {model_name!r}")
    weights = next(iter(models.get_model_weights(model_name)))
    return weights.transforms(), list(weights.meta["categories"])


def views(image: Tensor, count: int) -> Tensor:
    """Make a batch of ``count`` different pictures ``(count, 3, H, W)`` of one ``(3, H, W)``."""
    return torch.stack([image.roll(16 * index, dims=-1) for index in range(count)])


@dataclass(frozen=True)
class Variant:
    """One line of the timing table."""

    dtype: torch.dtype
    layout: str
    batch: int

    def to_dict(self) -> dict[str, Any]:
        return {"dtype": _name(self.dtype), "layout": self.layout, "batch": self.batch}


@dataclass(frozen=True)
class Comparison:
    """The original against the optimized model: times per call, and errors against float64."""

    variant: Variant
    eager: Timing
    optimized: Timing
    errors: LayerErrors
    report: Report

    @property
    def speedup(self) -> float:
        return self.eager.microseconds / self.optimized.microseconds

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.variant.to_dict(),
            "eager": self.eager.to_dict(),
            "optimized": self.optimized.to_dict(),
            "speedup": self.speedup,
            "error": self.errors.ours,
            "eager_error": self.errors.pytorch,
            "error_limit": self.errors.limit,
            "passed": self.errors.passed,
            "summary": self.report.summary(),
        }


def variants(device: torch.device, batches: list[int] | None = None) -> list[Variant]:
    """List what to time: on CUDA two dtypes, elsewhere float32, in both layouts."""
    cuda = device.type == "cuda"
    dtypes = (torch.float32, torch.float16) if cuda else (torch.float32,)
    batches = batches or ([1, 32] if cuda else [1, 4])
    return [
        Variant(dtype, layout, batch) for dtype in dtypes for layout in LAYOUTS for batch in batches
    ]


def compare(
    model: nn.Module,
    image: Tensor,
    wanted: list[Variant],
    device: torch.device,
    budget: float = 0.5,
) -> Iterator[Comparison]:
    """Optimize the model per dtype and layout, check and time it per batch.

    Args:
        model: the original, float32, in eval mode; not changed.
        image: ``(3, H, W)``, float32.
        wanted: neighbours of one dtype and layout share an optimized model.
        device: where to run.
        budget: seconds per measurement.

    Yields:
        One comparison per variant, in order.
    """
    current: tuple[torch.dtype, str] | None = None
    for variant in wanted:
        memory_format = LAYOUTS[variant.layout]
        if current != (variant.dtype, variant.layout):
            current = (variant.dtype, variant.layout)
            original = copy.deepcopy(model).to(device, variant.dtype)
            original = original.to(memory_format=memory_format)
            fast = optimize(original)
            # Of the weights as rounded to the dtype: only the arithmetic counts as error.
            exact = copy.deepcopy(original).double()
        images = views(image, variant.batch).to(device, variant.dtype)
        images = images.contiguous(memory_format=memory_format)
        with torch.no_grad(), float32_convolutions():
            with exact_float64():
                wide = exact(images.double())
            errors = judge(fast(images), original(images), wide)
        calls = [partial(original, images), partial(fast, images)]
        eager, optimized = time_side_by_side(calls, device, budget=budget)
        yield Comparison(variant, eager, optimized, errors, report(fast))


def _scikit_learn() -> Path:
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"


def _matplotlib() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
