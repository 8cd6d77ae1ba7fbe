"""Which models are measured, at which batch size, dtype and layout."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

from dwswap.bench.shapes import torchvision_shapes

__all__ = [
    "ACCEPTED",
    "BATCHES",
    "TRAINED",
    "Case",
    "choose",
    "classifiers",
    "defaults",
    "depthwise_models",
    "product",
    "training_cases",
]

SIZE = 224
BATCHES = (1, 32, 256)
ACCEPTED = (
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "efficientnet_v2_s",
    "convnext_tiny",
)
"""The models that the targets of ``dwswap.bench.model_targets`` name."""

TRAINED = {"mobilenet_v2": 256, "efficientnet_b0": 128}
"""The models whose training has targets, with their batch sizes."""

TRAINING_BATCH = 128
"""Of every other model."""


class Case(NamedTuple):
    """One model as a user would have it; ``size`` is the height and width of the images."""

    model: str
    batch: int
    dtype: str
    layout: str
    size: int = SIZE

    def __str__(self) -> str:
        text = f"{self.model}-n{self.batch}-{self.dtype}-{self.layout}"
        return text if self.size == SIZE else f"{text}-{self.size}px"


def depthwise_models() -> list[str]:
    """The 38 torchvision models with depthwise convolutions, detection and segmentation too.

    The six of ``quantized_`` names are built in floating point.
    """
    return sorted({model for shape in torchvision_shapes() for model in shape.models})


def classifiers() -> list[str]:
    """Those of ``depthwise_models`` that are trained on one label per image."""
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    return [name for name in depthwise_models() if name in known]


def product(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    size: int = SIZE,
) -> list[Case]:
    """All combinations, those of a model together: they share its weights."""
    return [
        Case(model, batch, dtype, layout, size)
        for model in dict.fromkeys(models)
        for dtype in dict.fromkeys(dtypes)
        for layout in dict.fromkeys(layouts)
        for batch in dict.fromkeys(batches)
    ]


def defaults(batches: Sequence[int] = BATCHES, size: int = SIZE) -> list[Case]:
    """Half precision in channels_last, and what a newcomer has: float32 in NCHW."""
    cases = product(ACCEPTED, batches, ["float16"], ["channels_last"], size)
    newcomer = product(["mobilenet_v2"], [max(batches)], ["float32"], ["contiguous"], size)
    return newcomer + cases


def training_cases(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    size: int = SIZE,
) -> list[Case]:
    """As ``product``; without ``batches`` each model has its own of ``TRAINED``."""
    return [
        case
        for model in dict.fromkeys(models)
        for case in product(
            [model], batches or [TRAINED.get(model, TRAINING_BATCH)], dtypes, layouts, size
        )
    ]


def choose(cases: Sequence[Case], pattern: str) -> list[Case]:
    """The cases whose name, such as ``mobilenet_v2-n1-float16-channels_last``, fits ``pattern``.

    Args:
        pattern: a shell pattern, which may leave out the start and the end.

    Raises:
        ValueError: none does; names some.
    """
    chosen = [case for case in cases if fnmatch.fnmatchcase(str(case), f"*{pattern}*")]
    if not chosen:
        examples = ", ".join(str(case) for case in cases[:3])
        raise ValueError(f"no case fits {pattern!r}; there are {len(cases)}, such as {examples}")
    return chosen
