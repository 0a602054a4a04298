"""C2b: parameters after ten steps do not know how many ranks, or which ZeRO stage, made them.

The reference is plain torch in one process (`cases.py` has the cases). Five unequal units, one without labels and one
without edges, leave ranks with empty micro-steps or without a unit. Each mechanism that makes this hold is
taken away once, to see that the comparison would notice.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gkd_dist.config.deepspeed import ZERO_ALLOWED
from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.trainer import Trainer, prepare_process
from gkd_dist.partition.store import GraphStore
from gkd_dist.storage import Storage
from gkd_dist.world import World
from tests.distributed.cases import (
    CASES,
    LESS_STATE,
    NO_EDGES,
    NO_LABELS,
    PRODUCT,
    SIZES,
    ZERO_OPTIONS,
    Case,
    adamw,
    is_meaningless,
    sabotaged,
    with_option,
)
from tests.distributed.groups import Ranks
from tests.distributed.ranks import prefixed

pytestmark = pytest.mark.timeout(240)
TOLERANCE = 1e-5
_LR_STEPS = 1e-2  # lr times steps: how far Adam can carry a parameter whose gradient is rounding


@pytest.fixture(scope="module")
def references(store: Storage) -> dict[str, dict[str, Tensor]]:
    return {}


def reference(references: dict[str, dict[str, Tensor]], store: Storage, case: Case) -> dict[str, Tensor]:
    """The same steps without DeepSpeed and without ranks."""
    if case.name not in references:
        prepare_process(1)
        train = case.config(0, 1)
        trainer = Trainer(case.task(store, f"reference-{case.name}", train), World(), torch_factory(train, World()))
        trainer.run()
        assert trainer.state.global_step == 10
        references[case.name] = trainer.engine.model_state() | prefixed(trainer.engine.optimizer_state())
    return references[case.name]


def trained(ranks: Ranks, store: Storage, world_size: int, stage: int, case: Case, folder: Path) -> dict[str, Tensor]:
    out = folder / f"w{world_size}-z{stage}-{case.name}-{case.sabotage.replace(' ', '-')}"
    ranks.do(world_size=world_size, store=store.url, stage=stage, case=asdict(case), out=str(out))
    state: dict[str, Tensor] = torch.load(out, weights_only=True)
    return state


def error_of(found: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> float:
    """Largest relative error of a parameter, a buffer or a moment, and of all parameters and buffers together."""
    assert found.keys() == expected.keys()
    names = [name for name in expected if not is_meaningless(case, name)]
    errors = [float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-5)) for n in names]
    weights = [name for name in names if not name.startswith("optimizer/")]
    flat = [torch.cat([state[name].flatten() for name in weights]) for state in (found, expected)]
    return max(*errors, float((flat[0] - flat[1]).norm() / flat[1].norm()))


def check(found: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    assert error_of(found, expected, case) <= TOLERANCE
    for name in filter(lambda name: is_meaningless(case, name), expected):
        assert (found[name] - expected[name]).abs().max() <= 2 * _LR_STEPS


def test_the_units_are_as_different_as_said(store):
    parts = GraphStore.open(store.child("graph")).manifest.parts
    assert tuple(part.counts["num_owned"] for part in parts) == SIZES
    graph = GraphStore.open(store.child("graph"))
    assert [bool(graph.part(k)["train_mask"].any()) for k in range(len(SIZES))] == [k != NO_LABELS for k in range(5)]
    assert [part.counts["num_owned_edges"] == 0 for part in parts] == [k == NO_EDGES for k in range(5)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_parameters_agree(ranks, store, references, tmp_path, world_size, stage, case):
    found = trained(ranks, store, world_size, stage, case, tmp_path)
    check(found, reference(references, store, case), case)


@pytest.mark.parametrize("world_size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3, 4))])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", LESS_STATE.values(), ids=lambda case: case.name)
def test_parameters_agree_where_not_every_one_has_moments(ranks, store, references, tmp_path, world_size, stage, case):
    found, expected = trained(ranks, store, world_size, stage, case, tmp_path), reference(references, store, case)
    check(found, expected, case)
    moments = [name for name in found if name.startswith("optimizer/")]
    assert all("second" in name for name in moments) if "frozen" in case.name else not moments


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", PRODUCT.values(), ids=lambda case: case.name)
def test_parameters_agree_with_every_option(ranks, store, references, tmp_path, world_size, stage, case):
    found = trained(ranks, store, world_size, stage, case, tmp_path)
    check(found, reference(references, store, case), case)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_state_of_the_optimizer(ranks, store, tmp_path, world_size, stage):
    case = Case("table", adamw(epochs=2), {"node_embedding": 64})  # small parameters stay whole in stage 3
    options = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    case = replace(case, train=case.train | {"deepspeed": options})
    whole = of_each_rank(ranks, store, world_size, 0, case, tmp_path)
    assert whole[0] > 2 * 4 * 64 * sum(SIZES)  # two moments in fp32
    share = [size / whole[0] for size in of_each_rank(ranks, store, world_size, stage, case, tmp_path)]
    assert max(share) == pytest.approx(1 / world_size, rel=0.02), "of what one rank has without ZeRO"


def of_each_rank(ranks, store, world_size, stage, case, folder) -> list[int]:
    trained(ranks, store, world_size, stage, case, folder)
    files = [folder / f"w{world_size}-z{stage}-{case.name}-.bytes-{rank}" for rank in range(world_size)]
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_close(ranks, store, references, tmp_path, stage):
    exact = CASES["sgd-layer-clipped"]
    found = trained(ranks, store, 2, stage, Case("bf16", exact.train | {"precision": "bf16"}, exact.model), tmp_path)
    expected = reference(references, store, exact)
    names = [name for name in expected if not name.startswith("optimizer/")]
    assert all(found[name].dtype == torch.float32 for name in names)
    flat = [torch.cat([state[name].flatten() for name in names]) for state in (found, expected)]
    error = float((flat[0] - flat[1]).norm() / flat[1].norm())
    assert 1e-5 < error < 1e-2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_is_compiled(ranks, store, tmp_path, stage):
    trained(ranks, store, 2, stage, CASES["sgd-layer-clipped"], tmp_path)
    assert list(Path(ranks.extensions.name).iterdir()) == []


def test_no_option_is_left_out() -> None:
    assert ZERO_OPTIONS.keys() == ZERO_ALLOWED.keys() - {"overlap_comm"}  # which needs GPUs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [(n, stage) for n in ZERO_OPTIONS for stage in ZERO_ALLOWED[n][1]])
def test_what_may_be_handed_to_deepspeed_changes_nothing(ranks, store, references, tmp_path, name, stage):
    case = with_option(name)
    check(trained(ranks, store, 2, stage, case, tmp_path), reference(references, store, case), case)


@pytest.mark.parametrize(
    ("how", "world_size", "stage", "name"),
    [
        ("local counts", 2, 1, "sgd-layer-clipped"),
        ("averaged loss", 2, 0, "sgd-batch-unclipped"),
        ("divided by micro-steps", 2, 1, "sgd-batch-unclipped"),
        ("no forward without units", 2, 2, "sgd-layer-clipped"),
        ("statistics stay local", 3, 1, "sgd-batch-unclipped"),
        ("seeded by rank", 2, 1, "adamw-layer-clipped"),
    ],
)
def test_without_it_they_do_not(ranks, store, references, tmp_path, how, world_size, stage, name):
    case = sabotaged(CASES[name], how)
    found = trained(ranks, store, world_size, stage, case, tmp_path)
    assert error_of(found, reference(references, store, CASES[name]), case) > 10 * TOLERANCE
