"""Entropy and lost mass: by hand on three nodes, then against softmaxes over the whole graph."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from infer_worlds import World, make_graph
from torch import Tensor

from gkd_dist.config import InferConfig
from gkd_dist.errors import ManifestError
from gkd_dist.infer.plan import Wants
from gkd_dist.infer.run import infer_nodes
from gkd_dist.inspect_measures import BIN_NATS, NUM_SHARE_BINS, Structure, measure, structure_terms
from gkd_dist.losses import edge_scores
from gkd_dist.losses.bounds import ScoreReader
from gkd_dist.losses.kernels import Kernel
from gkd_dist.losses.neighbours import Neighbours
from gkd_dist.partition.store import GraphStore
from gkd_dist.stream.knowledge import KnowledgeStore

PLAIN = ScoreReader("lsp", 1, Kernel("rbf", outer_softmax=False), 0.5, "student||teacher")  # arguments are -score


def test_by_hand() -> None:
    """Node 0 hears node 1 of its part with p = 1/4 and node 2 of another with 3/4; node 1 hears node 2 alone."""
    edges = torch.tensor([[1, 2, 2, 0], [0, 0, 1, 0]])  # the self-loop of node 0 does not count
    found = Structure(PLAIN, 0.5)
    neighbours = Neighbours.of_edges(edges, 3)
    scores = torch.tensor([math.log(3.0), 0.0, 7.0, 5.0])
    found.add(scores[neighbours.picked], neighbours, num_owned=2)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    result = found.to_json()
    assert (result["num_nodes"], result["num_edges"], result["num_cut_edges"]) == (2, 3, 2)
    assert result["lost_mass"] == pytest.approx((0.75 + 1.0) / 2)
    assert result["mean_entropy"] == pytest.approx(entropy / 2)
    assert result["cut_fraction"] == pytest.approx(2 / 3)
    counts = [0] * (int(entropy / BIN_NATS) + 1)
    counts[0] += 1
    counts[-1] += 1
    assert result["entropy"] == {"bin_nats": BIN_NATS, "counts": counts}
    shares = [0] * NUM_SHARE_BINS
    shares[int(entropy / math.log(2) * NUM_SHARE_BINS)] = 1  # node 1 has one neighbour: no share
    assert result["entropy_share"] == {"bins": NUM_SHARE_BINS, "counts": shares}


def test_no_neighbours_are_no_numbers() -> None:
    empty = Structure(PLAIN, 0.5)
    empty.add(torch.zeros(0), Neighbours.of_edges(torch.zeros(2, 0, dtype=torch.int64), 3), num_owned=2)
    result = empty.to_json()
    assert (result["num_nodes"], result["lost_mass"], result["mean_entropy"], result["cut_fraction"]) == (0,) + (
        None,
    ) * 3
    assert sum(result["entropy"]["counts"]) == 0


def world(tmp_path: Path, num_parts: int, wants: Wants) -> tuple[GraphStore, KnowledgeStore, Tensor, Tensor]:
    """Stores of a cut graph, its edges without self-loops, and the teacher's layer 1 on the whole graph."""
    made = World(tmp_path, make_graph())
    graph = made.cut(num_parts)
    storage, _ = made.model("gcn")
    out = made.storage("k")
    exact = InferConfig(num_actors=0, dtype="fp32")
    manifest = infer_nodes(storage, graph, out, wants, exact, fingerprint="f" * 64)
    whole = made.cut(1)
    kept = infer_nodes(storage, whole, made.storage("w"), Wants(embeddings={1}), exact, fingerprint="e" * 64)
    z = KnowledgeStore(made.storage("w"), kept).values(0, whole.part(0))["embeddings.1"]
    edges = made.graph.edge_index
    return graph, KnowledgeStore(out, manifest), edges[:, edges[0] != edges[1]], z


