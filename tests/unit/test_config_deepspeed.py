"""What may be handed to DeepSpeed: every key it reads is either passed on or refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from gkd_dist.config import DistillConfig
from gkd_dist.config.deepspeed import ALLOWED, DERIVED, REFUSED, ZERO_ALLOWED, ZERO_REFUSED
from gkd_dist.config_file import parse_config
from gkd_dist.errors import ConfigError

RUN = """\
run: runs/a
graph: {source: {kind: synthetic}}
teacher: {model: {kind: gcn}}
student: {model: {kind: gcn}}
losses: [{kind: label}]
distill:
  zero_stage: 2
  deepspeed:
"""


def complaint(text: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(RUN + text, "x.yaml", [f"distill.{key}={value}" for key, value in options.items()])
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("    wall_clock_breakdwn: true\n", "x.yaml:9: distill.deepspeed.wall_clock_breakdwn: DeepSpeed has no key "),
        ("    wall_clock_breakdwn: true\n", "did you mean wall_clock_breakdown"),
        ("    optimizer: {type: Lamb}\n", "x.yaml:9: distill.deepspeed.optimizer: optimizer is derived from distill."),
        ("    steps_per_print: 5\n    amp: {}\n", "x.yaml:10: distill.deepspeed.amp: amp is derived from distill.prec"),
        ("    tensor_parallel: {}\n", "which all hold the whole student; remove it"),
        ("    gradient_allreduce_op: sum\n", "what all ranks have counted; remove it"),
        ("    steps_per_print: often\n", "steps_per_print takes a number > 0 (got 'often'); correct it"),
        ("    zero_optimization: 2\n", "zero_optimization takes a mapping (got 2); correct it"),
        (
            "    zero_optimization:\n      reduce_bucket_size: 9\n      offload_optimizer: {device: cpu}\n",
            "x.yaml:11: distill.deepspeed.zero_optimization.offload_optimizer: zero_optimization.offload_optimi",
        ),
        ("    zero_optimization: {stage: 3}\n", "derived from distill.zero_stage; set that instead"),
        ("    zero_optimization: {reduce_bucket: 3}\n", "has no key reduce_bucket; did you mean reduce_bucket_size?"),
        ("    zero_optimization: {reduce_bucket_size: true}\n", "takes a number > 0 (got True)"),
        ("    zero_optimization: {overlap_comm: true}\n", "these ranks talk over gloo; remove it"),
        ("    zero_optimization: {sub_group_size: 10}\n", "is read by ZeRO 3, and distill.zero_stage is 2; remove it"),
        (
            "    zero_optimization: {zero_quantized_weights: true}\n",
            "compiles kernels and rounds what ranks send; remove",
        ),
        ("    tensorboard: {enabled: true}\n", "tensorboard.output_path must be a folder on the machine of rank 0"),
        (
            "    csv_monitor: {enabled: true, output_path: s3://b/x}\n",
            "x.yaml:9: distill.deepspeed.csv_monitor.output_path",
        ),
    ],
)
def test_a_refusal_is_one_line_that_says_where_and_what_to_do(text: str, says: str) -> None:
    line = complaint(text)
    assert says in line
    assert len(line.splitlines()) == 1


def test_an_override_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^override distill\.deepspeed\.pipeline=\{\}: pipeline splits a model"):
        parse_config(RUN.replace("  deepspeed:\n", ""), "x.yaml", ["distill.deepspeed.pipeline={}"])


def test_clipping_needs_the_norm() -> None:
    text = "    zero_optimization: {compute_grad_norm: false}\n"
    assert "clipping needs the norm" in complaint(text, grad_clip=1)
    assert parse_config(RUN + text, "x.yaml").distill.deepspeed == {"zero_optimization": {"compute_grad_norm": False}}


def test_on_gpus_communication_may_overlap() -> None:
    DistillConfig(gpus_per_worker=1, deepspeed={"zero_optimization": {"overlap_comm": True}})


@pytest.mark.parametrize("sentence", [*REFUSED.values(), *ZERO_REFUSED.values()])
def test_every_refusal_ends_with_what_to_do(sentence: str) -> None:
    assert "; remove it" in sentence


@pytest.mark.parametrize("key", [*DERIVED, *REFUSED])
def test_what_is_refused_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} (is derived from distill\.|.*remove it)"):
        DistillConfig(deepspeed={key: True})


# --- nothing that DeepSpeed reads is missing ---------------------------------------------------


def test_every_key_of_zero_optimization_has_its_place() -> None:
    import torch

    from gkd_dist.distill.engine import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    read = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert read == {"stage", *ZERO_ALLOWED, *ZERO_REFUSED}
    assert not set(ZERO_ALLOWED) & set(ZERO_REFUSED)


def test_every_key_that_deepspeed_looks_for_has_its_place() -> None:
    import torch

    from gkd_dist.distill.engine import deepspeed_config, import_deepspeed

    import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.config import DeepSpeedConfig

    read: set[str] = set()

    class Watched(dict[str, Any]):
        def get(self, key: str, *default: Any) -> Any:
            read.add(key)
            return super().get(key, *default)

        def __contains__(self, key: object) -> bool:
            read.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            watched = self

            class Keys:
                def __contains__(self, key: object) -> bool:
                    return key in watched

                def __iter__(self) -> Any:
                    return iter(dict.keys(watched))

            return Keys()

    DeepSpeedConfig(Watched(deepspeed_config(DistillConfig(), 1)))
    assert len(read) > 40
    assert read <= {*ALLOWED, *DERIVED, *REFUSED}
    assert not set(ALLOWED) & set(DERIVED)
    assert not (set(ALLOWED) | set(DERIVED)) & set(REFUSED)
