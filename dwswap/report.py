"""What was done to each convolution of a model, and why: plain data, no tensors, no modules."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from dwswap.changes import Change

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["REASONS", "Layer", "LayerErrors", "Report", "Verification", "report"]

# Reason code -> the sentence that a layer shows. Codes are part of the interface: scripts test for
# them, so a code is never renamed. Sentences may change.
REASONS: dict[str, str] = {
    # swapped
    "depthwise": "groups == in_channels",
    "already_swapped": "runs the dwswap operator already",
    # kept: not a depthwise 2-D convolution
    "not_conv2d": "not a 2-D convolution",
    "transposed": "transposed convolution",
    "not_depthwise": "groups {groups} of {channels} channels",
    "single_channel": "one input channel, a dense convolution",
    # kept: more than what nn.Conv2d itself does would be lost
    "subclass": "{type} is a subclass of nn.Conv2d and may compute something else",
    "quantized": "{type} is a quantized module",
    "qat": "{type} is a quantization-aware training module",
    "quantization_prepared": "the model has observers of quantization, which converts it later",
    "scripted": "compiled by TorchScript",
    "lazy": "lazy: its parameters do not exist before the first forward",
    "parametrized": "parametrized by torch.nn.utils.parametrize: {names}",
    "weight_norm": "its weight is computed by weight_norm before every forward",
    "spectral_norm": "its weight is computed by spectral_norm before every forward",
    "pruned": "its weight is masked by torch.nn.utils.prune before every forward",
    "forward_pre_hook": "has a forward pre-hook",
    "forward_hook": "has a forward hook",
    "backward_hook": "has a backward hook",
    "state_dict_hook": "has a hook on saving or loading its state_dict",
    "patched_forward": "its {names} was replaced on the instance",
    "compiled_in_place": "it was compiled by its compile(), which a swap would undo",
    "weight_not_parameter": "its weight or bias is not an nn.Parameter",
    "tensor_subclass": "its weight or bias is a tensor subclass ({type})",
    "weight_layout": "its weight has the layout {layout}",
    "dtype": "its weight is {dtype}; float64, float32, float16 and bfloat16 are supported",
    "padding_mode": "padding_mode is {padding_mode!r}, not 'zeros'",
    "inconsistent_shape": "the weight's shape {shape} does not fit the layer's attributes",
    # kept: functional calls
    "groups_unknown": "groups is computed at run time",
    "weight_unknown": "the weight is computed in the graph and its shape is not known; "
    "example_inputs may tell",
    "arguments_unknown": "the arguments of the call are not those of a convolution",
    # kept: on request or after a check
    "skipped": "the skip predicate returned true",
    "slower_here": "{ours:.1f} us, {aten:.1f} us on PyTorch's kernels, on this GPU; put back",
    "verify_failed": "its error, or the whole model's, broke the rule of verify; put back",
}

# The kinds of changes that are an activation which another call took.
_ABSORBED = ("activation", "input_activation", "shuffle", "pool")
_REPORT_ATTRIBUTE = "_dwswap_report"
_REPORT_KEY = "dwswap_report"


@dataclass(frozen=True)
class LayerErrors:
    """Largest absolute errors against float64 (for integers: how many elements differ).

    Attributes:
        ours: the optimized result's error.
        pytorch: the error of PyTorch's own result in the same dtype.
        limit: the largest error that passes: twice PyTorch's plus one ulp of the result's scale.
        problem: what else is wrong (shape, dtype, strides, non-finite values), in words.
    """

    ours: float
    pytorch: float
    limit: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and self.ours <= self.limit

    def worse(self, other: LayerErrors | None) -> LayerErrors:
        """Of two results of the same layer the one that is closer to failing, or has failed."""
        if other is None or not self.passed:
            return self
        if not other.passed:
            return other
        return self if self.ours - self.limit >= other.ours - other.limit else other


@dataclass(frozen=True)
class Layer:
    """One convolution of the model.

    Attributes:
        path: qualified name of the module; for a functional call the path of the module whose
            forward makes it, then the node's name.
        kind: ``"module"`` or ``"functional"``.
        decision: ``"swapped"`` or ``"kept"``.
        reason: a key of :data:`REASONS`.
        detail: the reason as a sentence.
        aliases: other paths of the same module.
        input_shape: the input's shape, where ``example_inputs`` told.
        errors: from ``verify=True``.
        changes: what the passes for inference did to the layer and its neighbours, or left.
    """

    path: str
    kind: str
    decision: str
    reason: str
    detail: str
    weight_shape: tuple[int, ...] | None = None
    kernel_size: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    padding: tuple[int, ...] | str | None = None
    dilation: tuple[int, ...] | None = None
    groups: int | None = None
    dtype: str | None = None
    input_shape: tuple[int, ...] | None = None
    aliases: tuple[str, ...] = ()
    errors: LayerErrors | None = None
    changes: tuple[Change, ...] = ()

    @property
    def swapped(self) -> bool:
        return self.decision == "swapped"

    def decided(self, decision: str, reason: str, **facts: object) -> Layer:
        """The same layer with another decision; ``facts`` fill the sentence of ``reason``."""
        detail = REASONS[reason].format(**facts)
        return dataclasses.replace(self, decision=decision, reason=reason, detail=detail)


@dataclass(frozen=True)
class Verification:
    """What ``verify=True`` found.

    Attributes:
        passed: the model that was returned fulfils the rule.
        outputs: per tensor of the model's output (a pytree path) its errors.
        notes: what a reader must know, such as "ran in eval mode".
    """

    passed: bool
    outputs: dict[str, LayerErrors]
    notes: tuple[str, ...] = ()


@dataclass
class Report:
    """What :func:`dwswap.optimize` did (or, from :func:`dwswap.explain`, would do).

    Attributes:
        model: class name of the model.
        mode: ``"graph"`` (an FX graph: inference only), ``"substitution"`` (modules replaced,
            some by graphs, the model's own class) or ``"unchanged"``.
        layers: one per convolution, in the model's order.
        traced: paths of the submodules that became graphs (``""`` is the model itself).
        not_traced: why the model as a whole did not become a graph; None where it did.
        verification: result of ``verify=True``.
        kernels: which implementation of the operator runs.
        elsewhere: changes to and around what is no convolution, by its path.
        calls_before: operations that launch kernels in a forward of the graphs, before any pass
            (``dwswap.passes.count_calls`` says what counts); None without a graph.
        calls_after: the same of the result.
        memory_format: in which the result runs, ``"preserve"`` for that of its inputs and weights,
            and what was converted, or why it stays.
        cuda_graph: with ``cuda_graph=True`` whether calls replay CUDA graphs, or why not.
        select: why ``select="measured"`` measured nothing; None otherwise.
    """

    model: str
    mode: str = "unchanged"
    layers: list[Layer] = field(default_factory=list)
    traced: tuple[str, ...] = ()
    not_traced: str | None = None
    verification: Verification | None = None
    kernels: str = ""
    elsewhere: dict[str, tuple[Change, ...]] = field(default_factory=dict)
    calls_before: int | None = None
    calls_after: int | None = None
    memory_format: str = "preserve"
    cuda_graph: str | None = None
    select: str | None = None

    @property
    def swapped(self) -> list[Layer]:
        """The layers that run, or would run, the dwswap operator."""
        return [layer for layer in self.layers if layer.swapped]

    def without_changes(self) -> None:
        """Forget what the passes for inference did: the result is put back, or was not used."""
        self.layers = [dataclasses.replace(layer, changes=()) for layer in self.layers]
        self.elsewhere, self.calls_before, self.calls_after = {}, None, None
        self.memory_format = "preserve"

    def summary(self) -> str:
        """One line: how many of how many, how, why the others were not."""
        text = (
            f"{self.model}: {len(self.swapped)} of {len(self.layers)} convolutions swapped "
            f"({self.mode}; {self.kernels})"
        )
        kept = Counter(layer.reason for layer in self.layers if not layer.swapped)
        if kept:
            text += "; kept: " + ", ".join(f"{n} {code}" for code, n in kept.most_common())
        if self.verification is not None:
            text += f"; verify {'passed' if self.verification.passed else 'FAILED'}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return dataclasses.asdict(self) | {"summary": self.summary()}

    def __str__(self) -> str:
        return self.render()

    def render(self, width: int = 120) -> str:
        """The report as a table of at most ``width`` columns; of few without sizes."""
        # A quarter of the time of `import dwswap`, and few reports are read.
        from rich.console import Console

        console = Console(file=io.StringIO(), width=width)
        if self.layers:
            console.print(self._table(sizes=width >= 80))
        console.print(self.summary(), highlight=False, markup=False, soft_wrap=True)
        for line in self._notes():
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue().rstrip("\n")

    def _table(self, *, sizes: bool) -> Table:
        from rich.table import Table

        verified = any(layer.errors for layer in self.layers)
        shapes = sizes and any(layer.input_shape for layer in self.layers)
        changed = any(layer.changes for layer in self.layers)
        table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
        table.add_column("layer", overflow="fold")
        for name in ("input", "weight", "stride", "pad"):
            if shapes if name == "input" else sizes:
                table.add_column(name, no_wrap=True)
        table.add_column("decision", no_wrap=True)
        table.add_column("reason", overflow="fold")
        if changed:
            table.add_column("changes", overflow="fold")
        if verified:
            table.add_column("error / PyTorch's", no_wrap=True)
        for layer in self.layers:
            cells = [layer.path or "(the model)"]
            cells += [_size(layer.input_shape)] if shapes else []
            own = (layer.weight_shape, layer.stride, layer.padding)
            cells += map(_size, own) if sizes else ()
            cells += [layer.decision, f"{layer.reason}: {layer.detail}"]
            cells += [", ".join(map(str, layer.changes))] if changed else []
            cells += [_errors(layer.errors)] if verified else []
            table.add_row(*map(_plain, cells))
        return table

    def _fused(self) -> str:
        changes = [c for layer in self.layers for c in layer.changes]
        changes += [c for found in self.elsewhere.values() for c in found]
        done = Counter(change.kind for change in changes if change.done)
        pushed = len([change for change in changes if change.reason == "pushed"])
        # Biases before a shuffle or a mean are noted by the layers that gave them alone.
        biases = len([c for c in changes if c.kind == "bias" and c.reason == "absorbed"])
        blocks, products = done["squeeze_excitation"], done["pointwise"]
        activations = sum(done[kind] for kind in _ABSORBED)
        return (
            f"{self.calls_before} calls of operations per forward before, {self.calls_after} now; "
            f"folded {done['batchnorm']} BatchNorm"
            + (f" and {done['scale']} factors" if done["scale"] else "")
            + (f" and {done['layer']} convolutions" if done["layer"] else "")
            + f", absorbed {activations} activations and {biases} biases"
            + (f", pushed {pushed} biases on" if pushed else "")
            + (f", made {blocks} squeeze-and-excitations one call each" if blocks else "")
            + (f", made {products} pointwise convolutions matrix products" if products else "")
            + (f", swapped {done['layer_norm']} LayerNorm" if done["layer_norm"] else "")
            + (f", swapped {done['stem']} first convolution" if done["stem"] else "")
        )

    def _notes(self) -> list[str]:
        lines: list[str] = []
        counted: Counter[str] = Counter()
        for path, found in self.elsewhere.items():
            if found[0].kind in ("inplace", "batch_norm", "excitation"):
                counted[found[0].kind] += 1
                counted["absorbed"] += found[0].kind == "batch_norm" and found[0].name is not None
            else:
                lines.append(f"{path}: {', '.join(map(str, found))}")
        if counted["batch_norm"]:
            lines.append(
                f"runs {counted['batch_norm']} BatchNorm, and {counted['absorbed']} activations "
                "with them, on kernels of dwswap in training on CUDA"
            )
        if counted["excitation"]:
            lines.append(
                f"runs the pooling and the scaling of {counted['excitation']} "
                "squeeze-and-excitations on kernels of dwswap in training on CUDA"
            )
        if counted["inplace"]:
            lines.append(
                f"keeps autograd from copying the input of {counted['inplace']} activations, which "
                "do not change it in place any more"
            )
        if self.calls_before is not None and self.calls_after is not None:
            lines.append(self._fused())
        if self.memory_format != "preserve":
            lines.append(f"memory format: {self.memory_format}")
        if self.traced and self.traced != ("",):
            lines.append("traced submodules: " + ", ".join(self.traced))
        if self.not_traced is not None:
            lines.append(f"not traced as a whole: {self.not_traced}")
        if self.cuda_graph is not None:
            lines.append(f"cuda_graph {self.cuda_graph}")
        if self.select is not None:
            lines.append(f"select: {self.select}")
        if self.verification is not None:
            for name, errors in self.verification.outputs.items():
                lines.append(f"verify {name}: error / PyTorch's {_errors(errors)}")
            lines += [f"verify: {note}" for note in self.verification.notes]
        return lines


def report(model: nn.Module | ExportedProgram) -> Report:
    """The report of what :func:`dwswap.optimize` returned, or of what ``torch.compile`` made of it.

    Raises:
        TypeError: ``model`` is neither an ``nn.Module`` nor an ``ExportedProgram``.
        ValueError: the model has none; files of exported programs keep none.
    """
    if isinstance(model, ExportedProgram):
        model = model.graph_module
    if not isinstance(model, nn.Module):
        raise TypeError(f"dwswap.report: model must be an nn.Module, got {type(model).__name__}")
    original = getattr(model, "_orig_mod", None)  # of torch.compile
    found = _find(original if isinstance(original, nn.Module) else model)
    if found is None:
        raise ValueError(
            f"dwswap.report: model must come from dwswap.optimize, got a {type(model).__name__} "
            "without a report (dwswap.explain(model) makes one)"
        )
    return found


def has_report(model: nn.Module) -> bool:
    return _find(model) is not None


def attach(model: nn.Module, report: Report) -> None:
    """Keep ``report`` with ``model``, where deepcopy and pickle take it along."""
    if isinstance(model, fx.GraphModule):
        # Made by torchvision's feature extractors in copies only.
        model.__dict__.setdefault("meta", {})[_REPORT_KEY] = report
    else:
        model.__dict__[_REPORT_ATTRIBUTE] = report


def detach(model: nn.Module) -> None:
    """Remove the report from ``model``, if it has one."""
    if isinstance(model, fx.GraphModule):
        model.__dict__.get("meta", {}).pop(_REPORT_KEY, None)
    model.__dict__.pop(_REPORT_ATTRIBUTE, None)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _find(model: nn.Module) -> Report | None:
    if isinstance(model, fx.GraphModule):
        return model.__dict__.get("meta", {}).get(_REPORT_KEY)
    return model.__dict__.get(_REPORT_ATTRIBUTE)


def _size(value: Sequence[int] | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if len(value) == 2 and value[0] == value[1]:
        return str(value[0])
    return "x".join(map(str, value))


def _errors(errors: LayerErrors | None) -> str:
    if errors is None:
        return "-"
    text = f"{errors.ours:.2g} / {errors.pytorch:.2g}"
    if errors.problem:
        text += f" ({errors.problem})"
    return text if errors.passed else f"{text} FAILED"


def _plain(text: str) -> str:
    """Rich markup off: a path such as ``[0]`` is text."""
    return text.replace("[", r"\[")
