"""Squeeze-and-excitation in training: hooks, checkpoints, graphs and transforms."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import torch
from norm_models import Calls, at, same, step, trains_as
from tiny_models import depthwise, image
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dwswap

misc = pytest.importorskip("torchvision.ops.misc")


def two(gate: Any = nn.Sigmoid) -> nn.Sequential:
    """Two blocks with a residual sum in place behind the first."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(depthwise(), misc.SqueezeExcitation(8, 4, scale_activation=gate))
        for _ in range(2)
    ]
    return nn.Sequential(Residual(blocks[0]), blocks[1], nn.Flatten()).train()


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        output = self.inner(x)
        output += x
        return cast(Tensor, output)


def learn(of: Any, leaf: Tensor | None = None) -> list[Any]:
    leaf = image(8).requires_grad_() if leaf is None else leaf
    output = of(leaf)
    output.square().mean().backward()
    return [output, leaf.grad]


def test_a_residual_sum_in_place(excitation_calls: Calls) -> None:
    model = two()
    trains_as(dwswap.optimize(model), model)
    assert excitation_calls == ["sigmoid"] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool, excitation_calls: Calls) -> None:
    model = two()
    fast = dwswap.optimize(model)
    found = []
    for of in (fast, model):
        found.append(learn(lambda x, of=of: checkpoint(of, x, use_reentrant=reentrant)))
        found[-1] += [p.grad for p in of.parameters()]
        of.zero_grad()
        parts = nn.Sequential(at(of, "0"), *at(of, "1"), nn.Flatten())
        found[-1] += learn(
            lambda x, parts=parts: checkpoint_sequential(parts, 3, x, use_reentrant=reentrant)
        )
        found[-1] += [p.grad for p in of.parameters()]
    same(found[0], found[1])
    assert len(excitation_calls) >= 7


def test_second_gradients(excitation_calls: Calls) -> None:
    for gate in (nn.Sigmoid, nn.Identity):
        model = two(gate)
        found = []
        for of in (dwswap.optimize(model), model):
            tensors = (image(8).requires_grad_(), *of.parameters())
            loss = of(tensors[0]).square().sum()
            first = torch.autograd.grad(loss, tensors, create_graph=True)
            of_slope = sum((slope.square().sum() for slope in first), torch.zeros(()))
            found.append([*first, *torch.autograd.grad(of_slope, tensors)])
        for ours, theirs in zip(*found, strict=True):
            same(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-4)
    assert excitation_calls == ["sigmoid"] * 2 + ["none"] * 2


def test_the_graph_is_kept(excitation_calls: Calls) -> None:
    model = two()
    found = []
    for of in (dwswap.optimize(model), model):
        leaf = image(8).requires_grad_()
        loss = of(leaf).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([leaf.grad, *(p.grad for p in of.parameters())])
    same(found[0], found[1])


def test_hooks_see_what_they_did(excitation_calls: Calls) -> None:
    model = two()
    fast = dwswap.optimize(model)
    logs = []
    for of in (fast, model):
        log: list[Any] = []
        block = at(of, "1.1")

        def note(_module: Any, grad_input: Any, grad_output: Any, log: Any = log) -> None:
            log.append([*grad_input, *grad_output])

        for module in (block, block.fc1, block.fc2, block.activation):
            module.register_full_backward_hook(note)
        block.fc2.register_full_backward_pre_hook(lambda _module, grads: (2 * grads[0],))
        block.fc1.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
        block.fc1.weight.register_hook(lambda grad: 3 * grad)
        block.fc1.weight.register_post_accumulate_grad_hook(
            lambda parameter, log=log: log.append(parameter.grad.clone())
        )
        log += learn(of)
        log += [p.grad for p in of.parameters()]
        logs.append(log)
    same(logs[0], logs[1])
    assert excitation_calls == ["sigmoid"] * 2


