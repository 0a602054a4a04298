"""How strongly each term pulls: norms of gradients with respect to what the losses read.

The gradient is taken with respect to the outputs of the student (logits, layers), not to its
parameters: it ends before the model, so that it works alike under every ZeRO stage, and squares
add up over units and ranks, so that it does not depend on who does the work. A label term is
measured where it reads the logits, a structure term where it reads its layer.

Shapes: ``k`` terms.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gkd_dist.graph import Batch
from gkd_dist.losses.objective import Objective
from gkd_dist.losses.terms import Output


def measures_gradients(epoch: int, step_in_epoch: int) -> bool:
    """First step of epochs 0, 1, 2, 4, 8, …: costs the losses a second time there."""
    return step_in_epoch == 0 and epoch & (epoch - 1) == 0


def gradient_squares(
    objective: Objective, batch: Batch, logits: Tensor, layers: Mapping[Output, Tensor], epoch: int
) -> Tensor:
    """Squared norm of the gradient of each term's sum with respect to ``logits`` and ``layers``: float64 [k].

    Computed apart from the graph of the training step, which stays as it is.
    """
    leaf, leaves = logits.detach().requires_grad_(), {name: z.detach().requires_grad_() for name, z in layers.items()}
    sums = objective.sums(batch, leaf, leaves, epoch)
    squares = torch.zeros(len(sums), dtype=torch.float64)
    for index, weight in enumerate(objective.weights(epoch).tolist()):
        if weight > 0:
            grads = torch.autograd.grad(sums[index], [leaf, *leaves.values()], retain_graph=True, allow_unused=True)
            squares[index] = sum(float(grad.double().square().sum()) for grad in grads if grad is not None)
    return squares
