"""Random weights that behave like trained ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["randomize"]


def randomize(model: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Give a model without trained weights normalization layers as trained ones have them.

    At initialization BatchNorm is the identity in eval mode, and what a picture changes fades from
    layer to layer. Here each gets a random scale and shift, and the statistics of ``images``. The
    layer scales of ConvNeXt, which start at 1e-6 and hide every block, get scales of order 1.

    Args:
        model: changed in place, and left in eval mode.
        images: ``(N, 3, H, W)``, at least two.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for norm in norms:
            norm.momentum = 1.0
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0.0, 0.2)
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.uniform_(0.1, 0.5)
        model.train()
        model(images)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
