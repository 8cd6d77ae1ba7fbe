"""A ``torch.export.ExportedProgram`` as a graph that the passes can edit, and back.

A program takes its parameters, buffers and constants as inputs of its graph, and returns what it
writes into buffers and inputs beside its outputs; its signature says which is which.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from dwswap.example_inputs import Arguments
from dwswap.fake_values import fake_mode_of, update_fake_values
from dwswap.inference_graph import EXPORTED
from dwswap.lowering import lower
from dwswap.program_inputs import check_inputs

__all__ = ["flat_inputs", "lift", "unlift"]

_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_WRITES = (
    *(OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION),
    OutputKind.USER_INPUT_MUTATION,
)
_WRITE = "dwswap_write"
"""Key in ``Node.meta`` of a call that writes what the program returned to be written."""

aten = torch.ops.aten


def unlift(program: ExportedProgram) -> fx.GraphModule:
    """The graph of ``program`` with its tensors, which are shared, as parameters and buffers.

    It takes and returns flat tuples, as the graph of ``program`` does. What the program writes into
    a tensor is an ``aten.copy_`` at the end, which tells the passes that this tensor changes.

    Raises:
        ValueError: ``program`` names values inside its graph, which may go.
    """
    kept = [entry.fqn for entry in program.module_call_graph[1:] if entry.signature is not None]
    if kept:
        raise ValueError(
            "model must be exported without preserve_module_call_signature, got a program that "
            f"keeps those of {', '.join(kept)}"
        )
    signature, graph = program.graph_signature, copy.deepcopy(program.graph)
    root = nn.Module()
    for name, child in program.graph_module.named_children():
        root.add_module(name, child)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    where: dict[str, fx.Node] = {}
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        where[_name(spec)] = node
        if spec.kind in _TENSORS and spec.target is not None:
            tensors = program.constants if _is_constant(spec) else program.state_dict
            _set_tensor(root, spec.target, tensors[spec.target])
            with graph.inserting_before(node):
                read = graph.get_attr(spec.target)
            read.meta = dict(node.meta)
            node.replace_all_uses_with(read)
            graph.erase_node(node)
            where[spec.target] = read
    _write_at_the_end(graph, signature.output_specs, where)
    result = fx.GraphModule(root, graph, class_name=_class_name(program))
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    result.recompile()
    for module in result.modules():
        if module is result or type(module) is nn.Module:
            module.training = False  # what was in train mode is so in the calls of the graph
    result.meta.update(program.graph_module.meta)
    result.meta[EXPORTED] = True
    return result


def lift(graph_module: fx.GraphModule, program: ExportedProgram) -> ExportedProgram:
    """The inverse of :func:`unlift`, for what the passes made of its result; edits that in place.

    New parameters come after those of ``program``. Dynamic shapes and what limits them stay, so do
    the structures of inputs and outputs, and what is written back.
    """
    signature, graph = program.graph_signature, graph_module.graph
    tensors = _tensors(graph_module, signature.input_specs)
    inputs = _lift_tensors(graph, tensors, signature.input_specs)
    decomposed = all(verifier.dialect != "TRAINING" for verifier in program.verifiers)
    made = lower(graph, decomposed=decomposed)
    outputs = _return_writes(graph, signature.output_specs)
    update_fake_values(graph, {*made, *inputs})
    # Names of values: those that the signature had, and those that the graph has now.
    names = {_name(spec): node.name for node, spec in inputs.items()}
    pairs = list(zip(signature.output_specs, outputs, strict=True))
    names |= {_name(spec): node.name for spec, node in pairs if isinstance(node, fx.Node)}
    calls = copy.deepcopy(program.module_call_graph)
    for entry in calls:
        if entry.signature is not None:
            for arguments in (entry.signature.inputs, entry.signature.outputs):
                arguments[:] = [_renamed(argument, names) for argument in arguments]
    input_specs = [replace(spec, arg=_renamed(spec.arg, names)) for spec in inputs.values()]
    written_inputs = {OutputKind.USER_INPUT_MUTATION: names}
    output_specs = [
        replace(
            spec,
            # Two outputs may be one value now.
            arg=_renamed(spec.arg, {_name(spec): getattr(node, "name", _name(spec))}),
            target=written_inputs.get(spec.kind, {}).get(str(spec.target), spec.target),
        )
        for spec, node in pairs
    ]
    holders: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for is_constant, old in ((True, program.constants), (False, program.state_dict)):
        lifted = {spec.target for spec in signature.input_specs if spec.kind in _TENSORS}
        holders[is_constant] |= {name: v for name, v in old.items() if name not in lifted}
    for spec in input_specs:
        if spec.kind in _TENSORS:
            holders[_is_constant(spec)][str(spec.target)] = tensors[str(spec.target)]
    return ExportedProgram(
        graph_module,
        graph,
        ExportGraphSignature(input_specs, output_specs),
        holders[False],
        copy.deepcopy(program.range_constraints),
        calls,
        program.example_inputs,
        holders[True],
        verifiers=program.verifiers,
    )


def flat_inputs(program: ExportedProgram, arguments: Arguments) -> Arguments:
    """``arguments`` of ``program`` as its graph takes them.

    Raises:
        ValueError: they have another structure, or are none that ``program`` takes.
    """
    expected = program.call_spec.in_spec
    kwargs = arguments.kwargs
    given = pytree.tree_structure((arguments.args, kwargs))
    if expected is not None and given != expected:
        order = expected.child(1).context
        if kwargs.keys() == set(order):
            kwargs = {name: kwargs[name] for name in order}
            given = pytree.tree_structure((arguments.args, kwargs))
    if given != expected:
        raise ValueError(f"example_inputs must be as the program's own, {expected}, got {given}")
    leaves = tuple(pytree.tree_leaves((arguments.args, kwargs)))
    check_inputs(program, leaves)
    return Arguments(leaves)


def _set_tensor(root: nn.Module, path: str, tensor: Any) -> None:
    *parents, name = path.split(".")
    owner = root
    for parent in parents:
        if parent not in owner._modules:
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor)


def _write_at_the_end(graph: fx.Graph, specs: list[OutputSpec], where: dict[str, fx.Node]) -> None:
    """Return outputs only; ``where`` are the tensors and inputs by the names in ``specs``."""
    output = graph.output_node()
    values: Any = output.args[0]
    returned = []
    for spec, value in zip(specs, values, strict=True):
        if spec.kind not in _WRITES:
            returned.append(value)
            continue
        target = where[str(spec.target)]
        with graph.inserting_before(output):
            new = graph.call_function(aten.copy_.default, (target, value))
        new.meta = {"val": target.meta["val"], _WRITE: True}
    output.args = (tuple(returned),)


def _return_writes(graph: fx.Graph, specs: list[OutputSpec]) -> list[Any]:
    """The inverse; what the graph returns, in the order of ``specs``."""
    output = graph.output_node()
    writes = [node for node in graph.nodes if _WRITE in node.meta]
    returned: Any = output.args[0]
    remaining, written = iter(returned), iter([node.args[1] for node in writes])
    values = [next(written if spec.kind in _WRITES else remaining) for spec in specs]
    for node in writes:
        graph.erase_node(node)
    output.args = (tuple(values),)
    return values


def _tensors(graph_module: fx.GraphModule, specs: list[InputSpec]) -> dict[str, Tensor]:
    """By path: what is left of the tensors of ``specs``, and what the passes have added."""
    tensors: dict[str, Tensor] = {}
    tensors |= dict(graph_module.named_parameters(remove_duplicate=False))
    tensors |= dict(graph_module.named_buffers(remove_duplicate=False))
    old = [str(spec.target) for spec in specs if spec.kind in _TENSORS]
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    new = [path for path in tensors if path in read and path not in old]
    return {path: tensors[path] for path in (*old, *new) if path in tensors}


def _lift_tensors(
    graph: fx.Graph, tensors: dict[str, Tensor], specs: list[InputSpec]
) -> dict[fx.Node, InputSpec]:
    """Make inputs of the tensors that ``graph`` reads; all its inputs, in order."""
    kept = iter([node for node in graph.nodes if node.op == "placeholder"])
    mode = fake_mode_of(graph)
    known = {spec.target for spec in specs}
    parameters = [spec for spec in specs if spec.kind is InputKind.PARAMETER]
    added = []
    for path in (path for path in tensors if path not in known):
        added.append(InputSpec(InputKind.PARAMETER, TensorArgument(f"p_{path}"), path))
    after = specs.index(parameters[-1]) + 1 if parameters else 0
    inputs: dict[fx.Node, InputSpec] = {}
    by_path: dict[str, fx.Node] = {}
    with graph.inserting_before(next(iter(graph.nodes))):
        anchor = graph.create_node("placeholder", "anchor")
    for spec in (*specs[:after], *added, *specs[after:]):
        path = str(spec.target)
        if spec.kind not in _TENSORS:
            node = next(kept)
        elif path in tensors:
            assert mode is not None
            node = by_path[path] = graph.placeholder(_name(spec))
            node.target = node.name  # a path may be no identifier, and two may make the same one
            node.meta["val"] = mode.from_tensor(tensors[path], static_shapes=True)
        else:
            continue
        anchor.prepend(node)
        inputs[node] = spec
    graph.erase_node(anchor)
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target) in by_path:
            node.replace_all_uses_with(by_path[str(node.target)])
            graph.erase_node(node)
    return inputs


def _is_constant(spec: InputSpec) -> bool:
    """Whether its value is among the constants of a program, not in its ``state_dict``."""
    is_buffer = spec.kind is InputKind.BUFFER
    return spec.kind is InputKind.CONSTANT_TENSOR or (is_buffer and not spec.persistent)


def _class_name(program: ExportedProgram) -> str:
    """Name of the class that was exported, as far as the graph tells."""
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if path == "":
                return str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    return "ExportedProgram"


def _name(spec: InputSpec | OutputSpec) -> str:
    return str(getattr(spec.arg, "name", None))


def _renamed(argument: Any, names: Mapping[str, str]) -> Any:
    name = str(getattr(argument, "name", None))
    return replace(argument, name=names[name]) if name in names else argument
