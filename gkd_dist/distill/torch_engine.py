"""Plain torch engine for one process: teacher training, and the reference for the other one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gkd_dist.config import TrainConfig
from gkd_dist.distill.module import as_student, call_module
from gkd_dist.distill.optimizer import build_optimizer, set_lr
from gkd_dist.graph import Batch
from gkd_dist.losses.terms import Output


class TorchEngine:
    """Model and optimizer of a world of one, in fp32."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.module = as_student(model, config.checkpoint_layers).to(device)
        self._clip = config.grad_clip
        self._optimizer = build_optimizer((parameter for _, parameter in self.module.named_trained()), config)
        self.grad_norm: float | None = None

    def forward(self, batch: Batch, outputs: Sequence[Output]) -> tuple[Tensor, dict[Output, Tensor]]:
        """Logits and further outputs in fp32."""
        return call_module(self.module, batch, outputs, torch.float32)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of ``loss``."""
        loss.backward()

    def step(self) -> None:
        """Clips, updates, clears."""
        limit = float("inf") if self._clip is None else self._clip
        self.grad_norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit, foreach=False))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        set_lr(self._optimizer, lr)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of the module."""
        self.module.train(mode)

    def model_state(self) -> dict[str, Tensor]:
        """Weights and buffers by name, fp32 copies on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.module.model.state_dict().items()}

    def head_state(self) -> dict[str, Tensor]:
        """Weights of projection heads by name, copies on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.module.head_state().items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """State tensors as ``<parameter>/<key>``, copies on the CPU."""
        out = {}
        for name, parameter in self.module.named_trained():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if value is not None:
                    out[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().clone()
        return out

    def load_optimizer_state(self, state: dict[str, Tensor], empty: Batch | None = None) -> None:
        """Restores what `optimizer_state` gave."""
        for name, parameter in self.module.named_trained():
            values = {key.rpartition("/")[2]: v for key, v in state.items() if key.rpartition("/")[0] == name}
            for key, value in values.items():
                device = "cpu" if key == "step" else parameter.device
                self._optimizer.state[parameter][key] = value.to(device, copy=True)

    def load_masters(self, state: dict[str, Tensor]) -> None:
        """Nothing: weights are fp32 here."""

    def close(self) -> None:
        """Nothing to release."""
