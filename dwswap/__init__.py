"""Fast depthwise convolutions for PyTorch models: ``fast = dwswap.optimize(model)``."""

from dwswap import export
from dwswap.cuda_graphs import CudaGraphOptions
from dwswap.modules import DepthwiseConv2d
from dwswap.ops import depthwise_conv2d
from dwswap.report import report
from dwswap.restore import restore
from dwswap.rewrite import explain, optimize

__version__ = "0.1.0"

__all__ = [
    "CudaGraphOptions",
    "DepthwiseConv2d",
    "__version__",
    "depthwise_conv2d",
    "explain",
    "export",
    "optimize",
    "report",
    "restore",
]
