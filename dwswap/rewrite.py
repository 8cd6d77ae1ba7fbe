"""``optimize`` and ``explain``: copy, trace, run the passes, report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from dwswap.checks import check_flags
from dwswap.copying import (
    commit,
    copy_model,
    is_one_graph,
    modules_by_path,
    out_of_inference_mode,
    shell_model,
)
from dwswap.cuda_graph_module import with_cuda_graphs
from dwswap.cuda_graphs import CudaGraphOptions
from dwswap.eligibility import Skip, inspect_modules, is_convolution, is_prepared
from dwswap.example_inputs import Arguments, ObservedShapes, observe_shapes
from dwswap.exported_program import flat_inputs, lift, unlift
from dwswap.flops import register as register_flops
from dwswap.fusion import fuse as fuse_graph
from dwswap.inference_graph import InferenceGraph, graph_at
from dwswap.inner_graphs import rewrite_submodules
from dwswap.kernels_in_use import kernels_in_use
from dwswap.passes import EXACT_PASSES, INFERENCE_PASSES, Context, run_passes
from dwswap.passes.count_calls import count_calls
from dwswap.passes.inplace_activations import out_of_place
from dwswap.passes.memory_format import MemoryFormat, set_memory_format
from dwswap.passes.substitution import swap_modules, unswap_training_modules
from dwswap.passes.swap_batch_norm import swap_batch_norms
from dwswap.passes.swap_excitation import swap_excitations
from dwswap.report import Report, attach
from dwswap.selection import select_faster
from dwswap.tracing import (
    NotTraceable,
    build_graph_module,
    check_not_compiled,
    is_training,
    one_at_a_time,
    one_line,
)
from dwswap.train_guard import guard_train
from dwswap.verify import verify_result

__all__ = ["explain", "optimize"]

logger = logging.getLogger("dwswap")

Select = Literal["always", "measured"]
Model = TypeVar("Model", nn.Module, ExportedProgram)


@one_at_a_time
@out_of_inference_mode
def optimize(
    model: Model,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    fuse: bool = True,
    skip: Skip | None = None,
    verify: bool = False,
    select: Select = "always",
    memory_format: MemoryFormat = "auto",
    cuda_graph: bool | CudaGraphOptions = False,
) -> Model:
    """``model`` with its depthwise convolutions on the dwswap operator; same outputs.

    In eval mode the result is a ``torch.fx.GraphModule`` for inference, where the model can be
    traced: BatchNorm is folded into the layers before it, and the activations and biases beside
    the depthwise convolutions become part of these. Folded weights are new parameters under new
    keys (``conv_folded.weight``), and a checkpoint of the original is refused. Where only the model
    as a whole cannot be traced, as a detection model, it keeps its class, and the submodules that
    can be and that its code does nothing with but call them become such graphs. In train mode, with
    ``fuse=False``, and in all that is no graph, modules are replaced: the result has the model's
    class, ``state_dict`` keys, attributes and hooks, shares nothing else, and trains. In train mode
    ``nn.BatchNorm2d`` runs the kernels of dwswap on CUDA, with the activation behind it in an
    ``nn.Sequential``, and so do the pooling and the scaling of the squeeze-and-excitation of
    torchvision and timm; activations such as ``nn.ReLU6(inplace=True)``, whose input autograd
    copies first, get ``inplace=False`` behind a convolution or normalization there. What cannot be
    rewritten safely stays; ``dwswap.report`` tells why.

    A ``torch.export.ExportedProgram`` gives a new one, rewritten as the graph that it is: what it
    was exported in, eval or train mode, stays in it, and so do its dynamic shapes. Folded weights
    are in its ``state_dict`` and its signature. It is itself never changed.

    Args:
        model: ``nn.Module``, ``torch.fx.GraphModule`` or ``torch.export.ExportedProgram``, on any
            device.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            Tells the report the shapes, and finds some more convolutions in functional form. No
            hook is called for that: what comes after the first one on a forward stays unknown.
        inplace: do not copy the weights. Where modules are replaced, they are replaced in
            ``model`` itself, which is returned; a new graph shares the weights of ``model`` that
            nothing was folded into. (A ``GraphModule`` is changed itself, a program never.)
        fuse: False swaps only: modules are replaced, or calls in a ``GraphModule``; nothing is
            folded or absorbed, BatchNorm and activations stay as they are, and so do all keys.
        skip: ``skip(module, path)`` is asked about every convolution that would be swapped; true
            keeps it as it is. For a functional call it gets the module that makes it.
        verify: compare every swapped layer and the whole model with a float64 run of the original
            on ``example_inputs``; put back what has more than twice PyTorch's own error. A model
            with graphs inside that fails is swapped without them. The runs are of copies, on real
            tensors, and call their hooks; so does the one of ``select="measured"``.
        select: ``"always"`` swaps what can be swapped. ``"measured"`` times every layer's forward
            on the GPU, as ``example_inputs`` reach it and without what it may absorb, and puts
            back where PyTorch's kernel is more than 3 % faster. The times are cached on disk, so
            only new shapes take time. Without kernels of dwswap to choose (on the CPU, say) all
            swaps stay, and the report says so.
        memory_format: in which a graph for inference runs: ``"channels_last"``, ``"contiguous"``,
            ``"preserve"`` for that of its inputs and weights, or ``"auto"``: channels_last on CUDA
            in half precision, and in float32 where convolutions may round to TF32 now (PyTorch's
            default), else preserve. Weights are converted once, inputs where they come in, and
            outputs get the strides that those of ``model`` have (those of a program, for inputs
            with the strides that it was exported with). Where that is not safe the layout stays.
        cuda_graph: capture a CUDA graph per input signature, for the small batches at which
            launching kernels takes longer than running them. What became a graph gets it, the
            model or submodules; ``dwswap.report`` tells. A :class:`CudaGraphOptions` chooses more.

    Returns:
        The rewritten model, in the mode of ``model``. Without a depthwise convolution, the model
        as it is (a copy, unless ``inplace``).

    Raises:
        TypeError: ``model``, ``example_inputs``, ``skip``, ``cuda_graph`` or a flag is of the wrong
            kind.
        ValueError: the model fails on ``example_inputs``, a program does not take them, or the
            model cannot be copied; ``verify`` or ``select="measured"`` without ``example_inputs``;
            an unknown ``select`` or ``memory_format``; ``cuda_graph`` for a program. ``model`` is
            unchanged whatever is raised.
    """
    if select not in get_args(Select):
        raise ValueError(f'select must be "always" or "measured", got {select!r}')
    if memory_format not in get_args(MemoryFormat):
        raise ValueError(
            'memory_format must be "auto", "preserve", "channels_last" or "contiguous", '
            f"got {memory_format!r}"
        )
    check_flags(inplace=inplace, fuse=fuse, verify=verify)
    options = CudaGraphOptions.parse(cuda_graph)
    register_flops()
    subject, arguments = _check(model, example_inputs)
    if isinstance(model, ExportedProgram) and options is not None:
        raise ValueError(
            "cuda_graph must be False for an ExportedProgram, which is not called; use "
            "dwswap.optimize(program.module(), cuda_graph=...)"
        )
    if verify and arguments is None:
        raise ValueError("verify=True needs example_inputs, got None")
    if select == "measured" and arguments is None:
        raise ValueError('select="measured" needs example_inputs, got None')
    how = _How(arguments, fuse, skip, verify, select, memory_format)
    attempt = _attempt(subject, inplace, how)
    if _failed(attempt.report) and attempt.report.mode == "substitution" and attempt.report.traced:
        attempt = _attempt_swap(subject, inplace, how, attempt.report)
    workspace, before, result, report = attempt
    failed = _failed(report)
    if fuse and report.swapped and not failed:
        _train_faster(result, report)
    if failed or not report.swapped:
        rewritten = result is not workspace or report.traced  # and then put back
        result = subject if inplace else copy_model(subject) if rewritten else workspace
        report.mode, report.traced = "unchanged", ()
        report.without_changes()
    elif inplace and result is workspace:
        commit(subject, before, modules_by_path(result))
        if is_one_graph(subject) and is_one_graph(result):
            subject.graph = result.graph
            subject.meta.update(result.meta)
        result = subject
    if options is not None:
        result = with_cuda_graphs(result, report, options)
    guard_train(result)
    attach(result, report)
    logger.info("%s", report.summary())
    if isinstance(model, ExportedProgram):
        assert isinstance(result, fx.GraphModule)
        return cast(Any, lift(result, model))
    return result


@one_at_a_time
def explain(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    fuse: bool = True,
    skip: Skip | None = None,
) -> Report:
    """The report that :func:`optimize` would make, without changing or copying anything.

    Arguments and errors are those of :func:`optimize`. Models on the meta device are fine.
    """
    check_flags(fuse=fuse)
    subject, arguments = _check(model, example_inputs)
    result, report, contexts = _rewrite(subject, shell_model(subject), arguments, fuse, skip)
    report.kernels = kernels_in_use(_tensors(subject), load=False)
    if fuse:
        for context in contexts:
            context.values = False
        report = _fuse(subject, result, report, contexts)
        _train_faster(result, report)
    return report


@dataclass(frozen=True)
class _How:
    """What :func:`optimize` was asked, of what decides over the rewriting."""

    arguments: Arguments | None
    fuse: bool
    skip: Skip | None
    verify: bool
    select: Select
    memory_format: MemoryFormat


class _Attempt(NamedTuple):
    """A copy that was worked on, its modules as they were, what became of it, and the report."""

    workspace: nn.Module
    before: dict[str, nn.Module]
    result: nn.Module
    report: Report


def _attempt(subject: nn.Module, inplace: bool, how: _How) -> _Attempt:
    workspace = shell_model(subject) if inplace else copy_model(subject)
    before = modules_by_path(workspace)
    result, report, contexts = _rewrite(subject, workspace, how.arguments, how.fuse, how.skip)
    for context in contexts:
        context.memory_format = how.memory_format
    report.kernels = kernels_in_use(_tensors(subject), load=bool(report.swapped))
    changed = report.mode != "unchanged"
    if how.arguments is not None and changed and how.select == "measured":
        if how.fuse:
            _lay_out(subject, result, report, contexts)
        # A layer that goes back to PyTorch's kernel is none that could absorb anything.
        result, report = select_faster(result, report, how.arguments)
    if how.fuse:
        report = _fuse(subject, result, report, contexts, how.memory_format)
    if how.arguments is not None and changed and how.verify:
        result, report = verify_result(subject, result, report, how.arguments)
    return _Attempt(workspace, before, result, report)


def _attempt_swap(subject: nn.Module, inplace: bool, how: _How, fused: Report) -> _Attempt:
    """Again without graphs, where a model with some (``fused``) has failed to be verified.

    What a detection model decides may hang on a rounding. A swap alone rounds as PyTorch does.
    """
    attempt = _attempt(subject, inplace, dataclasses.replace(how, fuse=False))
    report = attempt.report
    assert report.verification is not None
    assert fused.verification is not None
    failed = sum(not found.passed for found in fused.verification.outputs.values())
    parts = ", ".join(fused.traced)
    note = f"with graphs in {parts} {failed} outputs failed: layers were swapped only"
    notes = (*report.verification.notes, note)
    report.verification = dataclasses.replace(report.verification, notes=notes)
    report.not_traced = fused.not_traced
    return attempt


def _failed(report: Report) -> bool:
    return report.verification is not None and not report.verification.passed


def _check(model: Any, example_inputs: Any) -> tuple[nn.Module, Arguments | None]:
    """The module to rewrite, and its arguments."""
    if isinstance(model, ExportedProgram):
        arguments = None
        if example_inputs is not None:
            arguments = flat_inputs(model, Arguments.of(example_inputs))
        return unlift(model), arguments
    if not isinstance(model, nn.Module):
        raise TypeError(
            "model must be an nn.Module, a torch.fx.GraphModule or a "
            f"torch.export.ExportedProgram, got {type(model).__name__}"
        )
    if type(model).__module__.startswith("torch._dynamo"):
        raise TypeError(
            "model must not be compiled yet, got the result of torch.compile; "
            "use torch.compile(dwswap.optimize(model))"
        )
    arguments = None if example_inputs is None else Arguments.parse(model, example_inputs)
    return model, arguments


def _rewrite(
    model: nn.Module,
    workspace: nn.Module,
    arguments: Arguments | None,
    fuse: bool,
    skip: Skip | None,
) -> tuple[nn.Module, Report, list[Context]]:
    """Swap in ``workspace``, a copy of ``model``, which itself is only read.

    Returns:
        The rewritten model, its report, and a context for every graph in it.
    """
    report = Report(model=type(model).__name__)
    layers = inspect_modules(model, skip)
    context = Context(layers)
    if is_prepared(model):
        context.skip = lambda path: "quantization_prepared"
    elif skip is not None:
        context.skip = lambda path: "skipped" if skip(_nearest(model, path), path) else None
    inference = fuse and not is_training(model)
    if inference:
        unswap_training_modules(workspace)  # of a model that was optimized to be trained
    result = workspace
    graph_module = workspace if is_one_graph(workspace) else None
    if graph_module is None and not is_convolution(model):
        try:
            graph_module = _traced(workspace, model, fuse)
        except NotTraceable as error:
            report.not_traced = one_line(error)
    seen = ObservedShapes()
    if arguments is not None:
        seen = observe_shapes(graph_module or model, arguments)
    context.shapes = seen.nodes
    if graph_module is not None:
        run_passes(graph_module, context, EXACT_PASSES)
        result, contexts = graph_module, [context]
    else:
        result, contexts = swap_modules(workspace, layers), []
        if inference and report.not_traced is not None:
            contexts = list(rewrite_submodules(workspace, model, context))
    report.layers = [
        dataclasses.replace(layer, input_shape=layer.input_shape or seen.modules.get(layer.path))
        for layer in layers.values()
    ]
    if contexts:
        report.calls_before = sum(count_calls(graph_at(result, c.prefix)) for c in contexts)
    if not report.swapped:
        return workspace, report, []
    report.traced = tuple(c.prefix for c in contexts)
    report.mode = "graph" if graph_module is not None else "substitution"
    return result, report, contexts


def _lay_out(model: nn.Module, result: nn.Module, report: Report, contexts: list[Context]) -> None:
    """Set the memory format before the other passes, so that layers are timed in it."""
    if report.swapped and not is_training(model):
        for context in contexts:
            run_passes(graph_at(result, context.prefix), context, (set_memory_format,))
            context.memory_format = "preserve"


def _fuse(
    model: nn.Module,
    result: nn.Module,
    report: Report,
    contexts: list[Context],
    memory_format: MemoryFormat = "auto",
) -> Report:
    """Run the passes for inference over the graphs in ``result``, where ``model`` is in eval."""
    if not contexts or not report.swapped or is_training(model):
        if memory_format in ("channels_last", "contiguous"):
            report.memory_format = "preserve (the result is no graph for inference)"
        return report
    for context in contexts:
        graph_module = graph_at(result, context.prefix)
        report = fuse_graph(graph_module, report, context, INFERENCE_PASSES)
    return report


def _train_faster(result: nn.Module, report: Report) -> None:
    """What is done where modules were replaced, and the model trains."""
    if report.mode == "substitution" and is_training(result):
        report.elsewhere = out_of_place(result) | swap_batch_norms(result)
        report.elsewhere |= swap_excitations(result)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _nearest(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` or the one nearest above: exported graphs name modules they lost."""
    modules = modules_by_path(model)
    while path not in modules:
        path = path.rpartition(".")[0]
    return modules[path]


def _traced(workspace: nn.Module, model: nn.Module, fuse: bool) -> InferenceGraph:
    if not fuse:
        raise NotTraceable("fuse=False")
    check_not_compiled(model)  # the copy is not, as deepcopy leaves that out
    if is_training(model):
        raise NotTraceable("the model is in train mode")
    return build_graph_module(workspace)
