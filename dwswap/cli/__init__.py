"""The ``dwswap`` command: one file per subcommand; here the parser and the error handling."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

import dwswap
from dwswap.cli import bench, build, demo, doctor, explain, export
from dwswap.cli.common import CliError, failed

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments, without the program's name (default: those of the process).

    Returns:
        0 on success, 1 where something that was asked for failed, 2 where the request was wrong.
    """
    args = _parser().parse_args(argv)
    try:
        with _terminable():
            return int(args.run(args))
    except CliError as error:
        return failed(error, status=2)
    except BrokenPipeError:  # the reader of a pipe (head, less) has left
        _discard_output()
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _discard_output()
        return failed(error)
    except KeyboardInterrupt:
        return 130


def _discard_output() -> None:
    """Send what is still buffered nowhere, or the interpreter complains when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does: what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dwswap",
        description="Fast depthwise convolutions for PyTorch models on NVIDIA GPUs.",
    )
    parser.add_argument("--version", action="version", version=f"dwswap {dwswap.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, explain, export, doctor, build, bench):
        command.add_parser(commands)
    return parser
