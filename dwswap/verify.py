"""Check a rewritten model against a float64 run of the original, and put back what fails.

Rule: the error against float64 is at most twice the error of PyTorch's own result in the same
dtype, plus one ulp of the result's scale (1024 in float64); shapes, dtypes and strides are equal.
Float32 is computed in float32, without TF32.

An error is the largest of all elements, and chance decides which of two is larger where these are
few: a model with one logit may be exact by luck, and of an output that ends in a clamp only what
lies between its ends is rounded. So PyTorch's error in an output of the model with few inexact
elements is the largest of several runs, on inputs that differ by one ulp. Where BatchNorm was
folded, the weights have been rounded once more, which no sum over pixels averages out; so
PyTorch's error is then also that of runs, fewer for other outputs, whose weights have an error of
the same variance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dwswap.activations import ACTIVATIONS
from dwswap.comparison import compare, largest
from dwswap.copying import copy_model
from dwswap.example_inputs import Arguments, run, runnable_copy
from dwswap.inference_graph import FOLDED
from dwswap.precision import exact_float64, float32_convolutions
from dwswap.report import Layer, LayerErrors, Report, Verification
from dwswap.swapped_layers import LayerCall, put_back, run_watched

__all__ = ["compare", "verify_result"]

# Outputs of fewer inexact elements are judged by the error of as many more runs.
_FEW = 256
_RUNS = 16
_RUNS_OF_MANY = 3


def verify_result(
    model: nn.Module, result: nn.Module, report: Report, arguments: Arguments
) -> tuple[nn.Module, Report]:
    """Check ``result`` of optimizing ``model``; returns it without the layers that failed.

    Every swapped layer is fed the input that it gets inside the model, one at a time, and compared
    with ``torch.conv2d`` in the same dtype and in float64. Then the outputs of the whole models
    are compared. Where these fail, every layer is put back.

    Raises:
        ValueError: a model that cannot run, in its own dtype or in float64.
    """
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError("verify needs a model with data, got one on the meta device")
    notes = []
    if any(getattr(module, "training", False) for module in model.modules()):
        notes.append("the model is in train mode; copies of it were compared in eval mode")
    with float32_convolutions():
        return _verify(model, result, report, arguments, notes)


def _verify(
    model: nn.Module, result: nn.Module, report: Report, arguments: Arguments, notes: list[str]
) -> tuple[nn.Module, Report]:
    original = _run_original(model, arguments, "its own dtype")
    exact_model = copy_model(model).double()
    exact = _run_exact(exact_model, arguments, "float64")
    graphs = (m for m in result.modules() if isinstance(m, fx.GraphModule))
    folded = any(FOLDED in graph.meta for graph in graphs)
    pooled = _pooled_errors(model, exact_model, arguments, (original, exact), folded)
    del exact_model

    errors: dict[str, LayerErrors] = {}

    def check(call: LayerCall) -> None:
        errors[call.path] = _compare_layer(call).worse(errors.get(call.path))

    ours = run_watched(result, report, arguments, check)
    outputs, more = _compare_outputs(ours, original, exact, pooled)
    del ours
    failed = {path for path, found in errors.items() if not found.passed}
    if failed:
        result = put_back(result, report.traced, failed)
        notes.append(f"put back {len(failed)} of {len(errors)} layers")
        ours = run(runnable_copy(result), arguments)
        outputs, more = _compare_outputs(ours, original, exact, pooled)
    passed = all(found.passed for found in outputs.values())
    if not passed:
        failed = {layer.path for layer in report.layers if layer.reason == "depthwise"}
        result = put_back(result, report.traced, failed)
        notes.append("the outputs of the whole model failed; every layer was put back")

    def checked(layer: Layer) -> Layer:
        if layer.path in failed:
            # What it had absorbed are calls of their own again.
            folds = ("batchnorm", "scale")
            changes = tuple(c for c in layer.changes if c.kind in folds or not c.done)
            layer = dataclasses.replace(layer, changes=changes).decided("kept", "verify_failed")
        return dataclasses.replace(layer, errors=errors.get(layer.path))

    verification = Verification(passed, outputs, (*notes, *more))
    layers = [checked(layer) for layer in report.layers]
    return result, dataclasses.replace(report, layers=layers, verification=verification)


def _run_original(model: nn.Module, arguments: Arguments, how: str) -> Any:
    """Outputs of ``model`` in eval mode, which keeps its state: every run starts from the same."""
    try:
        return run(runnable_copy(model), arguments)
    except Exception as error:  # whatever a user's model raises
        raise ValueError(
            f"verify needs a model that runs on example_inputs in {how}, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _run_exact(model: nn.Module, arguments: Arguments, how: str) -> Any:
    with exact_float64():
        return _run_original(model, arguments.map(_double), how)


def _compare_layer(call: LayerCall) -> LayerErrors:
    tensors = (
        *(call.input, call.weight, call.bias, call.input_bias),
        *(call.point_weight, call.point_bias, call.residual),
    )
    theirs = _composite(call, *tensors)
    with exact_float64():
        exact = _composite(call, *(None if t is None else t.double() for t in tensors))
    return compare(call.output, theirs, exact)


def _composite(
    call: LayerCall,
    input: Any,
    weight: Any,
    bias: Tensor | None,
    input_bias: Tensor | None,
    point_weight: Tensor | None,
    point_bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """What the operator means, on PyTorch's own."""
    hidden = input if input_bias is None else input + input_bias[:, None, None]
    hidden = ACTIVATIONS[call.input_activation].forward(hidden)
    output = F.conv2d(hidden, weight, bias, *call.geometry)
    output = ACTIVATIONS[call.activation].forward(output)
    if point_weight is not None:
        output = F.conv2d(output, point_weight, point_bias)
    return output if residual is None else residual + output


