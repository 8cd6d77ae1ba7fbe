"""Optimize a model, export it, and let a fresh process run a batch of real pictures with the file.

    python examples/export_and_serve.py --format aoti

The pictures are crops of the photograph that ``dwswap demo`` takes. The fresh process has nothing
of the model but the file. Its outputs are compared with those of the original. The first picture is
saved as a PPM, for the C++ example in ``examples/cpp``, which must print the same five classes.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torchvision.transforms import RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms import functional as T

import dwswap
from dwswap import demo
from dwswap.checkpoint import load_weights
from dwswap.comparison import compare
from dwswap.export import FORMATS
from dwswap.precision import float32_convolutions

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def pictures(preset: Any, count: int, path: str | None) -> Tensor:
    """The middle of the photograph, and random crops of it: ``(count, 3, S, S)``, uint8."""
    photograph, _ = demo.photograph(path)
    side = preset.crop_size[0]
    whole = T.resize(photograph, preset.resize_size, preset.interpolation)
    torch.manual_seed(0)
    crop, flip = RandomResizedCrop(side), RandomHorizontalFlip()
    images = [T.center_crop(whole, [side, side])]
    images += [flip(crop(photograph)) for _ in range(count - 1)]
    return torch.stack([T.pil_to_tensor(image) for image in images])


def save_ppm(path: Path, picture: Tensor) -> None:
    """Write ``(3, H, W)``, uint8."""
    height, width = picture.shape[1:]
    header = f"P6\n{width} {height}\n255\n".encode()
    path.write_bytes(header + picture.permute(1, 2, 0).numpy().tobytes())


def top5(logits: Tensor) -> str:
    """Class and probability, a line each, as the C++ example prints them."""
    found = logits.float().softmax(0).topk(5)
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return "\n".join(f"{index} {value:.4f}" for index, value in pairs)


def serve(model_file: Path, inputs_file: Path, outputs_file: Path, device: str) -> None:
    """What the fresh process does: load, run, save the outputs; then the first picture alone."""
    start = time.perf_counter()
    model = dwswap.export.load(model_file)
    loaded = time.perf_counter()
    images = torch.from_numpy(np.load(inputs_file)).to(device)
    with torch.inference_mode(), float32_convolutions():
        outputs = model(images).cpu()
        done = time.perf_counter()
        first = model(images[:1]).cpu()
    np.save(outputs_file, outputs.numpy())
    print(f"loaded in {loaded - start:.2f} s, first batch after another {done - loaded:.2f} s")
    print("classes of the first picture:", top5(first[0]), sep="\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a model and run it in a fresh process.")
    parser.add_argument(
        "--model", default="mobilenet_v2", help="a torchvision classification model"
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (default: random weights)")
    parser.add_argument("--image", metavar="FILE", help="photograph (default: scikit-learn's)")
    parser.add_argument("--format", choices=FORMATS, default="aoti")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=int, default=8)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=devices, default=devices[-1])
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path("dwswap-export"))
    parser.add_argument("--serve", action="store_true", help="be the fresh process")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    return args


def build_model(args: argparse.Namespace, images: Tensor) -> nn.Module:
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(args.model, weights=None).eval()
    if args.weights is None:
        demo.randomize(model, demo.views(images[0], 4))
    else:
        load_weights(model, args.weights)
    return model.to(args.device, DTYPES[args.dtype])


def main() -> int:
    args = arguments()
    model_file = args.output / ("model.onnx" if args.format == "onnx" else "model.pt2")
    inputs_file, outputs_file = args.output / "inputs.npy", args.output / "outputs.npy"
    if args.serve:
        serve(model_file, inputs_file, outputs_file, args.device)
        return 0

    console = Console(highlight=False)
    args.output.mkdir(parents=True, exist_ok=True)
    preset: Any = demo.preprocessing(args.model)[0]
    raw = pictures(preset, args.batch, args.image)
    save_ppm(args.output / "picture.ppm", raw[0])
    images = T.normalize(raw.float() / 255, preset.mean, preset.std)
    model = build_model(args, images)
    images = images.to(args.device, DTYPES[args.dtype])

    with console.status(f"optimizing and exporting {args.model} as {args.format}"):
        start = time.perf_counter()
        fast = dwswap.optimize(model)
        dwswap.export.save(fast, model_file, images[:1], format=args.format, dynamic_batch=True)
        seconds = time.perf_counter() - start
    console.print(dwswap.report(fast).summary(), markup=False, soft_wrap=True)
    size = model_file.stat().st_size / 1e6
    console.print(f"{model_file}: {size:.1f} MB after {seconds:.1f} s", markup=False)

    np.save(inputs_file, images.cpu().numpy())
    command = [sys.executable, __file__, *sys.argv[1:], "--serve"]
    served = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    ours = torch.from_numpy(np.load(outputs_file))

    with torch.no_grad(), float32_convolutions():
        theirs = model(images).cpu()
        exact = copy.deepcopy(model).double()(images.double()).cpu()
    errors = compare(ours, theirs, exact)
    agree = int((ours.argmax(1) == theirs.argmax(1)).sum())
    console.print(
        f"error {errors.ours:.2e}, of the original {errors.pytorch:.2e} (against float64); "
        f"the same class for {agree} of {args.batch} pictures",
        soft_wrap=True,
    )
    print(served.stdout, end="")
    if not errors.passed:
        console.print(f"FAILED: the error must be at most {errors.limit:.2e}", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
