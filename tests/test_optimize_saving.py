"""Results of optimize through deepcopy, pickle, torch.save and torch.compile."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MODES, Block, depthwise, image, optimized
from torch import Tensor, nn

import dwswap
from dwswap import DepthwiseConv2d, depthwise_conv2d


def test_train_guard() -> None:
    fast = dwswap.optimize(Block().eval())
    whole = nn.Sequential(fast)
    for result in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), whole):
        result.eval()
        result.train(False)
        with pytest.raises(RuntimeError, match=r"optimized for inference; call .* on the original"):
            result.train()
    assert not any(module.training for module in fast.modules())


@pytest.mark.parametrize("how", MODES)
def test_deepcopy_pickle_and_torch_save(how: dict[str, bool]) -> None:
    model, fast = optimized(how)
    fast.register_forward_hook(_plus_one)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    calls = [torch.conv2d, depthwise_conv2d]
    copies = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(fast))))),
        torch.load(buffer, weights_only=False),
    ]
    for again in copies:
        if how["fuse"] and not how["train"]:
            assert [n.target for n in again.graph.nodes if n.op == "call_function"] == calls
            assert again.get_submodule("expand").weight is not fast.get_submodule("expand").weight
        else:
            own, other = (m.get_submodule("depthwise") for m in (again, fast))
            assert type(own) is DepthwiseConv2d
            assert own.weight is not other.weight
            assert list(again.state_dict()) == list(model.state_dict())
        assert list(again.state_dict()) == list(fast.state_dict())
        assert dwswap.report(again) == dwswap.report(fast)
        assert [m.training for m in again.modules()] == [m.training for m in fast.modules()]
        assert type(again).__name__ == "Block"
        torch.testing.assert_close(_run(again), _run(fast), rtol=0, atol=0)


class Heads(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: depthwise(3), "other": nn.Conv2d(3, 4, 1)})
        self.scales = nn.ParameterDict({name: torch.ones(1)})

    def forward(self, x: Tensor) -> Any:
        return [head(x) * scale for head in self.heads.values() for scale in self.scales.values()]


@pytest.mark.parametrize("name", ["global", '3" kernel', "back\\slash", "größe 😀"])
@torch.no_grad()
def test_names_that_are_keywords_or_have_quotes(name: str) -> None:
    model = Heads(name).eval()
    fast = dwswap.optimize(model)
    assert dwswap.report(fast).mode == "graph"
    x = image()
    for again in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(again(x), model(x))


def _plus_one(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


def _run(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return model(image())


@pytest.mark.parametrize("fuse", [True, False])
def test_saved_models_load_in_a_fresh_process(tmp_path: Path, fuse: bool) -> None:
    model = nn.Sequential(depthwise(multiplier=2), nn.BatchNorm2d(16), nn.ReLU6()).eval()
    fast = dwswap.optimize(model, fuse=fuse)
    x = image(8)
    torch.save((fast, x, fast(x)), tmp_path / "model.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(fast))
    code = (
        "import pickle, sys, torch\n"
        "import dwswap\n"
        "path = sys.argv[1]\n"
        "fast, x, expected = torch.load(path + '/model.pt', weights_only=False)\n"
        "pickled = pickle.load(open(path + '/model.pkl', 'rb'))\n"
        "assert torch.equal(fast(x), expected) and torch.equal(pickled(x), expected)\n"
        "print(dwswap.report(pickled).summary())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == dwswap.report(fast).summary()


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_break(how: dict[str, bool], backend: str) -> None:
    torch._dynamo.reset()
    _, fast = optimized(how)
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    torch.manual_seed(0)
    result = compiled(image())
    if not how["train"]:  # dropout draws differently under aot_eager
        torch.testing.assert_close(result, _run(fast))
