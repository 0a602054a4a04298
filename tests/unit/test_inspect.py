"""`gkd inspect`: the same facts as a table and as JSON, tables for outsiders, one sentence for wrong input."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from flow_runs import BASE, Job, gkd, make_job
from forgery import signed

from gkd_dist.data.sources import load_graph
from gkd_dist.models.io import load_teacher
from gkd_dist.partition.build import build_graph_store
from gkd_dist.shards.manifest import Manifest
from gkd_dist.storage import Storage


def knowledge_of(job: Job) -> Path:
    (folder,) = (job.run / "knowledge").iterdir()
    return folder


def reports(*args: str) -> list[dict[str, Any]]:
    outcome = gkd("inspect", *args, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json


def test_a_run_has_a_graph_and_a_knowledge_store(finished: Job) -> None:
    graph, knowledge = reports(str(finished.config))
    assert reports(str(finished.run)) == [graph, knowledge]
    assert [graph["kind"], knowledge["kind"]] == ["graph", "knowledge"]
    manifest = Manifest.load(Storage.open(str(finished.run / "graph")), "graph")
    assert graph["fingerprint"] == knowledge["inputs"]["graph"] == manifest.fingerprint
    assert graph["facts"]["cut_fraction"] == manifest.meta["cut_fraction"]
    assert graph["num_bytes"] == sum(file.stat().st_size for file in (finished.run / "graph").glob("part-*"))
    assert graph["part_bytes"]["min"] <= graph["part_bytes"]["median"] <= graph["part_bytes"]["max"]
    by_name = {tensor["name"]: tensor for tensor in graph["tensors"]}
    assert by_name["x"]["num_elements"] == 400 * 8
    assert by_name["x"]["dtypes"] == ["float32"]
    (lsp,) = knowledge["structure"]
    assert lsp["loss"] == "lsp"
    assert lsp["sigma"] == knowledge["scores"]["1.sqeuclidean"]["median"] / 2
    assert lsp["cut_fraction"] == pytest.approx(manifest.meta["cut_fraction"])  # the graph has no self-loops
    assert 0 < lsp["lost_mass"] < 1
    assert sum(lsp["entropy"]["counts"]) == lsp["num_nodes"] == sum(p.counts["num_lsp_nodes"] for p in manifest.parts)


def test_a_store_inside_a_run_finds_its_graph(finished: Job) -> None:
    (alone,) = reports(str(knowledge_of(finished)))
    assert alone["structure"][0]["num_nodes"] > 0
    assert alone["notes"] == []
    (graph,) = reports(str(finished.run / "graph"))
    assert graph == reports(str(finished.run))[0]


def test_a_store_elsewhere_says_what_it_lacks(copied: Job, tmp_path: Path) -> None:
    moved = knowledge_of(copied).rename(tmp_path / "moved")
    (alone,) = reports(str(moved))
    assert alone["structure"] == []
    assert alone["notes"] == ["the graph store is not known: give --graph URL for entropy and lost teacher mass"]
    (with_graph,) = reports(str(moved), "--graph", str(copied.run / "graph"))
    assert with_graph["structure"][0]["lost_mass"] > 0


def test_parts_and_samples(finished: Job) -> None:
    graph, knowledge = reports(str(finished.run), "--part", "2")
    assert [part["part"] for part in graph["parts"]] == [2]
    assert knowledge["parts_read"] == 1
    assert len(reports(str(finished.run), "--parts")[0]["parts"]) == 3
    assert reports(str(finished.run), "--sample", "2")[1]["parts_read"] == 2


def test_the_table_says_the_same(finished: Job) -> None:
    text = gkd("inspect", str(finished.run), "--parts").out
    graph, knowledge = reports(str(finished.run), "--parts")
    assert f"{knowledge['structure'][0]['lost_mass']:.2%}" in text
    assert f"cut_fraction  {graph['facts']['cut_fraction']:.4g}" in text
    assert all(part["key"] in text for report in (graph, knowledge) for part in report["parts"])
    assert "lost teacher mass" in text
    assert "####" in text


def test_tables_are_the_graph_and_the_teacher(finished: Job, tmp_path: Path) -> None:
    """What pandas reads, without this package, is the graph that was cut and what the teacher says of it."""
    outcome = gkd("inspect", str(finished.run), "--to-parquet", str(tmp_path / "out"), "--json")
    assert outcome.code == 0, outcome.err
    assert len(outcome.json["files"]) == 6
    nodes = pd.read_parquet(tmp_path / "out" / "nodes").sort_values("n_id")
    edges = pd.read_parquet(tmp_path / "out" / "edges")
    graph = load_graph(finished.load().graph, 0)
    assert nodes["n_id"].tolist() == list(range(graph.num_nodes))
    assert nodes["y"].tolist() == graph.y.tolist()
    assert nodes["train_mask"].tolist() == graph.train_mask.tolist()
    assert torch.equal(torch.tensor(nodes["x"].tolist()), graph.x)
    stored = set(zip(edges["source"], edges["target"], strict=True))
    assert len(edges) == graph.num_edges
    assert stored == set(zip(*graph.edge_index.tolist(), strict=True))
    owner = nodes["part"].to_numpy()
    assert (edges["is_cut"] == (owner[edges["source"]] != owner[edges["target"]])).all()
    teacher = load_teacher(str(finished.run))
    with torch.inference_mode():
        logits = teacher(graph.x, graph.edge_index)
    assert torch.allclose(torch.tensor(nodes["logits"].tolist()), logits, atol=1e-4)
    assert edges["scores.1.sqeuclidean"].dtype == "float32"
    assert (edges["scores.1.sqeuclidean"] >= 0).all()


def test_lost_mass_from_the_tables(finished: Job, tmp_path: Path) -> None:
    """The number in the report, found again by an outsider with pandas alone."""
    import numpy as np

    gkd("inspect", str(finished.run), "--to-parquet", str(tmp_path))
    (lsp,) = reports(str(finished.run))[1]["structure"]
    edges = pd.read_parquet(tmp_path / "edges")
    edges = edges[edges["source"] != edges["target"]]
    edges["weight"] = np.exp(-edges["scores.1.sqeuclidean"].astype("float64") / (2 * lsp["sigma"]))
    total = edges.groupby("target")["weight"].sum()
    lost = edges[edges["is_cut"]].groupby("target")["weight"].sum() / total
    assert lost.sum() / len(total) == pytest.approx(lsp["lost_mass"], rel=1e-5)


def test_one_part_of_a_graph_store_alone(finished: Job, tmp_path: Path) -> None:
    outcome = gkd("inspect", str(finished.run / "graph"), "--part", "1", "--to-parquet", str(tmp_path), "--json")
    assert outcome.json["files"] == ["nodes/part-00001.parquet", "edges/part-00001.parquet"]
    assert "logits" not in pd.read_parquet(tmp_path / "nodes").columns


def test_stores_on_s3(s3_server: str, finished: Job) -> None:
    config = finished.load()
    storage = Storage.open("s3://bucket/graph")
    graph = load_graph(config.graph, 0)
    build_graph_store(graph, storage, config.partition, halo_hops=1, seed=0, fingerprint="a" * 64)
    (report,) = reports("s3://bucket/graph")
    assert report["facts"]["num_nodes"] == 400
    outcome = gkd("inspect", "s3://bucket/graph", "--to-parquet", "s3://bucket/tables", "--json")
    assert outcome.code == 0, outcome.err
    first = pd.read_parquet(io.BytesIO(Storage.open("s3://bucket/tables").read("nodes/part-00000.parquet")))
    assert {"n_id", "x", "y"} <= set(first.columns)


# --- wrong input -----------------------------------------------------------------------------


def refused(*args: str) -> tuple[int, str]:
    outcome = gkd("inspect", *args)
    return outcome.code, outcome.complaint


def test_wrong_targets(finished: Job, tmp_path: Path) -> None:
    code, text = refused(str(tmp_path))
    assert code == 2
    assert text.endswith("is no configuration file, no run (config.yaml is missing) and no store "
                         "(manifest.json is missing); correct the path")  # fmt: skip
    (tmp_path / "manifest.json").write_text("[]")
    assert refused(str(tmp_path))[0] == 3
    code, text = refused(str(finished.run), "--part", "3")
    assert (code, text.partition("has no part ")[2]) == (2, "3, its parts are 0 to 2; correct --part")
    assert refused(str(finished.run), "--sample", "0")[0] == 2


def test_a_newer_store(copied: Job) -> None:
    file = copied.run / "graph" / "manifest.json"
    body = json.loads(file.read_text())
    file.write_text(json.dumps(body | {"schema_version": 99}))
    code, text = refused(str(copied.run / "graph"))
    assert code == 3
    assert text.endswith("upgrade gkd_dist")


def test_tables_need_the_graph_and_one_teacher(copied: Job, tmp_path: Path) -> None:
    store = knowledge_of(copied)
    manifest = Manifest.load(Storage.open(str(store)), "knowledge")
    second = store.parent / "other-00000000"
    second.mkdir()
    for file in store.iterdir():
        (second / file.name).write_bytes(file.read_bytes())
    assert Manifest.load(Storage.open(str(second)), "knowledge") == manifest
    code, text = refused(str(copied.run), "--to-parquet", str(tmp_path / "out"))
    assert code == 2
    assert "there are 2 knowledge stores" in text
    assert "give the URL of one of them" in text
    moved = store.rename(tmp_path / "moved")
    assert "give --graph URL" in refused(str(moved), "--to-parquet", str(tmp_path / "out"))[1]


@pytest.mark.parametrize(
    "changes",
    [{"scores": 3}, {"bounds": [], "scores": {"1.sqeuclidean": {"median": "x"}}}, {"bounds": [{"loss": 1}]}],
)
def test_remarks_that_make_no_sense(copied: Job, changes: dict[str, Any]) -> None:
    file = knowledge_of(copied) / "manifest.json"
    body = json.loads(file.read_text())
    file.write_bytes(signed(body | {"meta": body["meta"] | changes}))
    code, text = refused(str(knowledge_of(copied)))
    assert code == 3
    assert "cannot be understood" in text


def test_a_damaged_part_is_named(copied: Job) -> None:
    file = next(knowledge_of(copied).glob("part-00001-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, text = refused(str(copied.run))
    assert code == 3
    assert file.name in text


def test_the_largest_logits_and_scores_in_bytes_as_tables(tmp_path: Path) -> None:
    text = BASE.replace("num_nodes: 400, num_classes: 3", "num_nodes: 800, num_classes: 6").replace(
        "dtype: fp32", "logits: 2, scores_dtype: uint8"
    )
    job = make_job(tmp_path, text)
    for stage in ("partition", "teach", "infer"):
        outcome = job.gkd(stage)
        assert outcome.code == 0, outcome.err
    assert job.gkd("inspect", "--to-parquet", str(tmp_path / "out")).code == 0
    nodes, edges = pd.read_parquet(tmp_path / "out" / "nodes"), pd.read_parquet(tmp_path / "out" / "edges")
    stored = {column for column in nodes.columns if column.startswith("logits")}
    assert len(stored) > 1
    index = next(column for column in sorted(stored) if "index" in column)
    assert all(len(set(row)) == 2 and max(row) < 6 for row in nodes[index])
    assert [column for column in edges.columns if column.startswith("scores")] == ["scores.1.sqeuclidean"]
    (bound,) = reports(str(job.config))[1]["bounds"]
    assert bound["loss"] == "lsp"
