"""``dwswap explain MODEL``: what optimize would do with each convolution, and why."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import dwswap
from dwswap.bench.records import record
from dwswap.cli.common import CliError, console, file_path, input_shape, save_json
from dwswap.cli.models import construct, find

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "explain",
        help="what optimize would do with each convolution of a model, and why",
        description="Print the decision for each convolution of a model, and the reason. The model "
        "is built with random weights: nothing is downloaded.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="name of a torchvision or timm model (timm/NAME asks timm only), "
        "or package.module:callable",
    )
    parser.add_argument("--train", action="store_true", help="the model in train mode")
    parser.add_argument(
        "--input-size",
        type=input_shape,
        metavar="SIZE",
        help="run shapes through the model, to report those of the layers: 224, 224x320, or a "
        "whole shape such as 1x3x16x112x112",
    )
    parser.add_argument(
        "--json", type=file_path, metavar="FILE", help="also save the report as JSON"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0."""
    # An input that does not fit shows on real tensors; without one, the meta device is faster.
    model = construct(find(args.model), args.model, meta=args.input_size is None)
    model.train(args.train)
    example = None if args.input_size is None else torch.zeros(args.input_size)
    try:
        report = dwswap.explain(model, example)
    except ValueError as error:
        raise CliError(
            f"--input-size {'x'.join(map(str, args.input_size or ()))}: {error}"
        ) from error
    if args.input_size is None:
        report.kernels = "on no device"
    out = console()
    for line in report.render(out.width).splitlines():
        out.print(line.rstrip(), markup=False, soft_wrap=True)
    if args.json:
        path = save_json(args.json, record("explain", model=args.model, report=report.to_dict()))
        out.print(f"saved: {path}", markup=False)
    return 0
