"""DeepSpeed around a student: the only door to DeepSpeed.

The engine averages gradients over ranks and would divide by the accumulation steps; the caller
undoes the first and `backward` switches off the second. Every rank must call every method equally
often, with a forward on an empty batch where it has no work: without it ZeRO-2 is silently wrong
and ZeRO-3 waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from gkd_dist.config import DistillConfig
from gkd_dist.distill.module import StudentModule, as_student, call_module
from gkd_dist.distill.optimizer import build_optimizer, moment_names, set_lr
from gkd_dist.errors import ConfigError
from gkd_dist.graph import Batch
from gkd_dist.losses.terms import Output
from gkd_dist.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BUCKET_VALUES = 5_000_000  # DeepSpeed's default of 5e8 values is waste for a compact student


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for ``device``, without compiling anything and without its banner."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_BUILD_OPS", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Compiling the shared-memory op takes about a minute and serves inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(config: DistillConfig, micro_steps: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; keys of ``distill.deepspeed`` go on top."""
    zero = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": config.gpus_per_worker > 0,  # a copy against a fragmentation that only GPUs have
        "reduce_bucket_size": _BUCKET_VALUES,
        "allgather_bucket_size": _BUCKET_VALUES,
    }
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "gradient_clipping": config.grad_clip or 0.0,  # left out it would be 1
    }
    if config.precision != "fp32":
        ours[config.precision] = {"enabled": True}
    given = dict(config.deepspeed)
    zero.update(given.pop("zero_optimization", {}))
    return {**ours, **given}


def check_precision(config: DistillConfig) -> None:
    """`ConfigError` where the device has no such precision; to be called before any process starts.

    Asks the processor of this process, taking those of the workers to be like it.
    """
    if config.precision == "fp16" and config.gpus_per_worker == 0:
        supported = torch.ops.mkldnn._is_mkldnn_fp16_supported()
        if not supported:
            raise ConfigError(
                "distill.precision fp16 needs a GPU or CPUs with fp16 arithmetic, and this machine, which stands for "
                "those of the workers, has none; set distill.precision=bf16 or fp32, or start on a machine like theirs"
            )


