"""Wrong input, one kind after the other: one clear sentence, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from flow_runs import ON_RAY, Job, digests, flip_byte, flip_in_tensor, gkd, make_job

from gkd_dist import layout, save_arrays
from gkd_dist.graph import Graph

BOUND_S = 20.0  # of every refusal, start of Python and torch included


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


def refused(job: Job, code: int, *arguments: str) -> str:
    """What the command complains about; nothing is left that a later run would trust."""
    started = time.monotonic()
    outcome = job.gkd(*arguments)
    assert outcome.code == code, outcome.err
    assert time.monotonic() - started < BOUND_S
    assert outcome.out == ""
    assert outcome.done == []
    assert not (job.run / layout.OWNER).exists()
    return outcome.complaint


def untouched(job: Job) -> bool:
    return not job.run.exists()


# --- the configuration: exit 2, before anything is touched -----------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("distill.num_worker=2", "override distill.num_worker=2: unknown key; did you mean num_workers?"),
        ("infer.dtype=fp8", "infer.dtype"),
        ("infer.scores_dtype=int8", "infer.scores_dtype"),
        ("infer.logits=0", "infer.logits"),
        ("infer.max_kl=-1", "infer.max_kl"),
        ("distill.lr=fast", 'expected a number > 0, got "fast"'),
        ("distill.epochs=2.5", "distill.epochs"),
        ("distill.epochs=true", "distill.epochs"),
        ("student.model.hidden=-4", "student.model.hidden"),
        ("partition.num_parts=0", "partition.num_parts"),
        ("graph.source.num_nodes=0", "graph.source.num_nodes"),
        ("teacher.train.lr=0", "teacher.train.lr"),
        ("losses.2.teacher_layer=3", "layer 3 does not exist in a model of 2 layers (1..2 or -2..-1)"),
        ("losses.2.student_layer=-3", "layer -3 does not exist in a model of 2 layers"),
        ("losses.2.teacher_layer=0", "layer 0 does not exist"),
        ("losses=[]", "losses"),
        ("losses.0.kind=labels", "losses.0"),
        ("teacher.model.kind=gnn", "teacher.model.kind"),
        ("distill.num_workers=2", "distill.launcher inline is one process (got distill.num_workers 2)"),
        (
            "distill.num_workers=[1,2]",
            "distill.num_workers [1, 2] changes while the students train, which distill.launc",
        ),
        ("distill.num_workers=[3,2]", "[min, max] needs min <= max (got [3, 2]); swap them"),
        ("distill.num_workers=[0,2]", "distill.num_workers"),
        ("distill.num_workers=[1,2,3]", "distill.num_workers"),
        ("distill.deepspeed.fp16={enabled: true}", "set that instead"),
        ("run=s3://", "names no bucket"),
        ("run=nowhere://x/y", "nowhere"),
        ("storage.options.s3.secret=abc", None),
        ("no_equals_sign", "no_equals_sign"),
    ],
)
def test_a_wrong_configuration(job: Job, override: str, sentence: str | None) -> None:
    overrides = [override, "run=s3://bucket/x"] if sentence is None else [override]
    complaint = refused(job, 2, "run", *overrides)
    assert (sentence or "holds credentials") in complaint
    assert "abc" not in complaint
    assert untouched(job)


def test_a_memory_run_in_many_processes(job: Job) -> None:
    assert "a memory: run lives in one process" in refused(job, 2, "run", "run=memory://x", *ON_RAY)


@pytest.mark.parametrize("text", ["", "run: [", "- a", "run: 1\nrun: 2", "\x00"])
def test_a_file_that_is_no_configuration(job: Job, text: str) -> None:
    job.config.write_text(text)
    assert str(job.config) in refused(job, 2, "run")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    outcome = gkd("run", str(tmp_path / "none.yaml"))
    assert outcome.code == 2
    assert "none.yaml: no such file" in outcome.complaint
    outcome = gkd("verify", str(tmp_path))
    assert outcome.code == 2
    assert "is neither a configuration file nor a run" in outcome.complaint


def test_fp16_only_where_the_processor_has_it(job: Job) -> None:
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        assert job.gkd("run", "distill.precision=fp16", "--dry-run").code == 0
        return
    assert "fp16 needs a GPU or CPUs with fp16 arithmetic" in refused(job, 2, "run", "distill.precision=fp16")
    assert untouched(job)


@pytest.mark.parametrize("key", ["infer.gpus_per_actor", "distill.gpus_per_worker"])
def test_more_gpus_than_there_are(job: Job, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    complaint = refused(job, 2, "run", *ON_RAY, f"{key}=50")
    assert "the run asks for 100 GPUs at a time (infer.gpus_per_actor, distill.gpus_per_worker)" in complaint
    assert f"here are {torch.cuda.device_count()}" in complaint
    assert untouched(job)


@pytest.mark.parametrize(("kind", "why"), [("no_such_module:Net", "PYTHONPATH"), ("user_models:Absent", "Absent")])
def test_user_code_that_cannot_be_imported(job: Job, kind: str, why: str) -> None:
    complaint = refused(job, 2, "run", f"student.model.kind={kind}", "losses=[{kind: label}]")
    assert kind in complaint
    assert why in complaint
    assert untouched(job)


# --- the data: exit 3 ------------------------------------------------------------------------


def test_more_parts_than_nodes(job: Job) -> None:
    complaint = refused(job, 3, "run", "partition.num_parts=401")
    assert "401" in complaint
    assert "400" in complaint
    assert not (job.run / "graph/manifest.json").exists()


@pytest.mark.parametrize(
    ("loops", "sentence"), [(0, "the graph has no edges; check edge_index"), (30, "an LSP loss needs edges")]
)
def test_a_structure_loss_without_structure(job: Job, tmp_path: Path, loops: int, sentence: str) -> None:
    masks = torch.arange(30).view(3, 10)
    split = {f"{name}_mask": torch.isin(torch.arange(30), masks[i]) for i, name in enumerate(("train", "val", "test"))}
    lonely = Graph(torch.randn(30, 8), torch.arange(loops).repeat(2, 1), torch.arange(30) % 3, **split, num_classes=3)
    save_arrays(str(tmp_path / "lonely.npz"), lonely)
    source = (f"graph.source={{kind: arrays, path: {tmp_path}/lonely.npz}}",)
    outcome = job.gkd("run", *source)
    assert outcome.code == 3
    assert sentence in outcome.complaint
    assert not (job.run / "students").exists()
    if loops:
        assert job.gkd("run", *source, "losses=[{kind: label}, {kind: kd}]").code == 0


@pytest.mark.parametrize(
    ("source", "code", "sentence"),
    [
        ("{kind: arrays, path: /nowhere/graph.npz}", 3, "there is no file /nowhere/graph.npz"),
        ("{kind: arrays, path: /nowhere}", 3, "there are no arrays in /nowhere"),
        ("{kind: pyg, name: Planetoidd}", 2, "Planetoidd"),
    ],
)
def test_a_data_set_that_is_not_there(job: Job, source: str, code: int, sentence: str) -> None:
    assert sentence in refused(job, code, "run", f"graph.source={source}")
    assert not (job.run / "graph/manifest.json").exists()


@pytest.fixture
def teacher(finished: Job, tmp_path: Path) -> Path:
    """A checkpoint that fits."""
    file = tmp_path / "teacher.safetensors"
    file.write_bytes((finished.run / "teacher/model.safetensors").read_bytes())
    return file


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def no_tensors(file: Path) -> None:
    file.write_bytes(b"{}")


@pytest.mark.parametrize("damage", [Path.unlink, truncate, no_tensors])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_that_cannot_be_read(job: Job, teacher: Path, damage: Callable[[Path], None], suffix: str) -> None:
    file = teacher.with_suffix(suffix)
    if suffix == ".pt":
        torch.save({"weight": torch.zeros(1000)}, file)
    damage(file)
    outcome = job.gkd("run", f"teacher.checkpoint={file}")
    assert outcome.code == 3
    assert file.name in outcome.complaint
    assert outcome.done == ["partition"]
    assert not (job.run / "teacher/model.json").exists()


def test_a_checkpoint_with_code_in_it(job: Job, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"weight": Trap()}, tmp_path / "teacher.pt")
    outcome = job.gkd("run", f"teacher.checkpoint={tmp_path}/teacher.pt")
    assert outcome.code == 3
    assert "holds more than tensors" in outcome.complaint
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("teacher.model.hidden=32", "[16, 8], needed [32, 8]"),
        ("teacher.model.kind=gcn", "do not fit the model"),
        ("teacher.model.norm=layer", "2 missing (norms.0.bias [16], norms.0.weight [16])"),
        ("graph.source.num_features=9", "[16, 8], needed [16, 9]"),
    ],
)
def test_a_teacher_that_does_not_fit(job: Job, teacher: Path, override: str, sentence: str) -> None:
    outcome = job.gkd("run", f"teacher.checkpoint={teacher}", override)
    assert outcome.code == 3
    assert sentence in outcome.complaint
    assert not (job.run / "teacher/model.json").exists()


def test_scores_coarser_than_allowed(copied: Job) -> None:
    coarse = "infer.scores_dtype=uint8"
    complaint = refused(copied, 3, "run", coarse, "infer.max_kl=1e-9")
    assert "as uint8" in complaint
    assert complaint.endswith("set infer.scores_dtype=fp16 or raise infer.max_kl and run the same command again")
    assert len(list(copied.run.glob("knowledge/*/manifest.json"))) == 1  # that of the finished run
    assert copied.gkd("infer", coarse, "infer.max_kl=0.01").code == 0
    # a narrower width reads the same scores, and is checked before a student is trained with it
    complaint = refused(copied, 3, "distill", coarse, "infer.max_kl=0.01", "losses.2.teacher_sigma=0.001")
    assert "infer.max_kl 0.01" in complaint


def test_the_largest_of_binary_labels(job: Job, tmp_path: Path) -> None:
    masks = torch.arange(30) % 3
    split = {f"{name}_mask": masks == i for i, name in enumerate(("train", "val", "test"))}
    y, edges = (torch.rand(30, 3) > 0.5).float(), torch.stack([torch.arange(30), torch.arange(30).roll(1)])
    save_arrays(
        str(tmp_path / "labels.npz"), Graph(torch.randn(30, 8), edges, y, **split, num_classes=3, task="multilabel")
    )
    source = (f"graph.source={{kind: arrays, path: {tmp_path}/labels.npz}}",)
    outcome = job.gkd("run", *source, "infer.logits=2")
    assert outcome.code == 2
    assert outcome.complaint.endswith("have no largest ones; set infer.logits=all")
    assert not list(job.run.glob("knowledge/*/tmp*"))


# --- what is stored: exit 3, before anything is made of it -----------------------------------


def test_a_flipped_byte_in_the_graph(copied: Job) -> None:
    (file,) = copied.run.glob("graph/part-00001*")
    flip_in_tensor(file, "graph", "x")
    students = digests(copied.run, "students/*/model.*")
    complaint = refused(copied, 3, "run", "distill.lr=0.5")
    assert file.name in complaint
    assert digests(copied.run, "students/*/model.*") == students  # those of the finished run before


def test_a_flipped_byte_in_the_teacher(copied: Job) -> None:
    file = copied.run / "teacher/model.safetensors"
    flip_byte(file)
    complaint = refused(copied, 3, "run", "--redo", "infer")
    assert f"{file} is altered" in complaint
    assert not list(copied.run.glob("knowledge/*/manifest.json"))


def test_a_truncated_shard(copied: Job) -> None:
    (file,) = copied.run.glob("knowledge/*/part-00002*")
    truncate(file)
    assert file.name in refused(copied, 3, "run", "distill.lr=0.5")


def test_a_missing_shard(copied: Job) -> None:
    (file,) = copied.run.glob("knowledge/*/part-00002*")
    file.unlink()
    assert file.name in refused(copied, 3, "run", "distill.lr=0.5")


@pytest.mark.parametrize("pattern", ["graph/manifest.json", "knowledge/*/manifest.json"])
@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "--dry-run"), ("verify",), ("run", "--redo", "partition", "--redo", "infer")]
)
def test_a_manifest_of_a_later_version_is_left_alone(copied: Job, pattern: str, arguments: tuple[str, ...]) -> None:
    (file,) = copied.run.glob(pattern)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 99}))
    before = digests(copied.run, "graph/*", "knowledge/**/*")
    complaint = refused(copied, 3, *arguments)
    assert "99" in complaint
    assert "upgrade" in complaint
    assert digests(copied.run, "graph/*", "knowledge/**/*") == before


def test_a_model_of_a_later_version_is_left_alone(copied: Job) -> None:
    file = copied.run / "teacher/model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    before = digests(copied.run, "teacher/model.*")
    assert "upgrade" in refused(copied, 3, "run")
    assert digests(copied.run, "teacher/model.*") == before


# --- the stores and the cluster: exit 4, bounded in time -------------------------------------


@pytest.mark.parametrize("key", ["run", "stores.graph", "stores.knowledge"])
def test_a_store_that_cannot_be_written(job: Job, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text("in the way")
    complaint = refused(job, 4, "run", f"{key}={tmp_path}/file/store")
    assert "a file stands where a folder is needed; remove that file or use another folder" in complaint
    assert not list(job.run.glob("graph/*"))


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


@pytest.fixture
def s3_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("port", ["closed_port", "silent_port"])
@pytest.mark.usefixtures("s3_keys")
def test_an_s3_endpoint_that_does_not_answer(job: Job, request: pytest.FixtureRequest, port: str) -> None:
    endpoint = f"http://127.0.0.1:{request.getfixturevalue(port)}"
    overrides = (f"storage.options.s3.endpoint_url={endpoint}", "storage.timeout_s=2", "run=s3://bucket/run")
    complaint = refused(job, 4, "run", *overrides)
    assert "s3://bucket/run" in complaint
    assert "check the endpoint and the network" in complaint


def test_a_bucket_that_does_not_exist(job: Job, s3_server: str) -> None:
    pytest.importorskip("s3fs", reason="needs the extra: pip install 'gkd_dist[s3]'")
    assert "the bucket does not exist; create it" in refused(job, 4, "run", "run=s3://elsewhere/run")


@pytest.mark.parametrize("port", ["closed_port", "silent_port"])
def test_a_ray_address_that_does_not_answer(job: Job, request: pytest.FixtureRequest, port: str) -> None:
    address = f"127.0.0.1:{request.getfixturevalue(port)}"
    outcome = job.gkd("run", *ON_RAY, f"ray.address={address}", "ray.timeout_s=2")
    assert outcome.code == 4
    assert address in outcome.complaint
    assert outcome.done == ["partition", "teach"]
    assert not (job.run / layout.OWNER).exists()
