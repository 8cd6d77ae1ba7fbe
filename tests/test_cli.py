"""The ``dwswap`` command: what it prints and saves, and what it answers to wrong requests."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dwswap
from dwswap import build
from dwswap.cli import doctor, main, models
from dwswap.cli import export as export_command
from dwswap.cli.common import console

ROOT = Path(__file__).resolve().parents[1]
OWN = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU())

def broken():
    raise ValueError("no such width")

def not_a_module():
    return 3

def needs_values():
    assert torch.linspace(0, 1, 3).sum().item() > 0
    return model()

class fixed_batch(nn.Conv2d):
    def __init__(self):
        super().__init__(6, 6, 3, groups=6)

    def forward(self, x):
        return super().forward(x).reshape(2, -1)

class refusing(fixed_batch):
    def forward(self, x):
        raise ValueError("no such picture")

number = 3
"""


@pytest.fixture
def wide(monkeypatch):
    """No line is wrapped, so that texts can be looked for."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's module in the working directory."""
    (tmp_path / "dwswap_test_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "dwswap_test_models"
    sys.modules.pop("dwswap_test_models", None)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"dwswap {dwswap.__version__}\n"


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.slow
def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "dwswap", "explain", "mobilnet_v2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "mobilenet_v2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second is of LC_ALL=C
def test_what_the_terminal_cannot_show_is_a_question_mark(errors):
    """Rich cuts what does not fit into a column, and ends it with an ellipsis."""
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", errors=errors) as file:
        console(file).print("\u00fcber \u2026", markup=False)
        file.flush()
        assert raw.getvalue() == b"?ber ?\n"


def test_unknown_model_names_what_was_searched(capsys, wide):
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    assert main(["explain", "no_such_network"]) == 2
    assert "(searched torchvision and timm)" in capsys.readouterr().err


# explain


def test_explain_torchvision(capsys, wide, tmp_path):
    pytest.importorskip("torchvision")
    path = tmp_path / "new" / "report.json"
    assert main(["explain", "mobilenet_v3_small", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "features.1.block.0.0" in out
    saved = json.loads(path.read_text())
    assert saved["kind"] == "explain"
    assert saved["environment"]["torch"] == torch.__version__
    decisions = [layer["decision"] for layer in saved["report"]["layers"]]
    assert decisions.count("swapped") == 11


def test_explain_train_mode(capsys, wide):
    pytest.importorskip("torchvision")
    assert main(["explain", "shufflenet_v2_x0_5", "--train"]) == 0
    assert "substitution" in capsys.readouterr().out


def test_explain_detection_model(capsys, wide):
    pytest.importorskip("torchvision")
    assert main(["explain", "ssdlite320_mobilenet_v3_large"]) == 0
    assert "31 of" in capsys.readouterr().out


def test_explain_timm(capsys, wide):
    pytest.importorskip("timm")
    name = "timm/mobilenetv3_small_050"
    for tag in ("", ".lamb_in1k"):
        assert main(["explain", name + tag]) == 0
        assert "swapped" in capsys.readouterr().out
    assert main(["explain", name + ".no_such_tag"]) == 2
    assert "Invalid pretrained tag (no_such_tag)" in capsys.readouterr().err


def test_explain_input_size(own, capsys, wide):
    assert main(["explain", f"{own}:model", "--input-size", "1x6x20x30"]) == 0
    assert "1x6x20x30" in capsys.readouterr().out


def test_explain_input_that_does_not_fit(own, capsys):
    assert main(["explain", f"{own}:model", "--input-size", "20x30"]) == 2
    err = capsys.readouterr().err
    assert "--input-size 1x3x20x30" in err
    assert "6 channels" in err
    assert "Traceback" not in err


def test_explain_own_model(own, capsys, wide):
    assert main(["explain", f"{own}:model"]) == 0
    assert "depthwise" in capsys.readouterr().out


def test_explain_constructor_that_cannot_run_on_meta(own, capsys, wide):
    assert main(["explain", f"{own}:needs_values"]) == 0
    assert "depthwise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("{own}:broken", "raised ValueError: no such width"),
        ("{own}:not_a_module", "must return a torch.nn.Module, got int"),
        ("{own}:number", "must be callable or a torch.nn.Module, got int"),
        ("{own}:modle", "Did you mean model"),
        ("no_such_package_at_all:model", "cannot import 'no_such_package_at_all'"),
        ("keras/mobilenet", "unknown library 'keras'"),
    ],
)
def test_explain_refuses(own, argument, expected, capsys):
    assert main(["explain", argument.format(own=own)]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert "Traceback" not in err


def test_unknown_model_suggests(capsys):
    pytest.importorskip("torchvision")
    assert main(["explain", "mobilnet_v2"]) == 2
    err = capsys.readouterr().err
    assert "unknown model 'mobilnet_v2'" in err
    assert "Did you mean mobilenet_v2" in err


def test_missing_torchvision_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(models.LOOKUPS, "torchvision", absent("torchvision"))
    monkeypatch.setitem(models.LOOKUPS, "timm", absent("timm"))
    assert main(["explain", "mobilenet_v2"]) == 2
    assert "pip install 'dwswap[bench]'" in capsys.readouterr().err
    assert main(["explain", "timm/mobilenetv2_100"]) == 2
    assert "pip install timm" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["", "x", "224x", "0", "-3", "big"])
def test_explain_refuses_input_size(size, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["explain", "mobilenet_v2", "--input-size", size])
    assert exit.value.code == 2
    assert "--input-size" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["1000000", "9" * 20, "9x40000000", "1x1x16385x16384"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("explain", "mobilenet_v2"), "--input-size"),
        (("export", "mobilenet_v2", "-o", "m.pt2"), "--size"),
    ],
)
def test_sizes_are_limited(command, option, size, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, option, size])
    assert exit.value.code == 2
    text = f"{option}: sizes must make an input of at most 268,435,456 elements, got '{size}'"
    assert text in capsys.readouterr().err


