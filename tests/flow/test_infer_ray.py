"""Inference on real Ray actors: exact, unmoved by the loss of an actor, and gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from infer_worlds import World, assert_close, make_graph, whole

from gkd_dist.config import InferConfig, ModelConfig, RayConfig
from gkd_dist.errors import InfrastructureError, ModelError, ShardError, TeacherError
from gkd_dist.infer import actor, times
from gkd_dist.infer.actor import ActorPool
from gkd_dist.infer.cluster import start_ray
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.models.build import resolve_model

pytestmark = pytest.mark.timeout(300)
SETTINGS = InferConfig(num_actors=2, cpus_per_actor=0.5, dtype="fp32")
WANTS = Wants(scores={1: {"sqeuclidean"}})


@pytest.fixture(scope="module")
def ray_runs() -> Iterator[None]:
    """One Ray for all tests of the file; its processes must be gone at the end."""
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
        with start_ray(RayConfig(num_cpus=2), needed_cpus=2, needed_gpus=0):
            running = [p for p in psutil.Process().children(recursive=True) if p not in before]
            assert running
            yield
            running += [p for p in psutil.Process().children(recursive=True) if p not in before]
    assert not any(process.is_running() for process in running)


@pytest.fixture(scope="module")
def pool(ray_runs: None) -> Iterator[ActorPool]:
    """One pool serves all runs, as it does in `gkd run`."""
    with ActorPool(SETTINGS) as pool:
        yield pool


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, make_graph())


def test_two_actors_give_the_bytes_of_one_process(pool: ActorPool, world: World) -> None:
    graph = world.cut(2)
    for kind in ("gcn", "gat"):
        storage, model = world.model(kind)
        out, alone = world.storage(f"ray-{kind}"), world.storage(f"alone-{kind}")
        found = infer_nodes(storage, graph, out, WANTS, SETTINGS, fingerprint="f" * 64, pool=pool)
        assert found == infer_nodes(storage, graph, alone, WANTS, SETTINGS, fingerprint="f" * 64)
        with torch.no_grad():
            assert_close(whole(graph, out, found, "logits"), model(world.graph.x, world.graph.edge_index))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_actor_that_dies_or_hangs_changes_nothing(
    pool: ActorPool, world: World, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor, "_WAIT_S", 0.5)
    monkeypatch.setattr(actor, "_SILENT_S", 3.0)
    graph, (storage, _) = world.cut(4), world.model("sage")
    pids = pool.pids()
    victim = psutil.Process(pids[0])

    def strike(done: int, total: int) -> None:
        if done == 2:
            os.kill(pids[0], how)

    out, alone = world.storage("ray"), world.storage("alone")
    found = infer_nodes(storage, graph, out, WANTS, SETTINGS, fingerprint="f" * 64, pool=pool, progress=strike)
    assert pids[0] not in pool.pids()
    if victim.is_running():
        victim.wait(timeout=30)  # Ray asks a silent process to leave before it kills it
    assert found == infer_nodes(storage, graph, alone, WANTS, SETTINGS, fingerprint="f" * 64)


def test_actors_that_are_lost_too_often_end_the_run_which_can_go_on(ray_runs: None, world: World) -> None:
    graph, (storage, _), out = world.cut(2), world.model("gcn"), world.storage("k")
    once = SETTINGS.model_copy(update={"num_actors": 1, "max_restarts": 0, "max_task_retries": 5})
    with ActorPool(once) as pool:
        pids = pool.pids()

        def kill(done: int, total: int) -> None:
            if done == 3:
                os.kill(pids[0], signal.SIGKILL)

        with pytest.raises(TeacherError, match="all 1 inference actors were lost, each after 0 restarts"):
            infer_nodes(storage, graph, out, WANTS, once, fingerprint="f" * 64, pool=pool, progress=kill)
    steps: list[tuple[int, int]] = []
    infer_nodes(storage, graph, out, WANTS, SETTINGS, fingerprint="f" * 64, progress=lambda *step: steps.append(step))
    (resumed_at, num_tasks), last = steps[0], steps[-1]
    assert 3 <= resumed_at < num_tasks
    assert last == (num_tasks, num_tasks)


def test_errors_of_ours_come_back_as_they_were_raised(pool: ActorPool, world: World) -> None:
    graph, (storage, _) = world.cut(2), world.model("gcn")
    entry = graph.manifest.parts[1]
    damaged = bytearray(graph.storage.read(entry.key))
    damaged[entry.tensors[0].start] ^= 1
    world.graph.x[0, 0] = torch.nan
    poisoned = world.cut(2, "random")
    with pytest.raises(ModelError, match="NaN or infinite") as caught:
        infer_nodes(storage, poisoned, world.storage("a"), WANTS, SETTINGS, fingerprint="a" * 64, pool=pool)
    assert type(caught.value) is ModelError
    graph.storage.write(entry.key, damaged)
    with pytest.raises(ShardError, match="part-00001-"):
        infer_nodes(storage, graph, world.storage("b"), WANTS, SETTINGS, fingerprint="b" * 64, pool=pool)


def test_a_running_cluster_is_joined_and_left_alone(ray_runs: None) -> None:
    import ray

    program = """