def reference(edges: Tensor, arguments: Tensor, owner: Tensor) -> tuple[float, float, int]:
    """(lost mass, mean entropy, cut edges), node by node."""
    lost, entropy, nodes = 0.0, 0.0, edges[1].unique().tolist()
    for node in nodes:
        mine = edges[1] == node
        p = torch.softmax(arguments[mine].double(), 0)
        lost += float(p[owner[edges[0, mine]] != owner[node]].sum())
        entropy += float(-(p * p.log()).sum())
    return lost / len(nodes), entropy / len(nodes), int((owner[edges[0]] != owner[edges[1]]).sum())


@pytest.mark.parametrize("num_parts", [1, 3, 5])
@pytest.mark.parametrize("stored", ["scores", "embeddings"])
def test_against_the_whole_graph(tmp_path: Path, num_parts: int, stored: str) -> None:
    wants = Wants(scores={1: {"sqeuclidean"}}) if stored == "scores" else Wants(embeddings={1})
    graph, knowledge, edges, z = world(tmp_path, num_parts, wants)
    owner = torch.empty(60, dtype=torch.int64)
    for part, entry in enumerate(graph.manifest.parts):
        owner[graph.part(part, ["n_id"])["n_id"][: entry.counts["num_owned"]]] = part
    (reader,) = structure_terms(knowledge.manifest, None)
    assert reader.kernel == Kernel("rbf", outer_softmax=False)
    (found,) = measure(graph, knowledge, [reader], range(num_parts))
    scores = edge_scores(z, edges)
    middle = scores.sort().values[(scores.numel() - 1) // 2]
    assert found.sigma == pytest.approx(float(middle) / 2, rel=2**-8)  # medians have the resolution of bfloat16
    lost, entropy, cut = reference(edges, scores / (-2 * found.sigma), owner)
    assert found.num_cut_edges == cut
    assert found.lost / found.num_nodes == pytest.approx(lost, rel=1e-4)
    assert found.entropy_sum / found.num_nodes == pytest.approx(entropy, rel=1e-4)
    assert int(found.entropy.sum()) == found.num_nodes
    assert (found.lost == 0) == (num_parts == 1)
    assert int(found.share.sum()) <= found.num_nodes


def test_parts_add_up(tmp_path: Path) -> None:
    graph, knowledge, _, _ = world(tmp_path, 3, Wants(scores={1: {"sqeuclidean"}}))
    readers = structure_terms(knowledge.manifest, None)
    (whole,) = measure(graph, knowledge, readers, range(3))
    each = [measure(graph, knowledge, readers, [part])[0] for part in range(3)]
    assert sum(one.num_nodes for one in each) == whole.num_nodes
    assert sum(one.lost for one in each) == pytest.approx(whole.lost)


def test_knowledge_of_another_cut_is_refused(tmp_path: Path) -> None:
    _, knowledge, _, _ = world(tmp_path, 3, Wants(scores={1: {"dot"}}))
    other = World(tmp_path, make_graph()).cut(2)
    with pytest.raises(ManifestError, match="was made from graph"):
        measure(other, knowledge, structure_terms(knowledge.manifest, None), [0])


def test_terms_come_from_the_manifest_where_it_names_them(tmp_path: Path) -> None:
    _, knowledge, _, _ = world(tmp_path, 2, Wants(scores={1: {"dot", "sqeuclidean"}}))
    names = [(reader.layer, reader.kernel.name) for reader in structure_terms(knowledge.manifest, None)]
    assert names == [(1, "linear"), (1, "rbf")]
    knowledge.manifest.meta["bounds"] = [
        {"loss": "lsp", "score": "1.dot", "kernel": "poly", "outer_softmax": False, "temperature": 2.0, "sigma": None,
         "direction": "teacher||student"}
    ]  # fmt: skip
    (reader,) = structure_terms(knowledge.manifest, None)
    assert (reader.name, reader.kernel.name, reader.kernel.temperature) == ("lsp", "poly", 2.0)
