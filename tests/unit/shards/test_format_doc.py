"""docs/shard-format.md against stores that were really written: every name, in both directions."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

import pytest
import torch

from gkd_dist import layout
from gkd_dist.config import InferConfig, KdLoss, LspLoss, ModelConfig, PartitionConfig
from gkd_dist.graph import Graph
from gkd_dist.infer.packing import Packing
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.models.build import build_model
from gkd_dist.models.io import ModelSpec, save_model
from gkd_dist.owner import Ownership
from gkd_dist.partition.build import build_graph_store
from gkd_dist.partition.store import GraphStore
from gkd_dist.shards import manifest_json
from gkd_dist.shards.entries import ObjectEntry
from gkd_dist.shards.manifest import SCHEMA_VERSION, Manifest
from gkd_dist.shards.manifest_upgrade import FIELDS
from gkd_dist.shards.seal import is_sealed
from gkd_dist.storage import Storage

DOC = (Path(__file__).parents[3] / "docs" / "shard-format.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Text of the doc below a heading."""
    return re.split(r"^## ", DOC.partition(f"\n## {title}\n")[2], flags=re.M)[0]


def table(title: str, number: int) -> dict[str, list[str]]:
    """Table ``number`` of a section: the name in the first column, then the other cells."""
    tables = re.findall(r"(?:^\|.*\n)+", section(title), flags=re.M)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in tables[number].splitlines()[2:]]
    return {name.strip("`"): cells for name, *cells in rows}


def graph(density: float, weighted: bool) -> Graph:
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.unique(torch.randint(0, 12, (2, 40), generator=generator), dim=1)
    x = torch.randn(12, 5, generator=generator) * (torch.rand(12, 5, generator=generator) < density)
    masks = torch.arange(12) % 3
    return Graph(
        x,
        edge_index,
        torch.arange(12) % 2,
        masks == 0,
        masks == 1,
        masks == 2,
        num_classes=2,
        edge_weight=torch.ones(edge_index.size(1)) if weighted else None,
        edge_attr=torch.ones(edge_index.size(1), 3) if weighted else None,
        features={"other": torch.ones(12, 4)} if weighted else {},
    )


def write_graph(run: Storage, density: float = 1.0, weighted: bool = True) -> Manifest:
    parts = PartitionConfig(method="random", num_parts=2)
    return build_graph_store(
        graph(density, weighted), run.child(layout.GRAPH), parts, halo_hops=2, seed=0, fingerprint="a" * 64
    )


def write_knowledge(run: Storage, **options: object) -> tuple[Storage, Manifest]:
    config = ModelConfig(kind="gcn", hidden=4)
    teacher, out = run.child(layout.TEACHER), run.child(layout.KNOWLEDGE).child(layout.knowledge("teacher", "b" * 64))
    save_model(teacher, build_model(config, 5, 2), ModelSpec(config, 5, 2, "multiclass"), "c" * 64)
    wants = Wants(logits=True, scores={1: frozenset({"sqeuclidean"})}, embeddings=frozenset({1}), taps=("convs.0",))
    settings = InferConfig.model_validate({"num_actors": 0, "dtype": "fp16", **options})
    graph, packing = (
        GraphStore.open(run.child(layout.GRAPH)),
        Packing.of(settings, [LspLoss(kind="lsp"), KdLoss(kind="kd")], 2),
    )
    return out, infer_nodes(teacher, graph, out, wants, settings, fingerprint="b" * 64, packing=packing)


@pytest.fixture
def run() -> Storage:
    return Storage.open(f"memory://{uuid.uuid4().hex}/run")


def tensors(entry: ObjectEntry) -> dict[str, str]:
    return {tensor.name: tensor.dtype for tensor in entry.tensors}


def test_the_tree(run: Storage) -> None:
    write_graph(run)
    write_knowledge(run)
    with Ownership(run):
        found = run.list()
    tree = section("Trees").split("```")[1]
    folders: list[tuple[int, str]] = []
    drawn = set()
    for line in tree.strip().splitlines()[1:]:
        name = line.split()[0]
        depth = len(line) - len(line.lstrip())
        folders = [folder for folder in folders if folder[0] < depth]
        drawn.add("".join(folder for _, folder in folders) + name)
        if name.endswith("/"):
            folders.append((depth, name))
    generic = {re.sub(r"part-\d{5}-[0-9a-f]{8}", "part-00000-<sha8>", key) for key in found}
    generic = {key.replace("teacher-bbbbbbbb", "<teacher>-<fp8>") for key in generic}
    assert generic <= drawn, generic - drawn
    assert len(generic) == 7
    assert {
        f"{layout.GRAPH}/manifest-0000-<sha8>.json",
        f"{layout.KNOWLEDGE}/<teacher>-<fp8>/manifest-0000-<sha8>.json",
    } <= drawn
    named = {layout.CONFIG, layout.OWNER, layout.METRICS, layout.REPORT, layout.stage_record("<stage>"),
             f"{layout.student('<name>')}/{layout.MODEL_JSON}", f"{layout.student('<name>')}/{layout.MODEL_WEIGHTS}",
             f"{layout.student('<name>')}/{layout.checkpoint(500)}/", f"{layout.TENSORBOARD}/<name>/"}  # fmt: skip
    assert named <= drawn, named - drawn
    assert layout.COMMIT in tree


