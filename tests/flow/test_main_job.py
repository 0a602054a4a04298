"""The whole flow: what each stage leaves, what is done again, and what one can do with the result."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import torch
from flow_runs import BASE, ON_RAY, STAGES, Job, digests, flip_byte, flip_in_tensor, gkd, gkd_process, make_job, results
from infer_worlds import assert_close
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

from gkd_dist import layout, load_model, load_student, load_teacher
from gkd_dist.config import Config
from gkd_dist.data.sources import load_graph
from gkd_dist.graph import Graph
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.quantise import unpack_float
from gkd_dist.shards.reader import read_shard
from gkd_dist.storage import Storage
from gkd_dist.tensorboard import read_curves

pytestmark = pytest.mark.timeout(300)


def graph_of(config: Config) -> Graph:
    return load_graph(config.graph, config.seed)


def stored_logits(store: GraphStore, knowledge: Storage) -> Tensor:
    """Logits of all nodes by global id, whatever the cut."""
    manifest = Manifest.load(knowledge, "knowledge")
    found: list[tuple[Tensor, Tensor]] = []
    for part, entry in enumerate(manifest.parts):
        logits = unpack_float(read_shard(knowledge, entry, ["logits"])["logits"], entry.meta["floats"]["logits"])
        found.append((store.part(part, ["n_id"])["n_id"][: logits.size(0)], logits))
    ids, logits = (torch.cat(column) for column in zip(*found, strict=True))
    return logits[ids.argsort()]


def knowledge_folder(job: Job) -> Storage:
    (manifest,) = job.run.glob("knowledge/*/manifest.json")
    return Storage.open(str(manifest.parent))


# --- what is there after a run ---------------------------------------------------------------


def test_every_stage_leaves_what_the_layout_says(finished: Job) -> None:
    keys = {re.sub(r"[0-9a-f]{8}(?=\.|/)", "<8>", str(f.relative_to(finished.run))) for f in finished.run.rglob("*")}
    parts = [f"part-{index:05d}-<8>.safetensors" for index in range(3)]
    expected = {"config.yaml", "metrics.json", "report.html", "export/README.md"}
    expected |= {f"stages/{stage}.json" for stage in STAGES}
    expected |= {
        f"{store}/{name}" for store in ("graph", "knowledge/teacher-<8>") for name in ("manifest.json", *parts)
    }
    for model in ("teacher", "students/distilled", "students/alone", "export"):
        expected |= {f"{model}/model.json", f"{model}/model.safetensors"}
    for student in ("distilled", "alone"):
        expected |= {f"students/{student}/predictions/manifest.json"}
        expected |= {f"students/{student}/checkpoints/{name}" for name in ("latest.json", "step-<8>/COMMIT.json")}
    assert expected <= keys
    assert not {key for key in keys if "tmp-" in key or "owner" in key or "probe" in key or "progress" in key}
    assert all(list(finished.run.glob(f"tensorboard/{name}/events*")) for name in ("teacher", "distilled", "alone"))


def test_metrics_hold_what_is_documented(finished: Job) -> None:
    metrics = json.loads((finished.run / layout.METRICS).read_text())
    assert set(metrics["models"]) == {"teacher", "distilled", "alone"}
    for name, row in metrics["models"].items():
        assert row["metric"] == "accuracy"
        assert all(0 <= row["accuracy"][split] <= 1 for split in ("train", "val", "test"))
        assert row["num_params"] > 0
        assert row["inference_s"] > 0
        assert (row["agreement"] is None) == (name == "teacher")
        assert (row["lsp_kl"] is None) == (name == "teacher")
    assert metrics["models"]["teacher"]["num_params"] == 16 * (8 + 8 + 1) + 3 * (16 + 16 + 1)
    assert metrics["seed"] == 0
    assert {"partition", "teach", "infer", "distill"} <= set(metrics["stages"])
    summary = metrics["stages"]["distill distilled"]
    assert summary["epochs_run"] == 6
    assert 0 <= summary["best_epoch"] < 6
    assert all(stage["wall_s"] > 0 and stage["peak_rss_bytes"] > 0 for stage in metrics["stages"].values())
    assert {"python", "torch", "ray", "deepspeed"} <= set(metrics["versions"])


def test_the_reported_accuracy_is_that_of_the_stored_student(finished: Job) -> None:
    config = finished.load()
    graph, student = graph_of(config), load_student(str(finished.run))
    with torch.no_grad():
        right = student(graph.x, graph.edge_index).argmax(1) == graph.y
    accuracy = json.loads((finished.run / layout.METRICS).read_text())["models"]["distilled"]["accuracy"]
    for split, mask in (("train", graph.train_mask), ("val", graph.val_mask), ("test", graph.test_mask)):
        assert accuracy[split] == pytest.approx(float(right[mask].double().mean()), abs=1e-9)


def test_curves_have_their_documented_names(finished: Job) -> None:
    curves = read_curves(Storage.open(str(finished.run / "tensorboard" / "distilled")))
    steps = 6 * 2  # three parts, two units per step
    for name in ("loss/label", "loss/kd", "loss/lsp", "loss/total", "lsp/kl", "lr", "grad_norm", "time/step_s"):
        assert [step for step, _ in curves[name]] == list(range(1, steps + 1)), name
    for name in ("throughput/nodes_per_s", "stream/wait_s", "stream/wait_fraction", "memory/rss_bytes"):
        assert len(curves[name]) == steps
    for split in ("train", "val", "test"):
        assert [step for step, _ in curves[f"accuracy/{split}"]] == [2, 4, 6, 8, 10, 12]
    assert [value for _, value in curves["epoch"]] == [1, 2, 3, 4, 5, 6]
    assert "loss/kd" not in read_curves(Storage.open(str(finished.run / "tensorboard" / "alone")))


def test_the_report_needs_nothing_beside_itself(finished: Job) -> None:
    html = (finished.run / layout.REPORT).read_text()
    assert not re.findall(r"<script|<link|<iframe|src\s*=\s*[\"'](?!data:)|url\((?!#|data:)|@import", html)
    assert {"student distilled", "student alone", "teacher"} <= set(re.findall(r">([^<>]+)<", html))
    assert html.count("<svg") >= 3


def test_the_second_run_skips_all_and_prints_the_table(finished: Job) -> None:
    before = digests(finished.run, "**/*")
    dry = finished.gkd("run", "--dry-run")
    assert [line.split()[:2] for line in dry.out.splitlines()[: len(STAGES)]] == [[stage, "skip"] for stage in STAGES]
    assert "scores.1.sqeuclidean" in dry.out
    decisions = finished.gkd("run", "--dry-run", "--json").json
    assert [one["action"] for one in decisions] == ["skip"] * len(STAGES)
    (manifest,) = finished.run.glob("knowledge/*/manifest.json")
    parts = Manifest.load(Storage.open(str(manifest.parent)), "knowledge").parts
    tensors = [tensor for part in parts for tensor in part.tensors]
    planned = decisions[STAGES.index("infer")]["knowledge"]
    assert planned["num_bytes"] == sum(tensor.stop - tensor.start for tensor in tensors)
    again = finished.gkd("run")
    assert (again.code, again.done) == (0, [])
    assert digests(finished.run, "**/*") == before
    lines = again.out.splitlines()
    assert lines[0].split()[:2] == ["model", "train"]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[2:5]] == ["teacher", "student alone", "student distilled"]
    assert f"tensorboard --logdir {finished.run}/tensorboard" in again.out
    assert finished.gkd("run", "--json").json["models"].keys() == {"teacher", "alone", "distilled"}


# --- done again, and only that ---------------------------------------------------------------


def test_a_changed_learning_rate_trains_the_students_again_and_nothing_before(copied: Job) -> None:
    earlier = ("graph/*", "teacher/*", "knowledge/**/*")
    before, weights = digests(copied.run, *earlier), digests(copied.run, "students/*/model.safetensors")
    outcome = copied.gkd("run", "distill.lr=0.05")
    assert outcome.code == 0
    assert outcome.done == ["distill", "evaluate", "export", "report"]
    assert digests(copied.run, *earlier) == before
    after = digests(copied.run, "students/*/model.safetensors")
    assert all(after[key] != weights[key] for key in weights)


def test_a_changed_loss_weight_leaves_the_student_alone_as_it_is(copied: Job) -> None:
    before = digests(copied.run, "knowledge/**/*", "students/*/model.json")
    assert copied.gkd("run", "losses.1.weight=3").code == 0
    after = digests(copied.run, "knowledge/**/*", "students/*/model.json")
    assert [key for key in before if after.get(key) != before[key]] == ["students/distilled/model.json"]


def test_redo_gives_the_same_bits(copied: Job, finished: Job) -> None:
    outcome = copied.gkd("run", "--redo", "partition", "--redo", "infer", "--redo", "distill")
    assert outcome.code == 0
    assert outcome.done == ["partition", "infer", "distill"]  # what follows was made of the same bits
    assert results(copied.run) == results(finished.run)


def test_redo_of_one_verb(copied: Job) -> None:
    outcome = copied.gkd("teach", "--redo", "--json")
    assert outcome.json["stage"] == "teach"
    assert outcome.done == ["teach"]
    assert copied.gkd("teach").done == []
    assert copied.gkd("teach", "--dry-run", "--json").json == [
        {"stage": "teach", "action": "skip", "reason": "teacher/ is finished and of this configuration"}
    ]


@pytest.mark.slow
def test_stages_one_by_one_in_fresh_processes(tmp_path: Path, finished: Job) -> None:
    job = make_job(tmp_path)
    early = gkd_process("distill", str(job.config))
    assert early.code == 3
    assert "run `gkd partition` first" in early.complaint
    for stage in STAGES:
        outcome = gkd_process(stage, str(job.config))
        assert (outcome.code, outcome.done) == (0, [stage]), outcome.err
    assert "student distilled" in gkd_process("evaluate", str(job.config)).out
    assert results(job.run) == results(finished.run)


def test_early_stopping_keeps_the_best_epoch(copied: Job) -> None:
    assert copied.gkd("distill", "distill.epochs=200", "distill.patience=2", "distill.lr=0.2").code == 0
    document = json.loads((copied.run / "students/distilled/model.json").read_text())
    summary = document["meta"]["summary"]
    assert summary["epochs_run"] < 200
    assert summary["best_epoch"] == summary["epochs_run"] - 1 - 2
    values = read_curves(Storage.open(str(copied.run / "tensorboard/distilled")))["accuracy/val"]
    assert summary["best_val"] == pytest.approx(max(value for _, value in values), abs=1e-6)


# --- other stores ----------------------------------------------------------------------------


@pytest.fixture
def _no_memory() -> Iterator[None]:
    """Empties the store of this process, which outlives a run."""
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.mark.usefixtures("_no_memory")
def test_a_run_in_memory(tmp_path: Path, finished: Job) -> None:
    job = make_job(tmp_path)
    outcome = job.gkd("run", "run=memory://whole-run")
    assert outcome.code == 0, outcome.err
    assert outcome.done == STAGES
    assert not job.run.exists()
    store = Storage.open("memory://whole-run")
    expected = digests(finished.run, "students/*/model.safetensors")
    assert all(store.read(key) == (finished.run / key).read_bytes() for key in expected)
    assert read_curves(store.child("tensorboard/distilled")).keys() >= {"loss/lsp", "accuracy/val"}
    assert job.gkd("run", "run=memory://whole-run").done == []


def test_two_runs_share_graph_and_knowledge(tmp_path: Path) -> None:
    shared = (f"stores.graph={tmp_path}/graph", f"stores.knowledge={tmp_path}/knowledge")
    one, two = make_job(tmp_path / "one"), make_job(tmp_path / "two")
    assert one.gkd("run", *shared).code == 0
    second = two.gkd("run", *shared, "student.model.hidden=4", "student.alone=false")
    assert second.done == ["teach", "distill", "evaluate", "export", "report"]
    assert not (two.run / "graph").exists()
    assert not (two.run / "students/alone").exists()


# --- using the result ------------------------------------------------------------------------


def parquet(folder: Path) -> dict[str, Tensor]:
    """Columns of all parts in the order of global ids."""
    table = pq.read_table(sorted(folder.glob("*.parquet")))
    ids = torch.from_numpy(table["n_id"].to_numpy())
    columns = {name: torch.tensor(table[name].to_pylist()) for name in table.column_names}
    assert torch.equal(ids.sort().values, torch.arange(table.num_rows))
    return {name: column[ids.argsort()] for name, column in columns.items()}


@pytest.mark.parametrize("model", ["distilled", "alone", "teacher"])
def test_predictions_are_those_of_the_loaded_model(finished: Job, tmp_path: Path, model: str) -> None:
    outcome = finished.gkd("predict", "--model", model, "--out", str(tmp_path / "out"))
    assert (outcome.code, outcome.out) == (0, f"400 nodes in file://{tmp_path}/out\n")
    graph, found = graph_of(finished.load()), parquet(tmp_path / "out")
    module = load_teacher(str(finished.run)) if model == "teacher" else load_student(str(finished.run), model)
    with torch.no_grad():
        logits = module(graph.x, graph.edge_index)
    torch.testing.assert_close(found["logits"], logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(found["predicted"], found["logits"].argmax(1))
    assert not module.training


def test_predictions_as_safetensors_with_embeddings(finished: Job, tmp_path: Path) -> None:
    arguments = ("predict", "--out", str(tmp_path), "--format", "safetensors", "--embeddings", "--json")
    written = finished.gkd(*arguments).json
    assert (written["num_nodes"], len(written["files"])) == (400, 3)
    parts = [load_file(tmp_path / name) for name in written["files"]]
    ids = torch.cat([part["n_id"] for part in parts])
    graph = graph_of(finished.load())
    with torch.no_grad():
        logits, layers = load_student(str(finished.run))(graph.x, graph.edge_index, layers=(1,))
    torch.testing.assert_close(torch.cat([p["logits"] for p in parts]), logits[ids], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([p["embeddings"] for p in parts]), layers[1][ids], atol=1e-4, rtol=1e-4)


def test_predictions_for_another_graph(finished: Job, tmp_path: Path) -> None:
    small = BASE.replace("num_nodes: 400", "num_nodes: 90").replace(
        "partition:", "  split: {{kind: random}}\npartition:"
    )
    other = make_job(tmp_path / "other", small)
    arguments = ("predict", "--graph", str(other.config), "--out", str(tmp_path / "out"))
    assert finished.gkd(*arguments).code == 0
    graph = graph_of(other.load())
    with torch.no_grad():
        logits = load_student(str(finished.run))(graph.x, graph.edge_index)
    torch.testing.assert_close(parquet(tmp_path / "out")["logits"], logits, atol=1e-4, rtol=1e-4)


def test_the_exported_folder_is_enough(finished: Job, tmp_path: Path) -> None:
    shutil.copytree(finished.run / "export", tmp_path / "student")
    graph = graph_of(finished.load())
    with torch.no_grad():
        alone = load_model(str(tmp_path / "student"))(graph.x, graph.edge_index)
        stored = load_student(str(finished.run))(graph.x, graph.edge_index)
    assert torch.equal(alone, stored)
    assert "gkd_dist.load_model" in (tmp_path / "student" / "README.md").read_text()


# --- exactness against plain PyG -------------------------------------------------------------


class PlainTeacher(nn.Module):
    """Two convolutions as anyone would write them with PyG."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList([first, second])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """[n, f] to [n, c]."""
        return self.convs[1](self.convs[0](x, edge_index).relu(), edge_index)


def gin(channels: int, out: int) -> GINConv:
    return GINConv(nn.Sequential(nn.Linear(channels, out), nn.ReLU(), nn.Linear(out, out)), train_eps=True)


PLAIN = {
    "sage": (lambda: (SAGEConv(8, 16), SAGEConv(16, 3))),
    "gcn": (lambda: (GCNConv(8, 16), GCNConv(16, 3))),
    "gat": (lambda: (GATConv(8, 4, heads=4), GATConv(16, 3))),
    "gin": (lambda: (gin(8, 16), gin(16, 3))),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_what_is_stored_of_a_given_teacher_is_its_plain_forward(tmp_path: Path, kind: str, suffix: str) -> None:
    torch.manual_seed(3)
    plain = PlainTeacher(*PLAIN[kind]()).eval()
    checkpoint = tmp_path / f"teacher.{suffix}"
    if suffix == "pt":
        torch.save({"epoch": 7, "state_dict": plain.state_dict()}, checkpoint)
    else:
        save_file({name: value.contiguous() for name, value in plain.state_dict().items()}, checkpoint)
    job = make_job(tmp_path)
    heads = ("teacher.model.hidden=4", "teacher.model.heads=4") if kind == "gat" else ()
    overrides = (f"teacher.model.kind={kind}", f"teacher.checkpoint={checkpoint}", *heads)
    for stage in STAGES[:3]:
        outcome = job.gkd(stage, *overrides)
        assert outcome.code == 0, outcome.err
    graph = graph_of(job.load())
    with torch.no_grad():
        expected = plain(graph.x, graph.edge_index)
    found = stored_logits(GraphStore.open(Storage.open(str(job.run / "graph"))), knowledge_folder(job))
    assert_close(found, expected)


def test_what_is_stored_of_a_trained_teacher_is_its_plain_forward(finished: Job) -> None:
    plain = PlainTeacher(SAGEConv(8, 16), SAGEConv(16, 3))
    plain.load_state_dict(load_file(finished.run / "teacher/model.safetensors"))
    graph = graph_of(finished.load())
    with torch.no_grad():
        expected = plain(graph.x, graph.edge_index)
    found = stored_logits(GraphStore.open(Storage.open(str(finished.run / "graph"))), knowledge_folder(finished))
    assert_close(found, expected)


# --- damage ----------------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte_and_names_the_object(copied: Job) -> None:
    well = copied.gkd("verify")
    assert well.code == 0
    assert well.out.endswith("all well\n")
    for number, pattern in enumerate(("graph/part-00001*", "knowledge/*/part-00002*", "students/alone/*.safetensors")):
        (file,) = copied.run.glob(pattern)
        flip_byte(file)
        outcome = copied.gkd("verify", "--json")
        assert outcome.code == 3
        assert len(outcome.json["problems"]) == number + 1
        assert any(file.name in problem for problem in outcome.json["problems"])


def test_verify_takes_the_url_of_a_run(copied: Job) -> None:
    outcome = gkd("verify", str(copied.run), "--orphans")
    assert (outcome.code, "orphan" in outcome.out) == (0, False)
    (copied.run / "graph/part-00000-0123abcd.safetensors").write_bytes(b"left behind")
    assert f"orphan: file://{copied.run}/graph/part-00000-0123abcd" in gkd("verify", str(copied.run), "--orphans").out
    assert gkd("verify", str(copied.run), "--prune").code == 0
    assert not (copied.run / "graph/part-00000-0123abcd.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "pattern", "tensor"),
    [("knowledge", "knowledge/*/part-00001*", "logits"), ("graph", "graph/part-00001*", "indices")],
    ids=["knowledge", "graph"],
)
def test_students_never_learn_from_a_damaged_shard(copied: Job, kind: str, pattern: str, tensor: str) -> None:
    (file,) = copied.run.glob(pattern)
    flip_in_tensor(file, kind, tensor)
    outcome = copied.gkd("distill", "--redo")
    assert outcome.code == 3
    assert file.name in outcome.complaint
    assert not (copied.run / "students/distilled/model.json").exists()
    stage = "infer" if kind == "knowledge" else "partition"
    again = copied.gkd("run", "--redo", stage)
    assert (again.code, again.done[:2]) == (0, [stage, "distill"])
    assert copied.gkd("verify").code == 0


# --- on Ray ----------------------------------------------------------------------------------


def assert_same_answers(job_run: Storage, finished: Job) -> None:
    """Two workers and one: equal metrics to rounding, and equal classes for 99.9 % of all nodes."""
    graph = GraphStore.open(Storage.open(str(finished.run / "graph")))
    for name in ("distilled", "alone"):
        key = f"students/{name}/predictions"
        one = stored_logits(graph, Storage.open(str(finished.run / key))).argmax(1)
        two = stored_logits(graph, job_run.child(key)).argmax(1)
        assert float((one == two).double().mean()) >= 0.999
    teacher = "teacher/model.safetensors"
    assert job_run.read(teacher) == (finished.run / teacher).read_bytes()


def test_two_workers_on_ray_end_like_one_process(tmp_path: Path, finished: Job) -> None:
    job = make_job(tmp_path)
    outcome = gkd_process("run", str(job.config), *ON_RAY)
    assert outcome.code == 0, outcome.err
    assert outcome.done == STAGES
    assert_same_answers(Storage.open(str(job.run)), finished)
    assert digests(job.run, "knowledge/**/*") == digests(finished.run, "knowledge/**/*")
    assert gkd("verify", str(job.run), "--orphans").out.endswith("\nall well\n")
    assert job.gkd("run").done == []  # who did the work does not matter


def test_two_workers_on_ray_and_s3(tmp_path: Path, finished: Job, s3_server: str) -> None:
    pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")
    job = make_job(tmp_path)
    outcome = gkd_process("run", str(job.config), "run=s3://bucket/run", *ON_RAY)
    assert outcome.code == 0, outcome.err
    assert outcome.done == STAGES
    assert not job.run.exists()
    store = Storage.open("s3://bucket/run")
    assert_same_answers(store, finished)
    assert read_curves(store.child("tensorboard/distilled")).keys() >= {"loss/lsp", "accuracy/val"}
    assert "<svg" in store.read(layout.REPORT).decode()
    assert gkd("verify", "s3://bucket/run").code == 0
    assert job.gkd("run", "run=s3://bucket/run").done == []


def test_an_error_of_the_program_ends_workers_on_ray_without_a_restart(copied: Job) -> None:
    model = ("student.alone=false", "student.model={kind: 'user_models:Stumbling'}", "losses=[{kind: label}]")
    on_ray = ("distill.launcher=ray", "distill.num_workers=2", "distill.max_failures=3")
    outcome = gkd_process("run", str(copied.config), *on_ray, *model)
    assert outcome.code == 1, outcome.err
    assert (
        "met an error of the program, which a restart cannot mend: TypeError: can only concatenate" in outcome.complaint
    )
    assert not list((copied.run / "students/distilled").glob("failure*"))


@pytest.mark.slow
def test_workers_on_ray_report_a_damaged_shard_as_what_it_is(copied: Job) -> None:
    (file,) = copied.run.glob("knowledge/*/part-00001*")
    flip_byte(file)
    outcome = gkd_process("distill", str(copied.config), "--redo", *ON_RAY)
    assert outcome.code == 3
    assert file.name in outcome.complaint
    assert not list((copied.run / "students/distilled").glob("failure*"))
