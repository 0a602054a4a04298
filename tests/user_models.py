"""What users hand over as ``module:attr``: models that fit, and some that do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gkd_dist.graph import LocalGraph
from gkd_dist.models.convs import SAGE


class Plain(nn.Module):
    """Mean over in-neighbours, weighted where there are weights; knows nothing of layers."""

    def __init__(self, in_channels: int, out_channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.lin = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """[n, in_channels] to [n, out_channels]."""
        weight = torch.ones(edge_index.size(1)) if edge_weight is None else edge_weight
        h = self.lin(x) * self.scale
        return h + torch.zeros_like(h).index_add(0, edge_index[1], weight.unsqueeze(1) * h[edge_index[0]])


class Stumbling(Plain):
    """Runs wherever it is tried out, and not where it is trained."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """An error of the program in the middle of training."""
        if self.training and torch.is_grad_enabled() and x.size(0) > 50:
            raise TypeError("can only concatenate list to list")
        return super().forward(x, edge_index, edge_weight)


class Layered(nn.Module):
    """Two SAGE layers with a tanh between them, by the layer protocol."""

    num_layers = 2

    def __init__(self, in_channels: int, out_channels: int, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = SAGE(in_channels, width), SAGE(width, out_channels)

    def forward_layer(self, layer: int, h: Tensor, graph: LocalGraph) -> Tensor:
        """``z_l``."""
        out: Tensor = (self.first, self.second)[layer - 1](h, graph)
        return out

    def activate(self, layer: int, z: Tensor) -> Tensor:
        """``h_l``; the input stays as it is."""
        return z if layer == 0 else z.tanh()


class PartlyFrozen(Layered):
    """The first layer stays as it is: an encoder that was trained before, say."""

    def __init__(self, in_channels: int, out_channels: int, width: int = 4) -> None:
        super().__init__(in_channels, out_channels, width)
        self.first.requires_grad_(False)


def linear_function(in_channels: int, out_channels: int) -> Tensor:
    """Gives a matrix where a module is due."""
    return torch.zeros(in_channels, out_channels)


class Greedy(Plain):
    """Asks for the largest feature there is, also where there is none."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """[n, in_channels] to [n, out_channels]."""
        if x.numel() == 0:
            x.max()
        return super().forward(x, edge_index, edge_weight)