def test_the_owner_record(run: Storage) -> None:
    with Ownership(run):
        fields = run.read_json(layout.OWNER)
    drawn = re.search(r"owner\.json .*: (.*)", section("Trees"))
    assert drawn is not None
    assert set(drawn[1].split(", ")) == fields.keys()


def test_the_fields_of_a_manifest(run: Storage) -> None:
    write_graph(run)
    body = json.loads(run.read(f"{layout.GRAPH}/{layout.MANIFEST}"))
    assert table("Manifest", 0).keys() == body.keys()
    assert table("Manifest", 1).keys() == body["parts"][0].keys()
    assert table("Manifest", 2).keys() == body["parts"][0]["tensors"][0].keys()
    assert table("Manifest", 0)["schema_version"] == [str(SCHEMA_VERSION)]
    assert table("Versions", 0).keys() == {str(version) for version in range(1, SCHEMA_VERSION + 1)}
    assert FIELDS[SCHEMA_VERSION] == tuple(table("Manifest", 0))


def test_the_sealed_documents(run: Storage) -> None:
    write_graph(run)
    write_knowledge(run)
    document = run.read_json(f"{layout.TEACHER}/{layout.MODEL_JSON}")
    assert "`seal`" in section("Sealed documents")
    assert is_sealed(document)
    assert document["format_version"] == 2


def test_the_pages_of_a_manifest(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_json.dump, "__defaults__", (1,))
    written = write_graph(run)
    names = {re.sub(r"-[0-9a-f]{8}\.", "-<sha8>.", key) for key in run.list(layout.GRAPH)}
    assert names >= {f"{layout.GRAPH}/manifest-{number:04d}-<sha8>.json" for number in range(2)}
    body = json.loads(run.read(f"{layout.GRAPH}/{layout.MANIFEST}"))
    assert table("Manifest", 0).keys() == body.keys()
    assert body["parts"] == []
    for number, page in enumerate(body["pages"]):
        assert table("Manifest", 3).keys() == page.keys()
        stored = json.loads(run.read(f"{layout.GRAPH}/{page['key']}"))
        assert table("Manifest", 4).keys() == stored.keys()
        assert stored["page"] == number
        assert stored["parts"][0].keys() == table("Manifest", 1).keys()
    assert Manifest.load(run.child(layout.GRAPH), "graph") == written
    assert f"{manifest_json.PARTS_PER_PAGE:,} parts" in section("Manifest")


def test_a_graph_part(run: Storage) -> None:
    manifest = write_graph(run)
    drawn = {name.replace("<name>", "other"): dtype for name, (dtype, *_) in table("Graph part", 0).items()}
    for entry in manifest.parts:
        assert tensors(entry) == drawn
        assert entry.counts.keys() == table("Graph part", 2).keys()
        assert entry.meta.keys() == {"hop_ptr"}
    assert manifest.meta.keys() == table("Graph part", 3).keys()
    assert manifest.inputs == {}


def test_a_graph_part_with_sparse_features_and_without_weights(run: Storage) -> None:
    manifest = write_graph(run, density=0.05, weighted=False)
    drawn = {name: dtype for number in (0, 1) for name, (dtype, *_) in table("Graph part", number).items()}
    for name in ("x", "x_halo", "edge_weight", "edge_attr", "features.<name>", "features_halo.<name>"):
        del drawn[name]
    assert tensors(manifest.parts[0]) == drawn


def test_a_knowledge_part(run: Storage) -> None:
    write_graph(run)
    out, manifest = write_knowledge(run)
    names = {
        name.replace("<layer>", "1").replace("<metric>", "sqeuclidean").replace("<path>", "convs.0")
        for name in table("Knowledge part", 0)
    }
    for entry in manifest.parts:
        assert tensors(entry) == dict.fromkeys(names, "float16")
        assert entry.counts.keys() == table("Knowledge part", 3).keys()
        assert entry.meta["floats"].keys() == names
        fields = {name: set(info) for name, info in entry.meta["floats"].items()}
        assert fields.pop("scores.1.sqeuclidean") == {"scale", "bound", "low", "high"}
        assert all(found == {"scale", "bound"} for found in fields.values())
    assert manifest.meta.keys() == table("Knowledge part", 4).keys()
    assert manifest.meta["bounds"][0].keys() == table("Knowledge part", 5).keys()
    assert manifest.inputs.keys() == table("Manifest", 5).keys()
    assert Manifest.load(out, "knowledge", "b" * 64) == manifest


def test_a_knowledge_part_with_scores_in_bytes(run: Storage) -> None:
    write_graph(run)
    _, manifest = write_knowledge(run, scores_dtype="uint8")
    drawn = {
        name.replace("<layer>", "1").replace("<metric>", "sqeuclidean"): dtype
        for name, (dtype, *_) in table("Knowledge part", 2).items()
    }
    for entry in manifest.parts:
        assert {name: dtype for name, dtype in tensors(entry).items() if name.startswith("scores.")} == drawn
        assert entry.meta["floats"]["scores.1.sqeuclidean"].keys() == {"affine", "bound", "low", "high"}


def test_a_knowledge_part_with_the_largest_logits(run: Storage) -> None:
    write_graph(run)
    _, manifest = write_knowledge(run, logits=1)
    drawn = {
        name: dtype.replace("`infer.dtype`", "float16") for name, (dtype, *_) in table("Knowledge part", 1).items()
    }
    for entry in manifest.parts:
        assert {name: dtype for name, dtype in tensors(entry).items() if name.startswith("logits")} == drawn
    assert manifest.meta["topk"].keys() == {"k", "temperatures"}