def _pooled_errors(
    model: nn.Module,
    exact_model: nn.Module,
    arguments: Arguments,
    outputs: tuple[Any, Any],
    folded: bool,
) -> dict[str, float]:
    """PyTorch's largest error in every output with few inexact elements, over runs on slightly
    different inputs.

    Args:
        outputs: of the two models on ``arguments``.
        folded: also in other outputs, and with weights as if they had been rounded once more.
    """
    original, references = map(_leaves, outputs)
    floats = {p: t for p, t in original.items() if _is_float(t)}
    few = {path for path, tensor in floats.items() if _is_few(tensor, references.get(path))}
    pooled = dict.fromkeys(floats if folded else few, 0.0)
    subject = copy_model(model) if folded else model
    generator = torch.Generator().manual_seed(0)
    for i in range(_RUNS if few else _RUNS_OF_MANY if folded else 0):
        if folded:
            _round_again(subject, model, generator)
        inputs = arguments.map(lambda tensor: _nudged(tensor, generator))
        theirs = _leaves(_run_original(subject, inputs, "its own dtype, one ulp off"))
        exact = _leaves(_run_exact(exact_model, inputs, "float64, one ulp off"))
        paths = few if i >= _RUNS_OF_MANY else pooled.keys()
        for path in paths & theirs.keys() & exact.keys():
            result, reference = theirs[path], exact[path]
            if not _is_float(result) or result.shape != reference.shape:
                continue
            found = compare(result, result, reference)
            # What is larger is no rounding but another decision, as the order of two boxes.
            rounding = math.sqrt(torch.finfo(result.dtype).eps) * largest(reference)
            if found.passed and found.pytorch <= rounding:
                pooled[path] = max(pooled[path], found.pytorch)
    return pooled


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def _is_few(result: Tensor, exact: Any) -> bool:
    """Whether few elements of ``result`` are inexact. Of float64 no element is known to be."""
    if result.numel() < _FEW or result.dtype == torch.float64:
        return result.numel() < _FEW
    if not isinstance(exact, Tensor) or exact.shape != result.shape:
        return False
    return int((result.double() != exact).sum()) < _FEW


@torch.no_grad()
def _round_again(subject: nn.Module, model: nn.Module, generator: torch.Generator) -> None:
    """Give ``subject``, a copy of ``model``, its parameters with errors of a rounding.

    That is evenly distributed over one ulp, with a variance of 1/12 ulp^2; so is one ulp with the
    probability 1/12.
    """
    for copied, own in zip(subject.parameters(), model.parameters(), strict=True):
        if own.is_floating_point() and own.layout == torch.strided:
            drawn = torch.randint(0, 24, own.shape, generator=generator)
            steps = ((drawn == 0).int() - (drawn == 1).int()).to(own)
            copied.copy_(own * (1 + steps * torch.finfo(own.dtype).eps))


def _nudged(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """``tensor`` with every float one ulp lower, the same, or one ulp higher, in the same range."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.layout != torch.strided:
        return tensor
    steps = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor)
    nudged = tensor * (1 + steps * torch.finfo(tensor.dtype).eps)
    return nudged.clamp(tensor.min(), tensor.max())


def _compare_outputs(
    ours: Any, theirs: Any, exact: Any, pooled: Mapping[str, float]
) -> tuple[dict[str, LayerErrors], tuple[str, ...]]:
    """Errors per tensor of the outputs, and notes on what could not be judged."""
    found: dict[str, LayerErrors] = {}
    notes = []
    our_leaves, expected, exact_leaves = map(_leaves, (ours, theirs, exact))
    if our_leaves.keys() != expected.keys() and expected.keys() == exact_leaves.keys():
        return {"output": LayerErrors(math.inf, 0.0, 0.0, "another structure")}, ()
    for path, value in expected.items():
        own, reference = our_leaves.get(path), exact_leaves.get(path)
        if not isinstance(value, Tensor):
            if isinstance(value, (bool, int, str)) and own != value:
                found[path] = LayerErrors(math.inf, 0.0, 0.0, f"{own!r}, not {value!r}")
        elif not isinstance(reference, Tensor) or reference.shape != value.shape:
            notes.append(f"{path} has another shape in float64, so it cannot be compared")
        elif not isinstance(own, Tensor):
            found[path] = LayerErrors(math.inf, 0.0, 0.0, "missing")
        else:
            found[path] = compare(own, value, reference, pooled.get(path, 0.0))
            if not value.isfinite().any():
                notes.append(f"{path} has no finite element, so hardly anything was compared")
    if not found:
        notes.append("no output could be compared, only the layers were")
    return found, tuple(notes)


def _leaves(outputs: Any) -> dict[str, Any]:
    leaves, _ = pytree.tree_flatten_with_path(outputs)
    return {"output" + pytree.keystr(path): value for path, value in leaves}


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
