"""Files of weights, and what to say where one is not of the model."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["load_weights"]

_WRAPPER = "module."


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a ``state_dict``, or a dictionary that has one under ``state_dict`` or ``model``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no ``state_dict``, or one with other keys or shapes than the model's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of zip, pickle or torch, whatever it is
        raise ValueError(_no_weights(str(error))) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"it must hold a state_dict, got {type(state).__name__}")
    try:
        model.load_state_dict(state)
    except Exception as error:  # what models raise that load in a way of their own
        reason = _difference(model, state) or f"{type(error).__name__}: {error}"
        raise ValueError(reason) from error


def _no_weights(text: str) -> str:
    pickled = re.search(r"GLOBAL (\S+)", text)
    if pickled is not None:
        return (
            f"it holds a pickled object ({pickled[1]}), which is not loaded because that can run "
            "any code; save its weights alone: torch.save(model.state_dict(), FILE)"
        )
    if "TorchScript archive" in text:
        return (
            "it is a TorchScript archive; save its weights alone: torch.save("
            "torch.jit.load(FILE).state_dict(), FILE)"
        )
    return "torch.save did not write it, or it is damaged"


def _difference(model: nn.Module, state: Mapping[Any, Any]) -> str:
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [str(key) for key in state if key not in own]
    other = [
        f"{key}: {list(state[key].shape)} where the model has {list(value.shape)}"
        for key, value in own.items()
        if hasattr(value, "shape") and getattr(state.get(key), "shape", value.shape) != value.shape
    ]
    found = [
        f"{len(keys)} {what} ({keys[0]}{', ...' if len(keys) > 1 else ''})"
        for keys, what in (
            (missing, "keys missing"),
            (unexpected, "unexpected"),
            (other, "of another shape"),
        )
        if keys
    ]
    if not found:
        return ""
    text = f"it is not of this {type(model).__name__}: {', '.join(found)}"
    if unexpected and all(key.startswith(_WRAPPER) for key in unexpected):
        text += f"; saved by a wrapper such as DataParallel, whose keys start with {_WRAPPER!r}"
    return text
