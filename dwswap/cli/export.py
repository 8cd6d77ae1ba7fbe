"""``dwswap export MODEL -o FILE``: optimize a model, save it, and compare what was saved."""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dwswap
from dwswap import build, demo
from dwswap.cli.common import (
    CliError,
    batch_size,
    chosen_device,
    console,
    device_text,
    failed,
    input_shape,
    say,
)
from dwswap.cli.models import construct, find, load_checkpoint
from dwswap.comparison import compare
from dwswap.export import FORMATS, ExportError, check_target, load, save
from dwswap.precision import float32_convolutions
from dwswap.report import LayerErrors

__all__ = ["add_parser"]

SEED = 0
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
USES = {
    "pt2": "dwswap.export.load({0!r})",
    "aten": "torch.export.load({0!r}).module(), without dwswap",
    "onnx": "onnxruntime.InferenceSession({0!r})",
    "aoti": "dwswap.export.load({0!r}), or from C++ (examples/cpp)",
}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "export",
        help="optimize a model and save it: for torch.export, ONNX or AOTInductor",
        description="Optimize a model, save it to a file, load that and compare it with the "
        "original. Nothing is downloaded: weights are random unless given.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="name of a torchvision or timm model (timm/NAME asks timm only), "
        "or package.module:callable",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="ends with .onnx, else with .pt2"
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="default: onnx for a FILE with that ending, else pt2"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--batch", type=batch_size, metavar="N", help="fix the batch size (default: any size)"
    )
    parser.add_argument(
        "--size",
        type=input_shape,
        help="of the input: 224, 224x320, or a whole shape such as 1x3x16x112x112 (default: the "
        "model's own, else 224)",
    )
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (a state_dict) for the model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export; 0, or 1 where that fails or the file computes something else."""
    out = console()
    device = chosen_device(args.device)
    format = args.format or ("onnx" if args.output.endswith(".onnx") else "pt2")
    try:
        check_target(args.output, format)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise CliError(str(error)) from error
    example, picture, origin = _example(args)
    model, weights = _model(args, picture)
    say(out, "device", device_text(device))
    say(out, "model", f"{args.model}, {weights}, {args.dtype}")
    batch = "any batch size" if args.batch is None else f"batch size {args.batch}"
    say(
        out,
        "input",
        f"{'x'.join(map(str, example.shape[1:]))}, {batch}: {origin}",
    )
    if device.type == "cuda":
        # Before any other progress display: a first build shows its own.
        build.load()

    model.to(device, DTYPES[args.dtype])
    example = example.to(device, DTYPES[args.dtype])
    try:
        with out.status("optimizing"):
            fast = dwswap.optimize(model, example)  # also tries whether the model takes it
        out.print(dwswap.report(fast).summary(), markup=False, soft_wrap=True)
        start = time.perf_counter()
        with out.status(f"exporting as {format}"):
            path = save(fast, args.output, example, format=format, dynamic_batch=args.batch is None)
    except ExportError as error:
        # PyTorch names the dimension that the model fixes.
        fixed = args.batch is None and "(batch)" in str(error)
        hint = " (--batch N exports for one batch size)" if fixed else ""
        return failed(f"{error}{hint}")
    except OSError as error:
        raise CliError(f"cannot write {args.output}: {error.strerror or error}") from error
    except (ModuleNotFoundError, ValueError) as error:
        shape = "x".join(map(str, (1, *example.shape[1:])))
        about_inputs = str(error).startswith("example_inputs")
        raise CliError(f"--size {shape}: {error}" if about_inputs else str(error)) from error
    size, seconds = path.stat().st_size / 1e6, time.perf_counter() - start
    say(out, "saved", f"{path}, {size:.1f} MB as {format} after {seconds:.1f} s")
    try:
        with out.status("comparing with the original"):
            errors = _errors(model, path, example)
    except ModuleNotFoundError as error:
        say(out, "error", f"not compared: {error}")
    except ExportError as error:
        return failed(error)
    else:
        verdict = "ok" if errors.passed else f"FAILED, {errors.problem or 'too large'}"
        say(
            out,
            "error",
            f"{errors.ours:.1e}, the original's own {errors.pytorch:.1e} (against float64): "
            f"{verdict}",
        )
        if not errors.passed:
            return 1
    say(out, "use", USES[format].format(str(path)))
    return 0


def _model(args: argparse.Namespace, picture: Tensor | None) -> tuple[nn.Module, str]:
    torch.manual_seed(SEED)
    model = construct(find(args.model), args.model, meta=False).eval()
    if args.weights is not None:
        load_checkpoint(model, args.weights)
        return model, f"weights of {Path(args.weights).name}"
    if ":" in args.model:
        return model, "its own weights"
    if picture is not None:
        # Else its outputs hardly depend on the input, and an error would not show.
        demo.randomize(model, demo.views(picture, 4), SEED)
    return model, f"random weights (seed {SEED}; --weights FILE loads a checkpoint)"


def _example(args: argparse.Namespace) -> tuple[Tensor, Tensor | None, str]:
    """A batch of the photograph, or of noise for what classifies no pictures; and what it is of.

    Between the two the photograph in the model's own size, for the statistics of BatchNorm: of a
    layer whose images are one pixel they would be those of next to no samples.
    """
    count = args.batch or 2
    shape = args.size or (1, 3, 224, 224)
    if shape[0] not in (1, args.batch):
        other = "" if args.batch is None else f" or of {args.batch}, that of --batch"
        raise CliError(
            f"--size must start with a batch of 1{other}, got {'x'.join(map(str, shape))}; "
            f"--batch {shape[0]} exports for this batch size alone"
        )
    try:
        transform, _ = demo.preprocessing(args.model)
        photograph, origin = demo.photograph()
    except (ModuleNotFoundError, ValueError, FileNotFoundError):
        pass  # no such model, or nothing to read pictures with
    else:
        if len(shape) == 4 and shape[1] == 3:
            picture = image = transform(photograph)
            if args.size is not None:
                size = list(shape[2:])
                image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
            return demo.views(image, count), picture, origin
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(count, *shape[1:], generator=generator), None, "random numbers"


def _errors(model: nn.Module, path: Path, example: Tensor) -> LayerErrors:
    """The worst error of all tensors that the file and the model return."""
    loaded = load(path)
    exact_model = copy.deepcopy(model).double()
    with torch.no_grad(), float32_convolutions():
        results = [loaded(example), model(example), exact_model(example.double())]
    leaves = [
        [leaf.cpu().contiguous() for leaf in pytree.tree_leaves(r) if isinstance(leaf, Tensor)]
        for r in results
    ]
    worst = None
    for ours, theirs, exact in zip(*leaves, strict=True):
        worst = compare(ours, theirs, exact).worse(worst)
    if worst is None:
        raise ExportError("the model returns no tensor, so nothing could be compared")
    return worst
