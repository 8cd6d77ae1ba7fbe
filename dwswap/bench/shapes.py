"""The depthwise convolutions of torchvision's models, and a way to choose among them.

``data/torchvision_depthwise.json`` holds each different one once: 368, with the models that call
it at an input of 224 pixels and at their own default size.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

__all__ = ["FIELDS", "LayerShape", "select", "torchvision_shapes"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class LayerShape:
    """One depthwise convolution, without its batch size; pairs are (height, width).

    Attributes:
        index: its place in the file.
        models: names of the torchvision models that call it.
    """

    index: int
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    bias: bool
    models: tuple[str, ...] = ()

    @property
    def output(self) -> Pair:
        """Height and width of the output."""
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                (self.height, self.width),
                self.kernel,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )
        return height, width

    @property
    def input_elements(self) -> int:
        """Per sample."""
        return self.channels * self.height * self.width

    @property
    def output_elements(self) -> int:
        """Per sample."""
        return self.out_channels * self.output[0] * self.output[1]

    def __str__(self) -> str:
        """Channels, height, width, kernel and stride, dilation where it is not 1."""
        text = f"{self.channels}x{self.height}x{self.width} k{_pair(self.kernel)}"
        text += f" s{_pair(self.stride)}"
        return text if self.dilation == (1, 1) else f"{text} d{_pair(self.dilation)}"


def torchvision_shapes() -> list[LayerShape]:
    """The shapes of the file, in its order."""
    file = resources.files("dwswap.bench") / "data" / "torchvision_depthwise.json"
    return [
        LayerShape(
            index=index,
            channels=entry["C_in"],
            out_channels=entry["C_out"],
            height=entry["H"],
            width=entry["W"],
            kernel=tuple(entry["kernel"]),
            stride=tuple(entry["stride"]),
            padding=tuple(entry["padding"]),
            dilation=tuple(entry["dilation"]),
            bias=any(entry["bias"]),
            models=tuple(sorted({*entry["models_224"], *entry["models_default"]})),
        )
        for index, entry in enumerate(json.loads(file.read_text(encoding="utf-8")))
    ]


FIELDS: dict[str, Callable[[LayerShape], int]] = {
    "index": lambda shape: shape.index,
    "channels": lambda shape: shape.channels,
    "height": lambda shape: shape.height,
    "width": lambda shape: shape.width,
    "kernel": lambda shape: max(shape.kernel),
    "stride": lambda shape: max(shape.stride),
    "padding": lambda shape: max(shape.padding),
    "dilation": lambda shape: max(shape.dilation),
    "bias": lambda shape: int(shape.bias),
}
"""What ``select`` can compare with a number; of a pair the larger one."""

OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

RANGE = re.compile(r"(\d*):(\d*)|(\d+)")
CONDITION = re.compile(r"([A-Za-z_]+)\s*(==|!=|<=|>=|=|<|>)\s*([\w.]+)")


def select(shapes: Sequence[LayerShape], expression: str) -> list[LayerShape]:
    """Those of ``shapes`` that meet every condition of ``expression``.

    Args:
        expression: conditions separated by commas. A condition compares a field with an integer
            (``kernel=7``, ``channels>=96``, ``stride!=1``), names a model (``model=mobilenet_v2``),
            or is an index or a half-open range of them (``12``, ``0:20``, ``300:``).

    Raises:
        ValueError: a condition that cannot be read, an unknown field or model, or no shape is left;
            the message lists the fields.
    """
    chosen = list(shapes)
    for condition in expression.split(","):
        test = _condition(condition.strip(), shapes)
        chosen = [shape for shape in chosen if test(shape)]
    if not chosen:
        raise ValueError(f"no shape meets {expression!r} ({_grammar()})")
    return chosen


def _condition(text: str, shapes: Sequence[LayerShape]) -> Callable[[LayerShape], bool]:
    if match := RANGE.fullmatch(text):
        start, stop, single = match.groups()
        first = int(single or start or 0)
        end = first + 1 if single else int(stop) if stop else None
        return lambda shape: shape.index >= first and (end is None or shape.index < end)
    match = CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read the condition {text!r} ({_grammar()})")
    name, sign, value = match.groups()
    if name == "model":
        known = {model for shape in shapes for model in shape.models}
        if value not in known:
            close = sorted(model for model in known if value in model)
            hint = f"; did you mean {', '.join(close[:5])}?" if close else ""
            raise ValueError(f"no shape is of the model {value!r}{hint}")
        if sign not in ("=", "==", "!="):
            raise ValueError(f"model can be compared with = and != only, got {text!r}")
        return lambda shape: (value in shape.models) == (sign != "!=")
    if name not in FIELDS:
        raise ValueError(f"unknown field {name!r} in {text!r} ({_grammar()})")
    if not value.isdecimal():
        raise ValueError(f"{name} must be compared with an integer, got {text!r}")
    read, compare, number = FIELDS[name], OPERATORS[sign], int(value)
    return lambda shape: compare(read(shape), number)


def _grammar() -> str:
    return (
        f"fields: {', '.join(FIELDS)}, model; operators: {' '.join(OPERATORS)}; or an index range "
        "like 0:20; several conditions are separated by commas and must all hold"
    )


def _pair(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
