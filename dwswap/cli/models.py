"""Models by name: torchvision's, timm's, or a callable of the user's own package."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dwswap.checkpoint import load_weights
from dwswap.cli.common import CliError, missing_extra

__all__ = ["construct", "find", "load_checkpoint"]


def find(name: str) -> Callable[[], nn.Module]:
    """Return what constructs the model called ``name``, with random weights and no download.

    Args:
        name: ``package.module:callable``, or a name that torchvision or timm (asked in this order)
            knows; the prefix ``torchvision/`` or ``timm/`` asks one of them only. One of timm may
            end with the tag of its weights.

    Raises:
        CliError: nothing has this name (with close matches), or the library is not installed.
    """
    if ":" in name:
        return _own(name)
    prefix, _, bare = name.rpartition("/")
    if prefix and prefix not in LOOKUPS:
        raise CliError(f"unknown library {prefix!r} in {name!r}: choose from {', '.join(LOOKUPS)}")
    known: set[str] = set()
    absent: list[str] = []
    for library in [prefix] if prefix else LOOKUPS:
        try:
            builder, names = LOOKUPS[library](bare)
        except ModuleNotFoundError as error:
            if error.name != library:
                raise
            absent.append(library)
            continue
        if builder is not None:
            return builder
        known.update(names)
    if "torchvision" in absent:
        missing_extra("torchvision", "bench", f"the model {name!r}")
    if prefix in absent:
        raise CliError(f"the model {name!r} needs the package timm: pip install timm")
    searched = " and ".join(library for library in LOOKUPS if library not in absent)
    raise CliError(
        f"unknown model {name!r} (searched {prefix or searched})."
        f"{_suggest(bare, known)} A model of your own is named package.module:callable."
    )


def construct(builder: Callable[[], nn.Module], name: str, *, meta: bool) -> nn.Module:
    """Build a model.

    Args:
        builder: what ``find`` returned for ``name``.
        name: for the messages.
        meta: on the meta device, where it takes no time or memory. A constructor that cannot run
            there, because it computes with tensor values, runs on the CPU after all.

    Raises:
        CliError: the callable fails, or returns something that is no module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _on_meta(builder) if meta else None
        if model is None:
            try:
                model = builder()
            except Exception as error:
                raise CliError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise CliError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Load the file of ``--weights`` into ``model``.

    Raises:
        CliError: it cannot be read, holds no weights, or not those of the model.
    """
    try:
        load_weights(model, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CliError(f"cannot load the weights of {path}: {reason}") from error


def _on_meta(builder: Callable[[], nn.Module]) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return builder()
    except Exception:
        # Whatever it is, the CPU tells whether it is an error of the constructor.
        return None


def _torchvision(name: str) -> tuple[Callable[[], nn.Module] | None, Iterable[str]]:
    from torchvision import models

    names = models.list_models()
    if name not in names:
        return None, names
    builder = models.get_model_builder(name)
    options = ["weights"]
    if "weights_backbone" in inspect.signature(builder).parameters:
        options.append("weights_backbone")
    return lambda: builder(**dict.fromkeys(options)), names


def _timm(name: str) -> tuple[Callable[[], nn.Module] | None, Iterable[str]]:
    import timm

    names = timm.list_models()
    if name.partition(".")[0] not in names:  # behind the dot: which weights
        return None, names
    return lambda: timm.create_model(name, pretrained=False), names


LOOKUPS = {"torchvision": _torchvision, "timm": _timm}


def _own(name: str) -> Callable[[], nn.Module]:
    module_name, _, attribute = name.partition(":")
    # A console script does not look into the working directory, where the user's module lies.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value = importlib.import_module(module_name)
    except Exception as error:
        raise CliError(
            f"cannot import {module_name!r} for {name!r}: {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise CliError(f"{module_name!r} has no {attribute!r}.{_suggest(part, dir(value))}")
        value = getattr(value, part)
    if isinstance(value, nn.Module):
        return lambda: value
    if not callable(value):
        raise CliError(f"{name} must be callable or a torch.nn.Module, got {type(value).__name__}")
    return value


def _suggest(name: str, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close += [other for other in names if name and name in other and other not in close]
    return f" Did you mean {', '.join(close[:4])}?" if close else ""
