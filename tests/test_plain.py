"""Which calls are plain."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dwswap.plain import is_plain, is_plain_but_for_autocast, is_watched


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("context", "plain"),
    [
        (contextlib.nullcontext, True),
        # Of torch.set_default_device too.
        (lambda: torch.device("cpu"), True),
        (Functions, False),
        (Dispatch, False),
    ],
)
def test_modes_that_see_calls(context: Any, plain: bool) -> None:
    x = torch.rand(1, 8, 4, 4)
    with context():
        assert is_plain(x, x, None, None) is plain
        assert is_plain_but_for_autocast(x, x, None, x) is plain
        assert is_watched() is not plain
        with torch.device("cpu"):
            assert is_plain(x, x, None, None) is plain


def test_autocast_is_no_plain_call() -> None:
    x = torch.rand(1, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(x, x, None, None)
        assert is_plain_but_for_autocast(x, x, None, None)


def test_traces_are_no_plain_calls() -> None:
    found: list[bool] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        found.append(is_plain(x, x, None, None))
        return x + 1

    make_fx(call)(torch.rand(2))
    torch.func.vmap(call)(torch.rand(2, 3))
    assert found == [False, False]