def test_two_threads_go_back_through_one_graph(excitation_calls: Calls) -> None:
    fast = dwswap.optimize(two())
    leaf = image(8).requires_grad_()
    output = fast(leaf)
    grads = [torch.randn_like(output) for _ in range(4)]
    expected = [torch.autograd.grad(output, leaf, g, retain_graph=True)[0] for g in grads]
    found: dict[int, Tensor] = {}

    def back(i: int) -> None:
        for _ in range(5):
            (found[i],) = torch.autograd.grad(output, leaf, grads[i], retain_graph=True)

    threads = [threading.Thread(target=back, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same([found[i] for i in range(4)], expected)


@pytest.mark.parametrize("inplace", [True, False])
def test_then_for_inference(inplace: bool, excitation_calls: Calls) -> None:
    model = two()
    fast = dwswap.optimize(model)
    fast.eval(), model.eval()
    same(fast(image(8)), model(image(8)))
    graph = dwswap.optimize(fast, inplace=inplace)
    assert isinstance(graph, fx.GraphModule)
    assert "made 2 squeeze-and-excitations one call each" in str(dwswap.report(graph))
    same(graph(image(8)), model(image(8)))
    assert excitation_calls == []


@pytest.mark.parametrize("train", [True, False])
def test_symbolic_trace(train: bool, excitation_calls: Calls) -> None:
    model = two().train(train)
    fast = dwswap.optimize(two()).train(train)
    traced, expected = (fx.symbolic_trace(m) for m in (fast, model))
    calls = [[n.target for n in t.graph.find_nodes(op="call_module")] for t in (traced, expected)]
    assert calls[0] == [name for name in calls[1] if not name.endswith("0")]
    same(traced(image(8)), model(image(8)))


class Breaks(nn.Module):
    """Dynamo compiles what is before and what is behind it."""

    def forward(self, input: Tensor) -> Tensor:
        self.seen = float(input.detach().abs().max())
        return input


def test_torch_compile_of_parts(excitation_calls: Calls) -> None:
    """More blocks than a code object is compiled for: the rest run eagerly."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(
            *(depthwise(channels), misc.SqueezeExcitation(channels, 4), Breaks()),
            nn.Conv2d(channels, channels + 4, 1),
        )
        for channels in range(8, 56, 4)
    ]
    model = nn.Sequential(*blocks).train()
    fast = dwswap.optimize(model)
    try:
        ours = learn(torch.compile(fast, backend="eager"))
    finally:
        torch._dynamo.reset()  # else code that was compiled too often is not any more
    same(ours, learn(model), 1e-4)


def test_torch_compile(excitation_calls: Calls) -> None:
    model = two()
    fast = dwswap.optimize(model)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    same(compiled(image(8)), model(image(8)))
    assert excitation_calls == []
    trains_as(fast, model)
    assert excitation_calls == ["sigmoid"] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_backward(excitation_calls: Calls) -> None:
    """Of a forward that ran eagerly."""
    model = two()
    found = []
    for of in (dwswap.optimize(model), model):
        leaf = image(8).requires_grad_()
        loss = of(leaf).square().mean()
        try:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        finally:
            torch._dynamo.reset()
        found.append([leaf.grad, *(p.grad for p in of.parameters())])
    same(found[0], found[1])
    assert excitation_calls == ["sigmoid"] * 2


def test_compiled_layers(excitation_calls: Calls) -> None:
    model = two()
    fast = dwswap.optimize(model)
    for path in ("0.inner.1.fc1", "1.1.fc2"):
        at(fast, path).compile(backend="eager")
    trains_as(fast, model)
    assert excitation_calls == ["sigmoid"] * 2


def test_torch_export(excitation_calls: Calls) -> None:
    model = two()
    program = torch.export.export(dwswap.optimize(model), (image(8),))
    same(program.module()(image(8)), model(image(8)))
    assert excitation_calls == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_jit_trace(excitation_calls: Calls) -> None:
    model = two()
    traced = torch.jit.trace(dwswap.optimize(model), image(8), check_trace=False)
    same(traced(image(8)), model(image(8)))
    assert excitation_calls == []


def test_functional_call(excitation_calls: Calls) -> None:
    model = two()
    found = []
    for of in (dwswap.optimize(model), model):
        parameters = {n: 2 * p.detach() for n, p in of.named_parameters()}

        def loss(p: Any, x: Tensor, of: nn.Module = of) -> Tensor:
            return cast(Tensor, torch.func.functional_call(of, p, (x,)).square().mean())

        found.append([loss(parameters, image(8)), torch.func.grad(loss)(parameters, image(8))])
    same(found[0], found[1])
    assert excitation_calls == ["sigmoid"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, excitation_calls: Calls) -> None:
    """The first image has half precision, and so have its gates; that of the second is float32."""
    model = two()
    fast = dwswap.optimize(model)
    with torch.autocast("cpu", dtype):
        ours, theirs = (step(m, image(8)) for m in (fast, model))
    assert ours[0].dtype is theirs[0].dtype
    same(ours, theirs, 4 * torch.finfo(dtype).eps)
    assert excitation_calls == ["sigmoid"] * 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_forward_mode_and_vmap_are_left_to_pytorch(excitation_calls: Calls) -> None:
    model = two()
    model[0] = at(model, "0.inner")  # no sum in place, which vmap has none for
    found = []
    for of in (dwswap.optimize(model), model):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(image(8), image(8).cos())
            found.append([*forward_ad.unpack_dual(of(dual))])
        found[-1].append(torch.func.vmap(of)(torch.stack([image(8), image(8) ** 2])))
    same(found[0], found[1])
    assert excitation_calls == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batched_gradients(layout: torch.memory_format, excitation_calls: Calls) -> None:
    model = two()
    found = []
    for of in (dwswap.optimize(model), model):
        leaf = image(8).contiguous(memory_format=layout).requires_grad_()
        output = of(leaf)
        rows = torch.eye(output.numel())[:5].view(5, *output.shape)
        given = {"retain_graph": True, "is_grads_batched": True}
        (legacy,) = torch.autograd.grad(output, leaf, rows, **given)

        def gradient(row: Tensor, output: Tensor = output, leaf: Tensor = leaf) -> Tensor:
            return torch.autograd.grad(output, leaf, row, retain_graph=True)[0]

        found.append([legacy, torch.func.vmap(gradient)(rows)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert excitation_calls == ["sigmoid"] * 2


@pytest.mark.filterwarnings("ignore:Anomaly")
def test_anomaly_mode(excitation_calls: Calls) -> None:
    model = two()
    with torch.autograd.detect_anomaly(check_nan=True):
        trains_as(dwswap.optimize(model), model)


def test_saved_tensors_may_move(excitation_calls: Calls) -> None:
    model = two()
    found = []
    for of in (dwswap.optimize(model), model):
        with torch.autograd.graph.save_on_cpu():
            found.append(learn(of))
    same(found[0], found[1])
