"""Layer by layer: our gradients, PyTorch's in the same layout, and a copy of the same bytes.

As ``dwswap.bench.layers``, three times per shape: the gradient of the input, that of the weight,
and forward with both gradients (and that of the bias where the layer has one), as a step of
training runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dwswap.backward import backward_families
from dwswap.bench.gradient_results import PARTS, GradientResult
from dwswap.bench.layers import (
    DTYPES,
    LAYOUTS,
    LayerBench,
    checked_elsewhere,
    laid_out,
    rounded,
)
from dwswap.bench.shapes import LayerShape
from dwswap.ops import depthwise_conv2d
from dwswap.precision import float32_convolutions
from dwswap.report import LayerErrors
from dwswap.schema import depthwise_conv2d_backward
from dwswap.verify import compare

__all__ = ["GradientBench"]

Images = tuple[Tensor, Tensor]
"""Input and gradient of the output."""

MASKS = {"input": (True, False, False), "weight": (False, True, False)}


class GradientBench(LayerBench):
    """Measures the gradients of shapes on one device; see ``LayerBench``."""

    def _measure(self, shape: LayerShape, dtype: str, layout: str) -> GradientResult:
        """Check the gradients of one shape, then time them."""
        size = [self.batch, shape.channels, shape.height, shape.width]
        moved = self.moved_bytes(shape, dtype)
        buffers = self._buffers(moved)
        inputs, weight = self._tensors(shape, DTYPES[dtype], LAYOUTS[layout], buffers)
        errors = self._check_gradients(shape, weight, inputs[0])
        copy = self._copy(moved)
        parts = {}
        for name in PARTS:
            ours, pytorch, family = self._part(name, shape, weight, inputs[0])
            times = self._compare(ours, pytorch, inputs)
            part = self._result(
                shape,
                dtype,
                layout,
                family=family,
                moved_bytes=moved * (3 if name == "training" else 1),
                times=times,
                copy_us=copy * (3 if name == "training" else 1),
                plain_us=None,
                errors=errors["weight" if name == "training" else name],
            )
            parts[name] = part.to_dict()
        passed = all(found.passed for found in errors.values())
        return GradientResult(shape.index, dtype, layout, size, parts, passed)

    def needed_bytes(self, shape: LayerShape, dtype: str) -> int:
        moved = self.moved_bytes(shape, dtype)
        # Both images of a launch, and what a step of training makes of them.
        return 2 * self._buffers(moved) * moved + 4 * moved + self._reserve

    def launches(
        self, shape: LayerShape, dtype: str, layout: str
    ) -> tuple[str, list[Callable[[], Any]]]:
        """As those of ``LayerBench``, of the gradient of the weight."""
        buffers = self._buffers(self.moved_bytes(shape, dtype))
        inputs, weight = self._tensors(shape, DTYPES[dtype], LAYOUTS[layout], buffers)
        ours, _, family = self._part("weight", shape, weight, inputs[0])
        return family, [partial(ours, images) for images in inputs]

    def _tensors(
        self,
        shape: LayerShape,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        buffers: int,
    ) -> tuple[list[Images], Tensor]:
        """So many pairs of images, which do not overlap, and a weight."""
        size = [self.batch, shape.channels, shape.height, shape.width]
        out_size = [self.batch, shape.out_channels, *shape.output]
        elements = [self.batch * shape.input_elements, self.batch * shape.output_elements]
        first = rounded(elements[0], dtype.itemsize)
        pair = [1, 1, 1, first + elements[1]]
        windows = self._inputs(buffers, pair, dtype, torch.contiguous_format)
        inputs = [
            (
                laid_out(window.view(-1)[: elements[0]], size, memory_format),
                laid_out(window.view(-1)[first:], out_size, memory_format),
            )
            for window in windows
        ]
        weight, _ = self._weights(shape, dtype, memory_format, self._random)
        return inputs, weight

    def _plan(
        self, shape: LayerShape, dtype: torch.dtype, memory_format: torch.memory_format
    ) -> None:
        size = [self.batch, shape.channels, shape.height, shape.width]
        out_size = [self.batch, shape.out_channels, *shape.output]
        x, grad = (
            laid_out(self._unwritten(dtype, math.prod(image)), image, memory_format)
            for image in (size, out_size)
        )
        weight, bias = self._weights(shape, dtype, memory_format, self._unwritten)
        F.conv2d(x, weight, bias, shape.stride, shape.padding, shape.dilation, shape.channels)
        gradients = partial(_pytorch_gradients, shape, weight, (x, grad))
        gradients(mask=(True, True, shape.bias))
        with float32_convolutions():
            gradients(mask=(True, True, False))

    def _part(
        self, name: str, shape: LayerShape, weight: Tensor, images: Images
    ) -> tuple[Callable[[Images], Any], Callable[[Images], Any], str]:
        """Ours and PyTorch's as functions of the images, and the families of kernels."""
        geometry = (shape.stride, shape.padding, shape.dilation)
        mask = MASKS.get(name, (True, True, shape.bias))
        gradients = partial(_pytorch_gradients, shape, weight, mask=mask)
        bias = self._random(weight.dtype, shape.out_channels) if shape.bias else None

        def ours(images: Images) -> Any:
            x, grad = images
            return depthwise_conv2d_backward(grad, x, weight, *geometry, mask)

        def trained(images: Images) -> Any:
            return depthwise_conv2d(images[0], weight, bias, *geometry), ours(images)

        def trained_by_pytorch(images: Images) -> Any:
            y = F.conv2d(images[0], weight, bias, *geometry, shape.channels)
            return y, gradients(images)

        x, grad = images
        family = ",".join(filter(None, backward_families(grad, x, weight, *geometry, mask)))
        if name == "training":
            return trained, trained_by_pytorch, family
        return ours, gradients, family

    def _check_gradients(
        self, shape: LayerShape, weight: Tensor, images: Images
    ) -> dict[str, LayerErrors]:
        """Some samples, the last among them, against float64; all of them against PyTorch's.

        For the samples the kernels run with all images, and zeros as the gradients of the others:
        for another number of images cuDNN would plan its kernels anew, which takes longer.
        """
        x, grad = images
        part = self._samples(max(image[0].numel() for image in images))
        grad_of_part = torch.zeros_like(grad)
        grad_of_part[part] = grad[part]
        wide = (x[part].double().contiguous(), grad[part].double().contiguous())
        exact = _pytorch_gradients(shape, weight.double(), wide, mask=(True, True, False))
        ours, theirs = self._both(shape, weight, (x, grad_of_part))
        errors = {
            "input": compare(ours[0][part], theirs[0][part], exact[0]),
            "weight": compare(ours[1], theirs[1], exact[1]),
        }
        del grad_of_part, wide, exact
        ours, theirs = self._both(shape, weight, images)
        # Sums over more images are farther from float64: in float32 errors add up, in half
        # precision the rounding of a result is the largest, and random numbers add up to the root
        # of how many there are.
        more = self.batch / len(range(self.batch)[part])
        farther = {"input": 1.0, "weight": more if x.dtype == torch.float32 else more**0.5}
        found = zip(errors, ours, theirs, strict=False)
        return {
            name: checked_elsewhere(errors[name], mine, peer, "of all images", farther[name])
            for name, mine, peer in found
        }

    def _both(
        self, shape: LayerShape, weight: Tensor, images: Images
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Our gradients of input and weight, and PyTorch's."""
        x, grad = images
        mask = (True, True, False)
        with float32_convolutions():
            theirs = _pytorch_gradients(shape, weight, images, mask=mask)
        # The allocator hands this block to the gradient of the input, in which NaN shows what a
        # kernel forgets to write.
        poison = torch.full_like(x, float("nan"))
        del poison
        geometry = (shape.stride, shape.padding, shape.dilation)
        ours = depthwise_conv2d_backward(grad, x, weight, *geometry, mask)
        return [gradient for gradient in ours if gradient is not None], theirs


def _pytorch_gradients(
    shape: LayerShape, weight: Tensor, images: Images, *, mask: Sequence[bool]
) -> tuple[Tensor, ...]:
    x, grad = images
    geometry = (shape.stride, shape.padding, shape.dilation)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [shape.out_channels], *geometry, False, [0, 0], shape.channels, mask
    )
