"""The training examples: train_digits.py, its comparison, and train_distributed.py."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from test_examples import ROOT, load, run
from torch import nn

import dwswap

# train_digits


@pytest.mark.slow
def test_train_digits(tmp_path):
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    path = tmp_path / "digits.json"
    done = run("train_digits.py", "--epochs", "4", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads(path.read_text())
    assert saved["accuracy_before"] == saved["accuracy_after"] >= 0.9
    assert saved["epochs"][-1]["loss"] < saved["epochs"][0]["loss"]


@pytest.fixture
def noise(tmp_path, monkeypatch):
    """A file of images without meaning: 128 to train on, 72 to test."""
    pytest.importorskip("torchvision")
    numpy = pytest.importorskip("numpy")
    random = numpy.random.default_rng(0)
    images, labels = random.integers(0, 17, (200, 8, 8)), random.integers(0, 10, 200)
    path = tmp_path / "noise.npz"
    numpy.savez(path, images=images, target=labels)
    monkeypatch.setattr("digits.TRAINING_IMAGES", 128)
    return path


def train_digits(monkeypatch, *arguments: str) -> int:
    """Run the example in this process, on the CPU; its exit status."""
    monkeypatch.setattr(sys, "argv", ["train_digits.py", "--device", "cpu", *arguments])
    return load("examples/train_digits.py").main()


def test_train_digits_fails_on_noise(noise, monkeypatch, capsys):
    """Data from a file, and a bar that noise does not reach."""
    assert train_digits(monkeypatch, "--epochs", "1", "--data", str(noise)) == 1
    assert "FAILED" in capsys.readouterr().out


def test_train_digits_says_what_is_missing(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match=r"dwswap\[bench\]"):
        load("examples/digits.py").load_digits(None)


# train_digits --compare


@pytest.fixture
def compare_training(monkeypatch):
    pytest.importorskip("torchvision")
    import compare_training

    monkeypatch.setattr(compare_training, "RUNS", 3)
    return compare_training


def test_compare_saves_both_curves(compare_training, noise, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out" / "curves.json"
    arguments = ("--compare", "--epochs", "2", "--data", str(noise), "--json", str(path))
    assert train_digits(monkeypatch, *arguments) == 0, capsys.readouterr().out
    saved = json.loads(path.read_text())
    assert saved["passed"]
    assert [len(curve) for curve in saved["losses"]["plain"]] == [4, 4, 4]
    assert saved["losses"]["plain"][0] != saved["losses"]["plain"][1]
    # On the CPU the operator is PyTorch's own convolution.
    assert saved["losses"]["swapped"] == saved["losses"]["plain"]
    assert saved["largest_relative_difference"] == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def in_bfloat16(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, y: y.bfloat16().float())


def mirrored_gradient(layer: nn.Module) -> None:
    layer.weight.register_hook(lambda grad: grad.flip(2, 3))


@pytest.mark.parametrize("defect", [in_bfloat16, mirrored_gradient])
def test_compare_fails_on_wrong_kernels(compare_training, noise, monkeypatch, capsys, defect):
    optimize = dwswap.optimize

    def wrong(model: nn.Module) -> nn.Module:
        fast = optimize(model)
        for module in fast.modules():
            if isinstance(module, dwswap.DepthwiseConv2d):
                defect(module)
        return fast

    monkeypatch.setattr(dwswap, "optimize", wrong)
    assert train_digits(monkeypatch, "--compare", "--epochs", "2", "--data", str(noise)) == 1
    assert "the losses with the swap differ by" in capsys.readouterr().out


def drifting(rate: float, runs: int = 5, seed: int = 0) -> torch.Tensor:
    """Losses that fall from 2.3, and errors from ``rate`` on that grow by a third per step."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(60, dtype=torch.float64)
    error = rate * torch.randn(runs, 60, generator=generator, dtype=torch.float64)
    return 2.3 * 0.97**steps + error * 1.33**steps


