"""The precision that losses are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """fp64 as it is, everything else in fp32: exponentials and sums of halves are too coarse."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
