"""What may be handed to DeepSpeed beside what this project sets itself, and why the rest may not.

Every key that DeepSpeed 0.19 reads stands here once, with what it takes or with the sentence that refuses it.
Refused is what another setting decides, what would make results depend on the number of ranks, what works on
models and data of another kind, and what compiles kernels when training starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gkd_dist.config.base import ErrorAt, near_miss

_BOOL, _COUNT, _NUMBER, _TEXT, _SECTION = "true or false", "a number > 0", "a number >= 0", "a text", "a mapping"

# --- keys of the section itself ----------------------------------------------------------------

ALLOWED: dict[str, str] = {
    "zero_optimization": _SECTION,
    "steps_per_print": _COUNT,
    "wall_clock_breakdown": _BOOL,
    "memory_breakdown": _BOOL,
    "dump_state": _BOOL,
    "disable_python_gc": _BOOL,
    "log_level": _TEXT,
    "timers": _SECTION,
    "comms_logger": _SECTION,
    "flops_profiler": _SECTION,
    "tensorboard": _SECTION,
    "csv_monitor": _SECTION,
    "wandb": _SECTION,
    "comet": _SECTION,
}
MONITORS = ("tensorboard", "csv_monitor")  # they write files

DERIVED: dict[str, str] = {
    "train_batch_size": "distill.units_per_step",
    "train_micro_batch_size_per_gpu": "distill.units_per_step",
    "gradient_accumulation_steps": "distill.units_per_step",
    "managed_gradient_accumulation": "distill.units_per_step",
    "optimizer": "distill.optimizer",
    "zero_allow_untested_optimizer": "distill.optimizer",
    "zero_force_ds_cpu_optimizer": "distill.optimizer",
    "scheduler": "distill.lr_schedule",
    "gradient_clipping": "distill.grad_clip",
    "fp16": "distill.precision",
    "bf16": "distill.precision",
    "bfloat16": "distill.precision",
    "amp": "distill.precision",
    "torch_autocast": "distill.precision",
    "data_types": "distill.precision",
    "activation_checkpointing": "distill.checkpoint_layers",
    "elasticity": "distill.num_workers",
}

_SUMS = "changes how gradients are summed, and the loss is already divided by what all ranks have counted; remove it"
_DENSE = "is for models of dense layers and tokens, which students are not; remove it"
_PARALLEL = "splits a model over ranks, which all hold the whole student; remove it, ZeRO 3 spreads parameters"
_OWN_DATA = "is for data that DeepSpeed loads, and units come from the store; remove it"
_OWN_FILES = "is for checkpoints that DeepSpeed writes, and ours belong to no number of ranks; remove it"
REFUSED: dict[str, str] = {
    "communication_data_type": _SUMS,
    "gradient_allreduce_op": _SUMS,
    "gradient_predivide_factor": _SUMS,
    "prescale_gradients": _SUMS,
    "disable_allgather": _SUMS,
    "sparse_gradients": "needs embeddings with sparse gradients, and those of node_embedding are dense; remove it",
    "graph_harvesting": "records CUDA graphs, and units differ in size; remove it",
    "compile": "compiles the student when training starts, for each size of a unit; remove it",
    "quantize_training": "rounds weights while training; remove it",
    "weight_quantization": "rounds weights and compiles kernels; remove it",
    "compression_training": "prunes and rounds a model of dense layers; remove it",
    "progressive_layer_drop": _DENSE,
    "eigenvalue": _DENSE,
    "sparse_attention": _DENSE,
    "vocabulary_size": _DENSE,
    "hybrid_engine": _DENSE,
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "data_efficiency": _OWN_DATA,
    "curriculum_learning": _OWN_DATA,
    "dataloader_drop_last": _OWN_DATA,
    "autotuning": "starts runs of its own; remove it",
    "aio": "is for offloading to NVMe, which is not supported; remove it",
    "checkpoint": _OWN_FILES,
    "datastates_ckpt": _OWN_FILES,
    "nebula": _OWN_FILES,
}

# --- keys of zero_optimization -----------------------------------------------------------------

ZERO_ALLOWED: dict[str, tuple[str, tuple[int, ...]]] = {  # what it takes, and the stages that read it
    "contiguous_gradients": (_BOOL, (1, 2, 3)),
    "reduce_scatter": (_BOOL, (1, 2, 3)),
    "reduce_bucket_size": (_COUNT, (1, 2, 3)),
    "use_multi_rank_bucket_allreduce": (_BOOL, (1, 2)),
    "allgather_partitions": (_BOOL, (1, 2)),
    "allgather_bucket_size": (_COUNT, (1, 2)),
    "overlap_comm": (_BOOL, (1, 2, 3)),
    "compute_grad_norm": (_BOOL, (1, 2)),
    "parameter_alignment": (_BOOL, (1, 2)),
    "ignore_unused_parameters": (_BOOL, (2,)),
    "sub_group_size": (_COUNT, (3,)),
    "stage3_prefetch_bucket_size": (_NUMBER, (3,)),
    "stage3_param_persistence_threshold": (_NUMBER, (3,)),
    "stage3_model_persistence_threshold": (_NUMBER, (3,)),
    "stage3_max_live_parameters": (_NUMBER, (3,)),
    "stage3_max_reuse_distance": (_NUMBER, (3,)),
    "stage3_module_granularity_threshold": (_NUMBER, (3,)),
    "stage3_use_all_reduce_for_fetch_params": (_BOOL, (3,)),
    "stage3_allgather_sequential": (_BOOL, (3,)),
    "memory_efficient_linear": (_BOOL, (3,)),
    "override_module_apply": (_BOOL, (3,)),
    "log_trace_cache_warnings": (_BOOL, (3,)),
    "enable_sanity_checks": (_BOOL, (3,)),
}

_OFFLOAD = (
    "moves the state of a compact student to a slower memory and compiles kernels for it; remove it, or raise "
    "distill.zero_stage to spread that state"
)
_QUANTIZED = "compiles kernels and rounds what ranks send; remove it"
ZERO_REFUSED: dict[str, str] = {
    "offload_param": _OFFLOAD,
    "offload_optimizer": _OFFLOAD,
    "cpu_offload": _OFFLOAD,
    "cpu_offload_param": _OFFLOAD,
    "cpu_offload_use_pin_memory": _OFFLOAD,
    "zenflow": _OFFLOAD,
    "zero_quantized_weights": _QUANTIZED,
    "zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_quantized_gradients": _QUANTIZED,
    "zero_hpz_partition_size": "makes groups within the ranks, which are all one group; remove it",
    "round_robin_gradients": "mixes up the optimizer state that checkpoints gather; remove it",
    "legacy_stage1": "is an implementation that DeepSpeed has given up; remove it",
    "save_muon_momentum_buffer_in_memory": "is for an optimizer that distill.optimizer does not have; remove it",
    "leaf_module": "is for modules with experts, which students have not; remove it",
    "elastic_checkpoint": _OWN_FILES,
    "load_from_fp32_weights": _OWN_FILES,
    "pipeline_loading_checkpoint": _OWN_FILES,
    "stage3_gather_16bit_weights_on_model_save": _OWN_FILES,
    "stage3_gather_fp16_weights_on_model_save": _OWN_FILES,
}

# --- the check ---------------------------------------------------------------------------------


def check_deepspeed(options: Mapping[str, Any], stage: int, on_gpu: bool, clips: bool) -> None:
    """`ErrorAt` for the first key of ``distill.deepspeed`` that is unknown, refused or of a wrong kind.

    ``stage`` is the ZeRO stage; ``on_gpu`` says whether ranks talk over nccl, ``clips`` whether gradients are clipped.
    """
    for key, value in options.items():
        if key in DERIVED:
            raise _refused((key,), f"{key} is derived from {DERIVED[key]}; set that instead")
        if key in REFUSED:
            raise _refused((key,), f"{key} {REFUSED[key]}")
        if key not in ALLOWED:
            raise _refused((key,), f"DeepSpeed has no key {key}{near_miss(key, [*ALLOWED, *DERIVED, *REFUSED])}")
        _check_kind((key,), value, ALLOWED[key])
    for monitor in MONITORS:
        _check_monitor(monitor, options.get(monitor, {}))
    for key, value in options.get("zero_optimization", {}).items():
        _check_zero(key, value, stage, on_gpu, clips)


def _check_zero(key: str, value: Any, stage: int, on_gpu: bool, clips: bool) -> None:
    path, name = ("zero_optimization", key), f"zero_optimization.{key}"
    if key == "stage":
        raise _refused(path, f"{name} is derived from distill.zero_stage; set that instead")
    if key in ZERO_REFUSED:
        raise _refused(path, f"{name} {ZERO_REFUSED[key]}")
    if key not in ZERO_ALLOWED:
        known = [*ZERO_ALLOWED, *ZERO_REFUSED]
        raise _refused(path, f"DeepSpeed's zero_optimization has no key {key}{near_miss(key, known)}")
    kind, stages = ZERO_ALLOWED[key]
    _check_kind(path, value, kind)
    if stage not in stages:
        read = ", ".join(map(str, stages))
        raise _refused(
            path, f"{name} is read by ZeRO {read}, and distill.zero_stage is {stage}; remove it or change the stage"
        )
    if key == "overlap_comm" and value and not on_gpu:
        raise _refused(
            path, f"{name} overlaps work on a GPU, and these ranks talk over gloo; remove it, or set gpus_per_worker"
        )
    if key == "compute_grad_norm" and not value and clips:
        raise _refused(path, f"{name}: clipping needs the norm; remove it, or set distill.grad_clip=null")


def _refused(path: tuple[str, ...], sentence: str) -> ErrorAt:
    return ErrorAt(("deepspeed", *path), sentence)


def _check_kind(path: tuple[str, ...], value: Any, kind: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        _BOOL: isinstance(value, bool),
        _COUNT: is_number and value > 0,
        _NUMBER: is_number and value >= 0,
        _TEXT: isinstance(value, str),
        _SECTION: isinstance(value, dict),
    }[kind]
    if not fits:
        raise _refused(path, f"{'.'.join(path)} takes {kind} (got {value!r}); correct it")


def _check_monitor(monitor: str, options: Mapping[str, Any]) -> None:
    """DeepSpeed makes folders itself, so a URL of a store would become one on the machine of rank 0."""
    if not options.get("enabled", False):
        return
    folder = options.get("output_path")
    if not isinstance(folder, str) or not folder or "://" in folder:
        raise _refused(
            (monitor, "output_path") if "output_path" in options else (monitor,),
            f"{monitor}.output_path must be a folder on the machine of rank 0, the only place that DeepSpeed writes to "
            f"(got {folder!r}); name one, or read what the run itself logs under tensorboard/",
        )
