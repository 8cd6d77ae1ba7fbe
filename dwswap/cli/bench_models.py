"""``dwswap bench models``: whole models, next to PyTorch's ways to run them or to train them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from dwswap.bench.layers import DTYPES, LAYOUTS
from dwswap.bench.model_cases import (
    ACCEPTED,
    BATCHES,
    SIZE,
    TRAINED,
    Case,
    choose,
    classifiers,
    defaults,
    depthwise_models,
    product,
    training_cases,
)
from dwswap.bench.model_peers import EAGER, OURS, RUNNERS, chosen_peers
from dwswap.bench.model_plot import plot
from dwswap.bench.model_record import ModelRecord
from dwswap.bench.model_results import ModelResult
from dwswap.bench.model_summary import case_rows, profile_rows, speedup_rows
from dwswap.bench.models import ModelBench
from dwswap.bench.run_record import switches
from dwswap.bench.tables import Cells
from dwswap.bench.training import TrainingBench
from dwswap.bench.training_record import TrainingRecord, training_rows
from dwswap.bench.training_results import TRAINING_PEERS, training_peers
from dwswap.cli.bench_common import (
    add_run_options,
    bench_device,
    device_name,
    introduce,
    print_table,
    record_file,
    run_saved,
    save_picture,
    say,
    start_or_resume,
)
from dwswap.cli.common import CliError, batch_size, console, pixels, positive
from dwswap.cli.models import construct, find
from dwswap.precision import precision

__all__ = ["add_parser"]

SETS = ("auto", "all", "eager", "none")
TEXTS = ("run by", "note", "kernels", "largest", "model", "dtype", "layout")


@dataclass(frozen=True)
class Kind:
    """What is measured of a model: forwards or steps of training.

    Attributes:
        call: what one measurement is of.
        models: what ``--models all`` means.
        title: of the table of all cases, ``rows``.
        budget: seconds of samples per measurement, unless told otherwise.
    """

    call: str
    record: type[ModelRecord]
    bench: type[ModelBench]
    models: Callable[[], list[str]]
    title: str
    rows: Callable[[Sequence[ModelResult]], Cells]
    budget: float


FORWARD = Kind(
    "a forward",
    ModelRecord,
    ModelBench,
    depthwise_models,
    "Times faster than each peer, without / with cuda_graph",
    speedup_rows,
    budget=0.2,
)
TRAINING = Kind(
    "a step",
    TrainingRecord,
    TrainingBench,
    classifiers,
    "Training: times faster than each peer, if run as that is",
    training_rows,
    # A step takes 20 to 80 ms, which vary with what else the host does.
    budget=1.0,
)


def add_parser(targets: Any) -> None:
    """Add the command to the subparsers ``targets``."""
    peers = [name for name in RUNNERS if name not in OURS]
    parser = targets.add_parser(
        "models",
        help="whole models, next to eager PyTorch, CUDA graphs, fx fusion and torch.compile",
        description="Time forwards of models with random weights, ours in turns with each peer: "
        "speed-ups, images per second, the time to optimize and to compile, peak memory, errors "
        "against float64. Saves a record (JSON) and a picture (PNG). Without --models, --dtype and "
        f"--layout: {', '.join(ACCEPTED)} in float16 channels_last, and mobilenet_v2 in float32 "
        "NCHW. Exit code 1 where ours fails or is less accurate than the rule allows. With --train "
        "steps of training (forward under autocast, loss, backward, GradScaler, SGD), by default "
        f"of {' and '.join(TRAINED)} in float16 and bfloat16, both layouts.",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="time steps of training, ours and PyTorch's in the same layout, each eager, in a CUDA "
        "graph, and compiled",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="names of torchvision or timm, package.module:callable, or all: torchvision's 38 with "
        "depthwise convolutions, against eager only unless --peers says otherwise",
    )
    parser.add_argument(
        "--batch",
        type=batch_size,
        nargs="+",
        metavar="N",
        help="default: 1, 32 and 256 on a GPU, 1 on the CPU; to train "
        f"{', '.join(f'{n} for {model}' for model, n in TRAINED.items())}, 2 on the CPU",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: see above")
    parser.add_argument(
        "--layout", nargs="+", choices=LAYOUTS, help="of the user's model; default: see above"
    )
    parser.add_argument(
        "--size", type=pixels, default=SIZE, metavar="PIXELS", help="default: %(default)s"
    )
    parser.add_argument(
        "--select",
        metavar="PATTERN",
        help="only the cases whose name, or a part of it, fits a shell pattern: 'v3_large-n1-', "
        "'n256-*-channels_last'",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=[*SETS, *peers],
        metavar="PEER",
        help=f"{', '.join(peers)}; all: these without max_autotune; eager: {' and '.join(EAGER)}; "
        "auto (default): one mode of torch.compile per batch size, as compiling takes most of the "
        f"time; none. With --train: {', '.join(TRAINING_PEERS)}, auto (default, all of them), none",
    )
    parser.add_argument(
        "--max-autotune", action="store_true", help="add max_autotune: minutes per case"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="time per kernel family of ours, by torch.profiler; it stays loaded and may slow the "
        "launches of later cases, so best with --peers none",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="SECONDS",
        help="begin no case that would probably end after so long; --resume goes on",
    )
    budgets = f"default: {FORWARD.budget:g}, with --train {TRAINING.budget:g}"
    each = f"{budgets}; a peer costs three, and up to a minute where it compiles"
    add_run_options(parser, budget=None, measurements=each)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, save, print; 0, or 1 where ours failed."""
    start = time.monotonic()
    out = console()
    device = bench_device(args.device)
    cuda = device.type == "cuda"
    kind = TRAINING if args.train else FORWARD
    if args.budget is None:
        args.budget = kind.budget
    cases = _cases(args, kind, cuda=cuda)
    asked = args.peers or (["eager"] if args.models and "all" in args.models else ["auto"])
    if args.train:
        _check_training(args, asked)
    name = device_name(device)
    parts = (args.models, args.batch, args.dtype, args.layout, args.select, args.peers)
    whole = cuda and not switches() and not any(parts) and args.size == SIZE
    record = kind.record(
        record_file(args.output, kind.record.kind, name, "", whole=whole),
        device=name,
        settings={
            "cases": [str(case) for case in cases],
            "peers": asked,
            "max_autotune": args.max_autotune,
            "profile": args.profile,
            "budget": args.budget,
            "float32": precision(),
            "reduced": not cuda,
        },
    )
    start_or_resume(record, args.resume)
    introduce(out, f"{len(cases)} cases, peers: {', '.join(asked)}", name)
    try:
        _measure(out, args, kind, record, cases, asked, start)
        complete = not record.left(cases)
        saved = [record.path if complete else record.partial]
        if complete and any(
            result.best_speedup(p) for result in record.results for p in result.runners
        ):
            picture = record.path.with_suffix(".png")
            title = f"dwswap on {name}"
            saved += save_picture(out, lambda: plot(record.results, picture, title))
    except OSError as error:
        raise CliError(f"cannot write the results: {error}") from error
    print_table(out, kind.title, kind.rows(record.results), TEXTS)
    say(out, f"saved: {', '.join(map(str, saved))}")
    return _verdict(out, record.results)


