"""C2a with parts that stay on their ranks: loss and gradients are those of the whole graph, at any depth.

Five unequal parts, one without labels and one without edges; the store has two hops of halo, the students are four
layers deep and read one. Each mechanism is taken away once.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkd_dist.config import DistillConfig
from gkd_dist.distill.checkpoint import committed_steps
from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.trainer import Trainer, prepare_process
from gkd_dist.storage import Storage
from gkd_dist.world import World
from tests.distributed.cases import Case, adamw, sgd
from tests.distributed.exchanged import DEPTH, Step, look, whole_batch, whole_graph
from tests.distributed.groups import Ranks

RELATIVE, ABSOLUTE = 1e-5, 1e-7
STILL = {"dropout": 0.0, "input_dropout": 0.0}
HEADS = {"kind": "gat", "heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "gcn": {"kind": "gcn"},
    "sage": {"kind": "sage"},
    "gat": HEADS,
    "gin": {"kind": "gin"},
    "mlp": {"kind": "mlp"},
}
STEPS = [
    *(Step(kind, model) for kind, model in KINDS.items()),
    Step("plain", {"kind": "gcn", "norm": "none", **STILL}),
    Step("residual", {"kind": "sage", "residual": True}),
    Step("batch-norm", {"kind": "gcn", "norm": "batch"}),
    Step("embedded", {"kind": "gcn", "node_embedding": 4}),
    Step("recomputed", HEADS, recompute=True),
    Step("recomputed-batch-norm", {"kind": "gcn", "norm": "batch"}, recompute=True),
    # Convolutions that are given rows for halo nodes as well, and logits from the outputs of all layers.
    Step("users", {"kind": "tests.user_models:Layered", "layers": 2, **STILL}),
    Step("pyg", {"kind": "torch_geometric.nn:GAT", "layers": 3, "args": {"jk": "cat", "v2": True}, **STILL}),
]


def measured(ranks: Ranks, store: Storage, world_size: int, step: Step, folder: Path) -> dict[str, Any]:
    out = str(folder / "found")
    ranks.do(what="measure", world_size=world_size, store=store.url, step=asdict(step), out=out)
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Tensors that differ by more than the contract allows."""
    assert found.keys() == expected.keys()
    wrong = []
    for name, value in expected.items():
        error, size = float((found[name] - value).norm()), float(value.norm())
        if error > max(RELATIVE * size, ABSOLUTE):
            wrong.append(f"{name}: {error:.2e} of {size:.2e}")
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_loss_and_gradients_are_those_of_the_whole_graph(ranks, store, tmp_path, world_size, step):
    """Seven ranks have five parts: two take part without any."""
    if world_size == 7 and step.name not in ("gat", "recomputed-batch-norm"):
        pytest.skip("two of the students are enough for ranks without parts")
    prepare_process(1)
    report, grads = whole_graph(step.task(store.url))
    found = measured(ranks, store, world_size, step, tmp_path)
    assert not differences({"means": found["means"]}, {"means": report.means})
    assert not differences(found["grads"], grads)


@pytest.mark.parametrize("world_size", [1, 3])
def test_metrics_and_medians_are_those_of_the_whole_graph(ranks, store, tmp_path, world_size):
    step = Step("looking", HEADS, looks=True)
    task = step.task(store.url)
    expected = look(task, whole_batch(task), World())
    found = measured(ranks, store, world_size, step, tmp_path)
    assert found["metrics"] == expected["metrics"]
    assert found["sigmas"] == pytest.approx(expected["sigmas"], rel=0.01)  # a bin of the histogram


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("halo rows are not filled", "plain"),
        ("gradients stay where they arise", "plain"),
        ("statistics stay local", "batch-norm"),
    ],
)
def test_without_it_they_are_not(ranks, store, tmp_path, how, name):
    step = next(step for step in STEPS if step.name == name)
    _, grads = whole_graph(step.task(store.url))
    found = measured(ranks, store, 2, replace(step, sabotage=how), tmp_path)
    assert differences(found["grads"], grads)