def check_options(config: DistillConfig) -> None:
    """`ConfigError` where DeepSpeed itself refuses ``distill.deepspeed``; to be called before any process starts.

    Only where the workers have no GPU: DeepSpeed would settle on this process's kind of device.
    """
    if not config.deepspeed or config.gpus_per_worker:
        return
    import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        with _quiet():
            DeepSpeedConfig(deepspeed_config(config, 1))
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as error:
        raise ConfigError(f"distill.deepspeed is refused by DeepSpeed: {_reason(error)}; correct it") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class DeepSpeedEngine:
    """A student under DeepSpeed, ZeRO 0 to 3."""

    def __init__(self, model: nn.Module, config: DistillConfig, world: World, micro_steps: int) -> None:
        deepspeed = import_deepspeed(world.device)
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed insists on it, also inline
        self._deepspeed, self._world = deepspeed, world
        self._stage, self._micro_steps = config.zero_stage, micro_steps
        self._dtype = DTYPES[config.precision]
        module = as_student(model, config.checkpoint_layers).to(world.device)
        optimizer = build_optimizer((parameter for _, parameter in module.named_trained()), config)
        self._keys = moment_names(config)
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_config(config, micro_steps),
                dist_init_required=False,
            )
        self._torch_optimizer = optimizer

    @property
    def module(self) -> StudentModule:
        """The wrapped module."""
        module: StudentModule = self._engine.module
        return module

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, where DeepSpeed tells it."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def forward(self, batch: Batch, outputs: Sequence[Output]) -> tuple[Tensor, dict[Output, Tensor]]:
        """Logits and further outputs in fp32."""
        return call_module(self._engine, batch, outputs, self._dtype)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of ``loss``; DeepSpeed counts the micro-step itself."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()

    def step(self) -> None:
        """Ends the last micro-step, which reduces, clips and updates."""
        self._engine.step()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        set_lr(self._engine.optimizer, lr)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of the module."""
        self._engine.train(mode)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Parameters in full, also where ZeRO-3 has spread them."""
        if self._stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield

    def model_state(self) -> dict[str, Tensor]:
        """Weights (fp32 masters) and buffers by name, copies on the CPU; all ranks must call."""
        return self._state_of(self.module.model)

    def head_state(self) -> dict[str, Tensor]:
        """The same of the projection heads, which are no part of the model."""
        return self._state_of(self.module.heads) if len(self.module.heads) else {}

    def _state_of(self, model: nn.Module) -> dict[str, Tensor]:
        with self._whole():
            state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        if self._dtype != torch.float32:
            from deepspeed.utils import safe_get_full_fp32_param

            masters = self._masters()
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:  # has no master: it is what the model was built from, rounded
                    state[name] = state[name].float()
                    continue
                master = masters[parameter] if masters else safe_get_full_fp32_param(parameter)
                value = state[name] if master is None else master.detach().cpu().clone().view_as(state[name])
                state[name] = value.float()
        return state

    def load_masters(self, state: dict[str, Tensor]) -> None:
        """Restores fp32 masters, which the engine has made of rounded weights; all ranks must call.

        ``state`` names them as `StudentModule.named_trained` does. The rounded weights of a model that was built
        from it fit them already.
        """
        if self._dtype == torch.float32:
            return
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

        masters = self._masters()
        for name, parameter in self.module.named_trained():
            value = state[name].to(parameter.device, torch.float32)
            if masters:
                masters[parameter].detach().copy_(value)
            elif self._stage == 3:
                size = safe_get_local_fp32_param(parameter).numel()
                safe_set_local_fp32_param(parameter, self._own_part(value, size))
            else:
                safe_set_full_fp32_param(parameter, value)

    def _masters(self) -> dict[Tensor, Tensor]:
        """fp32 masters by parameter at stage 0 with less precision; empty where ZeRO keeps them, or there are none."""
        optimizer = self._engine.optimizer
        if self._stage or self._plain():
            return {}
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}

    def _own_part(self, value: Tensor, size: int) -> Tensor:
        """This rank's part of a whole value; ZeRO-3 pads it to a multiple of the ranks."""
        padded = value.new_zeros(size * self._world.world_size)
        padded[: value.numel()] = value.flatten()
        return padded.split(size)[self._world.rank].clone()

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state (moments, not weights) on this rank."""
        tensors = [v for state in self._torch_optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _plain(self) -> bool:
        """True where the torch optimizer updates the parameters themselves, without DeepSpeed between them."""
        return self._engine.optimizer is self._torch_optimizer

    def optimizer_state(self) -> dict[str, Tensor]:
        """State tensors as ``<parameter>/<key>``, whole whatever the stage; all ranks must call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        out: dict[str, Tensor] = {}
        masters = self._masters()
        for name, parameter in self.module.named_trained():
            for key in self._keys:
                if self._stage == 0:
                    value = self._torch_optimizer.state.get(masters.get(parameter, parameter), {}).get(key)
                else:
                    value = safe_get_full_optimizer_state(parameter, key)
                if value is not None:
                    out[f"{name}/{key}"] = value.detach().cpu().clone().view(parameter_shape(parameter))
        steps = [state["step"] for state in self._torch_optimizer.state.values() if "step" in state]
        if steps:
            out["all/step"] = torch.as_tensor(steps[0]).detach().cpu().clone()
        return out

    def load_optimizer_state(self, state: dict[str, Tensor], empty: Batch) -> None:
        """Restores what `optimizer_state` gave, at any world size and stage; all ranks must call.

        ZeRO creates its state at the first step, so one step with a learning rate of zero on
        ``empty`` batches makes the room that is then filled.
        """
        if not state:
            return
        self._empty_step(empty)
        if self._stage == 0:
            self._fill_plain(state)
        else:
            self._fill_zero(state)
        for values in self._torch_optimizer.state.values():
            if "step" in values and "all/step" in state:
                step = state["all/step"]
                values["step"] = step.clone() if isinstance(values["step"], Tensor) else int(step)

    def _empty_step(self, empty: Batch) -> None:
        before = [group["lr"] for group in self._engine.optimizer.param_groups]
        set_lr(self._engine.optimizer, 0.0)
        for _ in range(self._micro_steps):
            logits, _ = self.forward(empty, ())
            self._engine.backward(logits.sum() * 0, scale_wrt_gas=False)
            self._engine.step()
        for group, lr in zip(self._engine.optimizer.param_groups, before, strict=True):
            group["lr"] = lr

    def _fill_plain(self, state: dict[str, Tensor]) -> None:
        masters = self._masters()
        for name, parameter in self.module.named_trained():
            held = self._torch_optimizer.state[masters.get(parameter, parameter)]
            for key in self._keys:
                if f"{name}/{key}" in state:
                    held[key] = state[f"{name}/{key}"].to(parameter.device, copy=True)

    def _fill_zero(self, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, parameter in self.module.named_trained():
            for key in self._keys:
                value = state.get(f"{name}/{key}")
                if value is not None and self._stage == 3:
                    self._fill_partition(parameter, key, value)
                elif value is not None:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _fill_partition(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """ZeRO-3 pads a parameter to a multiple of the ranks, which DeepSpeed's own setter overlooks."""
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

        size = safe_get_local_optimizer_state(parameter, key).numel()
        safe_set_local_optimizer_state(parameter, self._own_part(value, size), key)

    def close(self) -> None:
        """Removes DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter, also where ZeRO-3 keeps only a part of it."""
    shape = getattr(parameter, "ds_shape", None)
    return parameter.shape if shape is None else torch.Size(shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its configuration and versions through several loggers at start-up."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
