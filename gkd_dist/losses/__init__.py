"""Losses for distilling graph neural networks; torch alone is needed to use them.

`edge_scores`, `lsp_loss`, `kd_loss` and `fitnet_loss` are plain functions for anyone's own loop; `Objective` is what
the trainer runs: configured terms as sums and counts over batches.
"""

from gkd_dist.losses.fitnet import fitnet_loss
from gkd_dist.losses.kd import kd_loss
from gkd_dist.losses.lsp import lsp_loss
from gkd_dist.losses.neighbours import Neighbours, union_edges
from gkd_dist.losses.objective import Objective
from gkd_dist.losses.scores import edge_scores

__all__ = ["Neighbours", "Objective", "edge_scores", "fitnet_loss", "kd_loss", "lsp_loss", "union_edges"]
