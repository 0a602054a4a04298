"""The same numbers on a CUDA device as on the CPU: sparse arithmetic, models, losses, a training step.

Needs a GPU (marker ``gpu``); without Ray. The DeepSpeed test is skipped where DeepSpeed is not installed.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from gkd_dist.config import DistillConfig, InferConfig, ModelConfig
from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.trainer import Trainer
from gkd_dist.graph import LocalGraph
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.losses import lsp_loss
from gkd_dist.models.build import build_model
from gkd_dist.shards.reader import read_shard
from gkd_dist.world import World
from tests.infer_worlds import World as Stores
from tests.infer_worlds import make_graph
from tests.training import make_task, small_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda", 0)


def random_graph(num_nodes: int = 500, num_edges: int = 4000) -> LocalGraph:
    generator = torch.Generator().manual_seed(0)
    return LocalGraph.from_edge_index(torch.randint(0, num_nodes, (2, num_edges), generator=generator), num_nodes)


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin"])
def test_models_give_the_same_outputs_and_gradients(kind):
    torch.manual_seed(0)
    graph, x = random_graph(), torch.randn(500, 16)
    model = build_model(ModelConfig(kind=kind, hidden=8), 16, 5)
    model(x, graph).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    out = model(x, graph)
    model.zero_grad()
    model.to(CUDA)
    found = model(x.to(CUDA), graph.to(CUDA))
    torch.testing.assert_close(found.cpu(), out, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad.cpu() - expected[name]).norm()
        assert error <= max(1e-4 * expected[name].norm(), 1e-6), name


@pytest.mark.parametrize("kernel", ["rbf", "linear", "laplacian", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_lsp(kernel, dtype, compiled):
    torch.manual_seed(0)
    edges = random_graph().edge_index
    student, teacher = torch.randn(500, 8), torch.randn(500, 12)
    options = {"kernel": kernel, "sigma": 8.0, "outer_softmax": False}
    z = student.to(dtype).float().requires_grad_()
    expected = lsp_loss(z, edges, teacher_z=teacher, **options)
    expected.backward()
    on_device = student.to(CUDA, dtype).requires_grad_()
    found = lsp_loss(on_device, edges.to(CUDA), teacher_z=teacher.to(CUDA), compiled=compiled, **options)
    found.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.cpu().float(), expected.detach(), rtol=tolerance, atol=1e-6)
    error = (on_device.grad.cpu().float() - z.grad).norm()
    assert error <= tolerance * z.grad.norm()


def test_training_on_the_device_follows_the_cpu(tmp_path):
    storage = small_world(tmp_path)
    train = DistillConfig(epochs=5, units_per_step="all", optimizer="sgd", lr=0.01, patience=0, num_workers=1)
    states = {}
    for device in (torch.device("cpu"), CUDA):
        world = World(device=device)
        task = make_task(storage, f"on-{device.type}", train, dropout=0.0)
        trainer = Trainer(task, world, torch_factory(train, world))
        trainer.run()
        states[device.type] = trainer.engine.model_state()
    for name, expected in states["cpu"].items():
        error = (states["cuda"][name] - expected).norm()
        assert error <= max(1e-4 * expected.norm(), 1e-6), name


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_on_one_device(tmp_path, stage, precision):
    from gkd_dist.distill.engine import DeepSpeedEngine

    storage = small_world(tmp_path)
    train = DistillConfig(
        epochs=5, units_per_step="all", zero_stage=stage, precision=precision, lr=0.001, num_workers=1, patience=0
    )
    world = World(device=CUDA)
    world.connect(60)
    task = make_task(storage, f"z{stage}-{precision}", train)
    trainer = Trainer(task, world, lambda model, steps: DeepSpeedEngine(model, train, world, steps))
    summary = trainer.run()
    assert summary.epochs_run == 5


@pytest.mark.parametrize("tile_edges", [2_000_000, 50])
@pytest.mark.parametrize("kind", ["gcn", "sage", "gat", "gin"])
def test_inference_on_streams_gives_the_knowledge_of_the_cpu(tmp_path, kind, tile_edges):
    world = Stores(tmp_path, make_graph(num_nodes=200, num_edges=2000))
    graph, (storage, _) = world.cut(4), world.model(kind, layers=3)
    wants = Wants(scores={2: {"sqeuclidean"}}, taps={"convs.0"})
    exact = InferConfig(num_actors=0, dtype="fp32", tile_edges=tile_edges)
    found = {}
    for name, settings in {"cpu": exact, "cuda": exact.model_copy(update={"gpus_per_actor": 1})}.items():
        out = world.storage(name)
        manifest = infer_nodes(storage, graph, out, wants, settings, fingerprint="f" * 64)
        found[name] = [read_shard(out, entry) for entry in manifest.parts]
    for expected, part in zip(found["cpu"], found["cuda"], strict=True):
        for name, values in expected.items():
            torch.testing.assert_close(part[name], values, rtol=1e-4, atol=1e-4)
