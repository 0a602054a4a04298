"""DeepSpeed's configuration is a pure function of ours."""

import pytest

from gkd_dist.config import DistillConfig
from gkd_dist.distill.engine import check_options, check_precision, deepspeed_config
from gkd_dist.errors import ConfigError


def test_stage_and_accumulation():
    built = deepspeed_config(DistillConfig(zero_stage=2, grad_clip=0.5), micro_steps=3)
    assert built["zero_optimization"]["stage"] == 2
    assert built["gradient_accumulation_steps"] == 3
    assert built["gradient_clipping"] == 0.5
    assert "bf16" not in built


def test_no_clipping_is_said_because_deepspeed_clips_by_default():
    assert deepspeed_config(DistillConfig(), 1)["gradient_clipping"] == 0.0


def test_precision():
    assert deepspeed_config(DistillConfig(precision="bf16"), 1)["bf16"] == {"enabled": True}


def test_passthrough_goes_on_top():
    extra = {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 7}}
    built = deepspeed_config(DistillConfig(deepspeed=extra), 1)
    assert built["wall_clock_breakdown"] is True
    assert built["zero_optimization"]["reduce_bucket_size"] == 7
    assert built["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("key", ["train_batch_size", "optimizer", "gradient_clipping", "bf16"])
def test_passthrough_may_not_contradict(key):
    with pytest.raises(ValueError, match=f"{key} is derived from distill"):
        DistillConfig(deepspeed={key: 1})


def test_fp16_on_a_cpu_without_it(monkeypatch):
    import torch

    class NoFp16:
        def _is_mkldnn_fp16_supported(self) -> bool:
            return False

    monkeypatch.setattr(torch.ops, "mkldnn", NoFp16())
    with pytest.raises(ConfigError, match="precision=bf16 or fp32"):
        check_precision(DistillConfig(precision="fp16"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"comms_logger": {"enabled": "perhaps"}}, "distill.deepspeed is refused by DeepSpeed: .*enabled"),
        ({"csv_monitor": {"job_name": 3}}, "distill.deepspeed is refused by DeepSpeed: .*; correct it"),
    ],
)
def test_what_deepspeed_refuses_is_known_before_any_process_starts(options, says):
    with pytest.raises(ConfigError, match=says):
        check_options(DistillConfig(deepspeed=options))


def test_what_deepspeed_takes_passes():
    check_options(DistillConfig())
    check_options(DistillConfig(deepspeed={"wall_clock_breakdown": True, "comms_logger": {"enabled": True}}))