import sys
import threading
from gkd_dist.config import RayConfig
from gkd_dist.infer.cluster import start_ray
with start_ray(RayConfig(address=sys.argv[1]), 2, 0):
    import ray
    print(ray.get(ray.remote(lambda: 6 * 7).remote()))
"""
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", program, address], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "42", done.stderr
    assert ray.cluster_resources()["CPU"] == 2


def test_more_than_the_cluster_has_is_refused_with_both_numbers(ray_runs: None) -> None:
    with (
        pytest.raises(InfrastructureError, match="needs 99 CPUs and 0 GPUs at a time, the running Ray has 2 and 0"),
        start_ray(RayConfig(timeout_s=0.5), 99, 0),
    ):
        pass


def test_a_straggler_is_named_once(
    pool: ActorPool, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(actor, "_WAIT_S", 0.5)
    monkeypatch.setattr(actor, "_SILENT_S", 60.0)
    monkeypatch.setattr(times, "SHORTEST_STRAGGLE_S", 1.0)
    graph, (storage, _) = world.cut(8, "random"), world.model("sage")
    stopped = psutil.Process(pool.pids()[0])
    going_on = threading.Timer(4.0, stopped.resume)

    def stop(done: int, total: int) -> None:
        if done == 4:
            stopped.suspend()
            going_on.start()

    try:
        infer_nodes(storage, graph, world.storage("k"), WANTS, SETTINGS, fingerprint="f" * 64, pool=pool, progress=stop)
    finally:
        going_on.join()
    told = [record.message for record in caplog.records if record.message.startswith("straggler: layer 1 of part")]
    assert told
    assert all(f"process {stopped.pid}" in line for line in told)
    assert len(told) == len(set(told)) <= SETTINGS.window


@pytest.fixture(scope="module", params=[1, 2, 4])
def any_pool(request: pytest.FixtureRequest, ray_runs: None) -> Iterator[ActorPool]:
    """Pools of one, two and four actors."""
    with ActorPool(SETTINGS.model_copy(update={"num_actors": request.param, "cpus_per_actor": 0.25})) as pool:
        yield pool


PYG_TEACHERS = {
    "gcn": ("GCN", {"norm": "batch_norm", "jk": "cat"}),
    "sage": ("GraphSAGE", {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}}),
    "gat": ("GAT", {"heads": 2, "residual": True, "jk": "last"}),
    "gin": ("GIN", {"act": "elu"}),
    "pna": ("PNA", {"act_first": True, "norm": "batch_norm"}),
    "edgecnn": ("EdgeCNN", {}),
}


@pytest.mark.parametrize("method", ["metis", "random"])
@pytest.mark.parametrize("name", PYG_TEACHERS)
def test_stored_logits_are_those_of_pyg_on_the_whole_graph(
    any_pool: ActorPool, tmp_path: Path, name: str, method: str
) -> None:
    world = World(tmp_path, make_graph(num_nodes=80, num_edges=400))
    graph = world.cut(4, method)
    kind, args = PYG_TEACHERS[name]
    code = f"torch_geometric.nn:{kind}"
    config = ModelConfig.model_validate({"kind": code, "layers": 3, "args": {"hidden_channels": 8, **args}})
    storage, model = world.store_model(resolve_model(config, graph.manifest.meta))
    out = world.storage("k")
    found = infer_nodes(
        storage, graph, out, WANTS, SETTINGS, fingerprint="f" * 64, pool=any_pool, allow_code=[code]
    )  # fmt: skip
    assert found.meta["mode"] == "layerwise"
    with torch.no_grad():
        assert_close(whole(graph, out, found, "logits"), model(world.graph.x, world.graph.edge_index))


def test_a_resource_that_no_node_has_is_not_waited_for(ray_runs: None, world: World) -> None:
    graph, (storage, _) = world.cut(2), world.model("gcn")
    for update in ({"resources": {"highmem": 1.0}}, {"memory_per_actor": 1 << 60}):
        settings = SETTINGS.model_copy(update=update)
        with ActorPool(settings) as pool, pytest.raises(InfrastructureError, match="2 inference actors need"):
            infer_nodes(storage, graph, world.storage("k"), WANTS, settings, fingerprint="f" * 64, pool=pool)