def test_compare_takes_drift_of_the_size_of_the_noise(compare_training):
    result = compare_training.compare_losses(drifting(1e-7), drifting(1e-7, seed=1))
    assert len(result.noise) == compare_training.STEPS
    assert result.passed
    assert result.noise[-1] > 1e-2
    # One run that leaves early is chance.
    swapped = drifting(1e-7, seed=1)
    swapped[2] += 1e-3
    assert compare_training.compare_losses(drifting(1e-7), swapped).passed


@pytest.mark.parametrize("error", [1e-5, float("nan"), float("inf")])
def test_compare_refuses_other_losses(compare_training, error):
    swapped = drifting(1e-7, seed=1) + error
    result = compare_training.compare_losses(drifting(1e-7), swapped)
    assert not result.passed
    assert not result.swapped[0] <= result.limit[0]


def test_compare_refuses_another_accuracy(compare_training, capsys):
    from rich.console import Console

    equal = compare_training.compare_losses(drifting(1e-7), drifting(1e-7))
    assert compare_training.verdict(Console(), equal, points=0.49) == 0
    assert compare_training.verdict(Console(), equal, points=0.51) == 1
    assert "0.51 points apart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "epochs"),
    [
        pytest.param("cpu", "3", marks=pytest.mark.slow),
        pytest.param("cuda", "8", marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
)
def test_compare_on_digits(tmp_path, device, epochs):
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    path = tmp_path / "curves.json"
    arguments = ("--compare", "--epochs", epochs, "--json", str(path))
    done = run("train_digits.py", *arguments, device=device)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agree to float32 noise" in done.stdout
    saved = json.loads(path.read_text())
    assert len(saved["drift"]["noise"]) == 50
    assert saved["accuracy_difference_points"] <= 0.5


# train_distributed

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_train_distributed_alone(noise, monkeypatch, capsys):
    """One process needs no launcher; the bar is for digits, and noise does not reach it."""
    arguments = ["train_distributed.py", "--device", "cpu", "--epochs", "1", "--data", str(noise)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert load("examples/train_distributed.py").main() == 1
    output = capsys.readouterr().out
    assert "epoch 1: loss" in output
    assert "1 ranks: parameters are equal" in output
    assert "FAILED" in output
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("device", "epochs"),
    [
        pytest.param("cpu", "4", marks=pytest.mark.slow),
        pytest.param("cuda", "8", marks=pytest.mark.gpu),
    ],
)
def test_two_processes_train_distributed(device, epochs):
    pytest.importorskip("torchvision")
    pytest.importorskip("sklearn")
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    done = run("train_distributed.py", "--epochs", epochs, device=device, launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch 1: loss") == 1  # rank 0 speaks for all
    assert "2 ranks: parameters are equal" in done.stdout


@pytest.mark.slow
def test_train_distributed_sees_parameters_that_differ(tmp_path):
    pytest.importorskip("torchvision")
    script = tmp_path / "differ.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        "import torch, train_distributed as example, torch.distributed as dist\n"
        "example.join(torch.device('cpu'))\n"
        "model = torch.nn.Linear(2, 2)\n"
        "torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)\n"
        "assert example.equal_on_all_ranks(model)\n"
        "if dist.get_rank() == 1:\n"
        "    torch.nn.init.constant_(model.bias, 1e-30)\n"
        "assert not example.equal_on_all_ranks(model)\n"
        "dist.destroy_process_group()\n"
    )
    done = run(str(script), launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, r"must be at most 1, got 2; --device cpu"),
        ({"WORLD_SIZE": "65"}, r"at most 64 processes \(a batch\), got 65"),
    ],
)
def test_train_distributed_refuses_too_many_processes(variables, error, monkeypatch, capsys):
    pytest.importorskip("torchvision")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(sys, "argv", ["train_distributed.py"])
    with pytest.raises(SystemExit, match="2"):
        load("examples/train_distributed.py").main()
    assert re.search(error, capsys.readouterr().err)