def _check_training(args: argparse.Namespace, asked: Sequence[str]) -> None:
    """Refuse what a step of training does not have.

    Raises:
        CliError: ``--max-autotune``, or peers of forwards only.
    """
    if args.max_autotune:
        raise CliError("--max-autotune: is of forwards, not of steps of training (--train)")
    try:
        training_peers(asked, cuda=True)
    except ValueError as error:
        raise CliError(f"--peers: {error}") from error


def _cases(args: argparse.Namespace, kind: Kind, *, cuda: bool) -> list[Case]:
    """What was asked for; each model is looked up, so that a wrong name costs no time.

    Raises:
        CliError: an unknown model, or no case fits ``--select``.
    """
    batches = args.batch or (BATCHES if cuda else [1])
    models = [
        name
        for word in args.models or (TRAINED if args.train else ACCEPTED)
        for name in (kind.models() if word == "all" else [word])
    ]
    if args.train:
        # BatchNorm in train mode takes two images at least.
        batches = args.batch or ([] if cuda else [2])
        dtypes, layouts = args.dtype or ["float16", "bfloat16"], args.layout or LAYOUTS
        cases = training_cases(models, batches, dtypes, list(layouts), args.size)
    elif args.models or args.dtype or args.layout:
        dtypes, layouts = args.dtype or ["float16"], args.layout or ["channels_last"]
        cases = product(models, batches, dtypes, layouts, args.size)
    else:
        cases = defaults(batches, args.size)
    if args.select is not None:
        try:
            cases = choose(cases, args.select)
        except ValueError as error:
            raise CliError(f"--select: {error}") from error
    for model in dict.fromkeys(case.model for case in cases):
        find(model)
    return cases


def _measure(
    out: Console,
    args: argparse.Namespace,
    kind: Kind,
    record: ModelRecord,
    cases: list[Case],
    asked: list[str],
    start: float,
) -> None:
    """Fill ``record``, with a progress bar; what is done is saved however this ends."""
    device = bench_device(args.device)

    def peers(case: Case) -> list[str]:
        cuda = device.type == "cuda"
        if args.train:
            return training_peers(asked, cuda=cuda)
        return chosen_peers(asked, case.batch, cuda=cuda, max_autotune=args.max_autotune)

    left = record.left(cases)
    longest = 0.0
    with run_saved(out, record, cases) as progress:
        task = progress.add_task("", total=len(cases), completed=len(cases) - len(left))
        bench = kind.bench(
            device,
            lambda name: construct(find(name), name, meta=False),
            budget=args.budget,
            profiled=args.profile,
            step=lambda text: progress.update(task, description=f"{text:<60}"),
        )
        for case in left:
            begun = time.monotonic()
            if args.limit is not None and begun - start + longest > args.limit:
                break
            result = bench.measure(case, peers(case))
            longest = max(longest, time.monotonic() - begun)
            record.add(result)
            progress.update(task, advance=1)
            _print(progress.console, kind, result)


def _print(out: Console, kind: Kind, result: ModelResult) -> None:
    print_table(out, str(result.case), case_rows(result), TEXTS)
    if result.summary:
        say(out, result.summary)
    print_table(out, f"{result.case}: kernels of {kind.call}", profile_rows(result), TEXTS)
    if result.problem is not None:
        say(out, f"FAILED {result.case}: {result.problem}")


def _verdict(out: Console, results: list[ModelResult]) -> int:
    failed = [str(result.case) for result in results if not result.passed]
    if failed or not results:
        text = f"FAILED: {', '.join(failed)}" if failed else "FAILED: nothing was measured"
        out.print(text, style="bold red", soft_wrap=True, markup=False)
    return 1 if failed or not results else 0