def test_masks_of_a_unit_would_tell_the_ranks(ranks, store, tmp_path):
    step = Step("by-unit", {"kind": "gcn", "dropout_mask": "unit"})
    _, grads = whole_graph(step.task(store.url))
    assert differences(measured(ranks, store, 2, step, tmp_path)["grads"], grads)


# --- after some steps, under DeepSpeed --------------------------------------------------------

CASES = [
    Case("sgd-layer", sgd(halo="exchange", grad_clip=0.5), {"layers": DEPTH, "kind": "gat", "heads": 2}),
    Case("adamw-layer", adamw(halo="exchange", checkpoint_layers=True), {"layers": DEPTH, "kind": "sage"}),
    Case("sgd-batch", sgd(halo="exchange", checkpoint_layers=True), {"layers": 3, "norm": "batch"}),
]


@pytest.fixture(scope="module")
def references(store: Storage) -> dict[str, dict[str, Tensor]]:
    return {}


def reference(references: dict[str, dict[str, Tensor]], store: Storage, case: Case) -> dict[str, Tensor]:
    """Plain torch on the whole graph as one unit: all parts merged, and no exchange."""
    if case.name not in references:
        prepare_process(1)
        options = case.config(0, 1).model_dump() | {"halo": "hops", "parts_per_unit": "all"}
        train = DistillConfig.model_validate(options)
        trainer = Trainer(case.task(store, f"whole-{case.name}", train), World(), torch_factory(train, World()))
        trainer.run()
        assert trainer.state.global_step == 10
        references[case.name] = trainer.engine.model_state()
    return references[case.name]


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, 3, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameters_agree(ranks, store, references, tmp_path, world_size, stage, case):
    out = str(tmp_path / f"x{world_size}-z{stage}-{case.name}")
    ranks.do(world_size=world_size, store=store.url, stage=stage, case=asdict(case), out=out)
    found = torch.load(out, weights_only=True)
    expected = reference(references, store, case)
    for name, value in expected.items():
        error, size = float((found[name] - value).norm()), float(value.norm())
        assert error <= RELATIVE * max(size, 1e-2), f"{name}: {error:.2e} of {size:.2e}"


def test_low_precision_is_exchanged_as_it_is(ranks, store, references, tmp_path):
    """bf16 activations and gradients; the reference is in fp32."""
    case = replace(CASES[0], train=CASES[0].train | {"precision": "bf16"})
    out = str(tmp_path / "low")
    ranks.do(world_size=3, store=store.url, stage=1, case=asdict(case), out=out)
    found, expected = torch.load(out, weights_only=True), reference(references, store, CASES[0])
    flat = [torch.cat([state[name].flatten() for name in expected]) for state in (found, expected)]
    assert 0 < float((flat[0] - flat[1]).norm() / flat[1].norm()) < 0.02


def test_a_run_goes_on_with_another_number_of_ranks(ranks, store, references, tmp_path):
    """Five steps on three ranks at stage 2, five more on two at stage 3."""
    case, out = CASES[0], str(tmp_path / "elastic")
    half = replace(case, train=case.train | {"epochs": 5, "checkpoint_every": 5})
    ranks.do(world_size=3, store=store.url, stage=2, case=asdict(half), out=out)
    ranks.do(world_size=2, store=store.url, stage=3, case=asdict(case), out=out)
    found, expected = torch.load(out, weights_only=True), reference(references, store, case)
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= RELATIVE * max(float(value.norm()), 1e-2), name
    steps = [document["global_step"] for document in commits(store, "elastic")]
    assert 5 in steps, "the second half did not start from a checkpoint"


def commits(store: Storage, name: str) -> list[dict[str, Any]]:
    folder = store.child(f"students/{name}")
    return [folder.read_json(f"checkpoints/step-{step:08d}/COMMIT.json") for step in committed_steps(folder)]