def test_the_size_of_models_to_bench_is_limited(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", "models", "--size", "1000000"])
    assert exit.value.code == 2
    assert "--size: sizes must make an input of at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [("export", "mobilenet_v2", "-o", "m.pt2"), ("demo",), ("bench", "models")]
)
def test_batches_are_limited(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--batch", "10000000"])
    assert exit.value.code == 2
    assert "--batch: must be at most 16,384, got '10000000'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("explain", "mobilenet_v2"), ("doctor",)])
def test_a_file_without_a_name(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--json", ""])
    assert exit.value.code == 2
    assert "--json: must be the path of a file, got ''" in capsys.readouterr().err


def test_unwritable_json(own, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["explain", f"{own}:model", "--json", str(tmp_path / "file" / "x.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


# doctor


def test_doctor(capsys, wide, tmp_path):
    path = tmp_path / "doctor.json"
    code = main(["doctor", "--json", str(path)])
    checks = {check["name"]: check for check in json.loads(path.read_text())["checks"]}
    out = capsys.readouterr().out
    failed = [name for name, check in checks.items() if check["status"] == "fail"]
    assert code == (1 if failed else 0)
    assert {"torch", "GPU", "nvcc", "cache", "kernels", "operator, cpu"} <= set(checks)
    assert checks["operator, cpu"]["status"] == "ok"
    assert torch.__version__ in checks["torch"]["found"]
    for name in checks:
        assert name in out


def test_doctor_without_compilers(monkeypatch, tmp_path):
    """What is missing is named, with what to install; without a GPU nothing has failed."""
    monkeypatch.setattr(doctor, "find_nvcc", raising(build.BuildError("install an nvcc")))
    monkeypatch.setattr(doctor, "find_host_compiler", raising(build.BuildError("install g++")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {check.name: check for check in doctor.checks()}
    assert (found["nvcc"].status, found["nvcc"].advice) == ("warn", "install an nvcc")
    assert (found["host compiler"].status, found["host compiler"].advice) == ("warn", "install g++")


def test_doctor_fails_where_the_kernels_do(monkeypatch):
    """A GPU whose kernels cannot be built: the missing tool fails, and so does the whole."""
    broken = build.Status(attempted=True, reason="no CUDA compiler")
    monkeypatch.setattr(build, "status", lambda: broken)
    assert doctor._kernels(gpu=True).status == "fail"
    tool = doctor._tool("nvcc", raising(build.BuildError("install it")), needed=True)
    assert (tool.status, tool.advice) == ("fail", "install it")
    monkeypatch.setattr(doctor, "checks", lambda: iter([tool]))
    assert main(["doctor"]) == 1


def test_doctor_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "csrc_dir", lambda: tmp_path)
    check = doctor._sources()
    assert (check.status, str(tmp_path) in str(check.advice)) == ("fail", True)


def test_doctor_unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DWSWAP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    check = doctor._cache()
    assert check.status == "warn"
    assert "DWSWAP_CACHE_DIR" in check.advice


def test_doctor_notices_wrong_numbers(monkeypatch):
    monkeypatch.setattr(dwswap, "depthwise_conv2d", lambda x, *rest, **options: x.new_zeros(1))
    assert doctor._operator(torch.device("cpu")).status == "fail"


# build


def test_build_passes_the_request_on(monkeypatch, capsys, wide, tmp_path):
    seen = []
    library = tmp_path / "cached.so"
    library.write_text("code")
    monkeypatch.setattr(
        build, "build", lambda archs, **options: seen.append((archs, options)) or library
    )
    assert main(["build", "--arch", "8.0", "9.0", "--force"]) == 0
    assert seen == [(["8.0", "9.0"], {"force": True, "standalone": False})]
    assert str(library) in capsys.readouterr().out

    copy = tmp_path / "copy.so"
    assert main(["build", "--standalone", "-o", str(copy)]) == 0
    assert seen[1] == (None, {"force": False, "standalone": True})
    assert copy.read_text() == "code"
    assert str(copy) in capsys.readouterr().out


def test_build_refuses_wrong_outputs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(build, "build", lambda *_, **options: Path(__file__))
    assert main(["build", "-o", str(tmp_path / "copy.so")]) == 2
    assert "--output needs --standalone" in capsys.readouterr().err
    assert main(["build", "--standalone", "-o", str(tmp_path / "missing" / "copy.so")]) == 2
    err = capsys.readouterr().err
    assert "cannot write" in err
    assert "No such file" in err
    assert "Traceback" not in err


def test_build_error_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(build, "build", raising(build.BuildError("no CUDA compiler: install it")))
    assert main(["build"]) == 1
    err = capsys.readouterr().err
    assert "no CUDA compiler: install it" in err
    assert "Traceback" not in err


def test_build_refuses_an_architecture(capsys):
    assert main(["build", "--arch", "hopper"]) == 1
    assert "hopper" in capsys.readouterr().err


# export


@pytest.mark.parametrize(
    ("name", "options", "saved"),
    [
        ("m.pt2", [], "as pt2"),
        ("m.pt2", ["--format", "aten", "--batch", "3", "--dtype", "bfloat16"], "as aten"),
        ("m.onnx", [], "as onnx"),
    ],
)
def test_export(own, tmp_path, capsys, wide, name, options, saved):
    if name.endswith(".onnx"):
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = tmp_path / name
    arguments = [f"{own}:model", "-o", str(path), "--size", "1x6x20x30", "--device", "cpu"]
    assert main(["export", *arguments, *options]) == 0
    out = capsys.readouterr().out
    assert saved in out
    assert "6x20x30, " + ("batch size 3" if options else "any batch size") in out
    assert "against float64): ok" in out
    loaded = dwswap.export.load(path)
    x = torch.randn(3, 6, 20, 30, dtype=torch.bfloat16 if options else torch.float32)
    assert loaded(x).shape == (3, 6, 18, 28)


@pytest.mark.slow
def test_export_torchvision_on_a_photograph(tmp_path, capsys, wide):
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    path = str(tmp_path / "m.pt2")
    size = ["--size", "64x96", "--device", "cpu"]
    assert main(["export", "shufflenet_v2_x0_5", "-o", path, *size]) == 0
    out = capsys.readouterr().out
    assert "3x64x96, any batch size: china.jpg of scikit-learn" in out
    assert "against float64): ok" in out
    assert f"dwswap.export.load('{path}')" in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_and_no_traceback():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dwswap", "explain", "mnasnet0_5"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "dwswap: error: [Errno 28] No space left on device"
    assert "Traceback" not in done.stderr


def test_export_of_a_few_pixels(tmp_path, capsys, wide):
    """BatchNorm has no statistics of single pixels, which would blow up rounding."""
    pytest.importorskip("sklearn")
    pytest.importorskip("torchvision")
    arguments = ["-o", str(tmp_path / "m.pt2"), "--size", "32", "--device", "cpu"]
    assert main(["export", "mobilenet_v2", *arguments, "--format", "aten"]) == 0
    error = re.search(r"error: +(\S+), .*against float64\): ok", capsys.readouterr().out)
    assert error is not None
    assert float(error[1]) < 1e-3


def test_export_to_what_cannot_be_written(own, tmp_path, capsys, wide, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_command, "save", full)
    path = str(tmp_path / "m.pt2")
    assert main(["export", f"{own}:model", "-o", path, "--size", "1x6x8x8"]) == 2
    assert f"cannot write {path}: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["-o", "m.bin"], 2, "path must end with .pt2"),
        (["-o", "missing/m.pt2"], 2, "missing does not"),
        (["-o", "m.pt2", "--format", "onnx"], 2, "path must end with .onnx"),
        (["-o", "m.pt2", "--device", "tpu"], 2, "--device must be cpu or cuda"),
        (["-o", "m.pt2", "--weights", "none.pth"], 2, "cannot load the weights of none.pth"),
        (["-o", "m.pt2", "--size", "20x30"], 2, "--size 1x3x20x30: example_inputs must be"),
        (["-o", "m.pt2", "--size", "5x6x20x30"], 2, "--size must start with a batch of 1"),
        (["-o", "m.pt2", "--size", "5x6x20x30", "--batch", "3"], 2, "or of 3, that of --batch"),
    ],
)
def test_export_errors(own, capsys, wide, arguments, status, text):
    """A file that cannot be written shows before the model is made."""
    size = [] if "--size" in arguments else ["--size", "1x6x20x30"]
    assert main(["export", f"{own}:model", *arguments, *size]) == status
    out, err = capsys.readouterr()
    assert text in err
    assert "Traceback" not in err
    assert ("model" in out) == ("example_inputs" in text)


def test_input_that_a_graph_does_not_take_is_one_error(tmp_path, capsys):
    """torch.fx prints where a graph fails, and all of the way there."""
    pytest.importorskip("torchvision")
    arguments = ["export", "mobilenet_v2", "-o", str(tmp_path / "m.pt2"), "--device", "cpu"]
    assert main([*arguments, "--size", "1x4x32x32"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dwswap: error: --size 1x4x32x32: example_inputs must be")
    assert "Traceback" not in error


def test_a_terminated_export_leaves_nothing(own, tmp_path):
    code = """
import sys, time
from dwswap import cli, export
def slow(program, partial):
    partial.write_text("half a file")
    print("writing", file=sys.stderr, flush=True)
    time.sleep(60)
export._WRITERS["pt2"] = slow
sys.exit(cli.main(sys.argv[1:]))
"""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", code, "export", f"{own}:model", "-o", "out/m.pt2"]
    command += ["--size", "1x6x8x8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "writing\n" in iter(process.stderr.readline, "")
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / "out").iterdir()) == []


def test_export_hints_at_a_fixed_batch_where_it_helps(own, capsys, wide):
    for name, status, helps in (("fixed_batch", 1, True), ("refusing", 2, False)):
        assert main(["export", f"{own}:{name}", "-o", "m.pt2", "--size", "1x6x20x30"]) == status
        assert ("--batch N" in capsys.readouterr().err) == helps


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xca\xfejunk", "w.pt: torch.save did not write it, or it is damaged"),
        (b"text", "w.pt: torch.save did not write it, or it is damaged"),
        (b"", "w.pt: torch.save did not write it, or it is damaged"),
        (
            nn.Conv2d(3, 4, 1),
            "a pickled object (torch.nn.modules.conv.Conv2d), which is not loaded",
        ),
        (3, "it must hold a state_dict, got int"),
        (
            {"state_dict": {"weight": torch.ones(2), "1.bias": torch.ones(1)}},
            "it is not of this Sequential: 2 keys missing (0.weight, ...), "
            "2 unexpected (weight, ...)",
        ),
        (
            {"0.weight": torch.ones(2), "0.bias": torch.ones(6)},
            "Sequential: 1 of another shape (0.weight: [2] where the model has [6, 1, 3, 3])",
        ),
        ({"module.0.weight": torch.ones(6)}, "whose keys start with 'module.'"),
    ],
)
def test_weights_that_are_not_the_models(own, tmp_path, capsys, wide, content, text):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    arguments = ["-o", "m.pt2", "--size", "1x6x8x8", "--weights", str(path)]
    assert main(["export", f"{own}:model", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_export_says_where_the_outputs_differ(own, tmp_path, capsys, wide, monkeypatch):
    other = nn.Conv2d(6, 6, 3).eval()
    monkeypatch.setattr(export_command, "load", lambda path: other)
    arguments = ["-o", str(tmp_path / "m.pt2"), "--size", "1x6x20x30", "--device", "cpu"]
    assert main(["export", f"{own}:model", *arguments]) == 1
    assert "FAILED, too large" in capsys.readouterr().out


# demo


def test_demo(tmp_path, capsys, wide):
    pytest.importorskip("torchvision")
    pytest.importorskip("PIL")
    arguments = ["--model", "shufflenet_v2_x0_5", "--device", "cpu", "--batch", "1"]
    assert main(["demo", *arguments, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "random weights" in out
    assert "needs an NVIDIA GPU" in out
    assert "channels_last" in out
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["kind"] == "demo"
    assert saved["report"]["verification"]["passed"]
    assert {(row["layout"], row["batch"]) for row in saved["timings"]} == {
        ("NCHW", 1),
        ("channels_last", 1),
    }
    assert all(row["passed"] and row["optimized"]["microseconds"] > 0 for row in saved["timings"])
    assert os.listdir(tmp_path / "out") == ["report.json"]


@pytest.mark.slow
def test_demo_own_image_and_weights(tmp_path, capsys, wide):
    torchvision = pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (300, 200), (200, 30, 30)).save(tmp_path / "red.png")
    model = torchvision.models.shufflenet_v2_x0_5(weights=None)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
    arguments = ["--model", "shufflenet_v2_x0_5", "--device", "cpu", "--batch", "1"]
    arguments += ["--image", str(tmp_path / "red.png"), "--weights", str(tmp_path / "weights.pt")]
    assert main(["demo", *arguments, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "red.png, 300 x 200" in out
    assert "weights of weights.pt" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "mobilnet_v2"], "Did you mean mobilenet_v2"),
        (["--model", "ssdlite320_mobilenet_v3_large"], "must be a torchvision classification"),
        (["--image", "no-such-file.jpg"], "cannot read the photograph"),
        (["--image", __file__], "cannot read the photograph"),
        (["--weights", "no-such-file.pt"], "cannot load the weights"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--device", "cuda:99"], "CUDA GPUs"),
        (["--output", __file__], "cannot make the output folder"),
        (["--output", __file__ + "/out"], "cannot make the output folder"),
    ],
)
def test_demo_refuses(arguments, expected, tmp_path, capsys, wide):
    pytest.importorskip("torchvision")
    output = [] if "--output" in arguments else ["--output", str(tmp_path)]
    assert main(["demo", *arguments, *output]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert "Traceback" not in err


def test_demo_weights_of_another_model(tmp_path, capsys, wide):
    pytest.importorskip("torchvision")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    arguments = ["--weights", str(tmp_path / "weights.pt"), "--output", str(tmp_path)]
    assert main(["demo", *arguments]) == 2
    assert "cannot load the weights" in capsys.readouterr().err


@pytest.mark.parametrize("batch", ["0", "-1", "many"])
def test_demo_refuses_batch(batch, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--batch", batch])
    assert exit.value.code == 2
    assert "--batch" in capsys.readouterr().err


def raising(error):
    def raise_it(*args, **options):
        raise error

    return raise_it


def absent(package):
    return raising(ModuleNotFoundError(f"No module named {package!r}", name=package))
