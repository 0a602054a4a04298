"""`gkd verify --recompute`: what digests cannot see, seen by computing it again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flow_runs import BASE, Job, make_job

from gkd_dist import stages
from gkd_dist.infer.plan import KNOWLEDGE, Task, TaskGraph, Wants
from gkd_dist.infer.recompute import Closure
from gkd_dist.shards.manifest import Manifest
from gkd_dist.shards.reader import read_shard
from gkd_dist.shards.writer import write_shard
from gkd_dist.verify_recompute import MAX_TASKS, recompute_sample, worst_difference


def forge(job: Job, part: int, name: str, row: int, change: float) -> str:
    """Alters one stored value and everything that vouches for it; returns the key of the new object."""
    storage = stages.knowledge_folder(job.session())
    manifest = Manifest.load(storage, "knowledge")
    entry = manifest.parts[part]
    tensors = {key: value.clone() for key, value in read_shard(storage, entry).items()}
    tensors[name][row] += change
    forged = write_shard(storage, f"part-{part:05d}", tensors, entry.counts, entry.meta)
    parts = [forged if number == part else one for number, one in enumerate(manifest.parts)]
    replace(manifest, parts=tuple(parts)).save(storage)
    storage.delete(entry.key)
    return forged.key


def test_an_honest_store_has_equal_bits(finished: Job) -> None:
    outcome = finished.gkd("verify", "--recompute", "3", "--json")
    assert outcome.code == 0, outcome.err
    assert [(one["part"], one["verdict"]) for one in outcome.json["recomputed"]] == [
        (part, "equal bits") for part in range(3)
    ]
    assert "recomputing part 0, part 1, part 2 with what surrounds them: " in outcome.err
    assert "part 1 recomputed: equal bits" in finished.gkd("verify", "--recompute", "3").out


@pytest.mark.parametrize("name", ["logits", "scores.1.sqeuclidean"])
def test_a_consistent_forgery_is_found(copied: Job, name: str) -> None:
    key = forge(copied, 1, name, 7, 0.25)
    assert copied.gkd("verify").code == 0  # every digest fits
    outcome = copied.gkd("verify", "--recompute", "3", "--json")
    assert outcome.code == 3
    verdicts = {one["part"]: one for one in outcome.json["recomputed"]}
    assert [verdicts[part]["verdict"] for part in range(3)] == ["equal bits", "differs", "equal bits"]
    assert verdicts[1]["tensor"] == name
    assert verdicts[1]["difference"] == pytest.approx(0.25, rel=1e-3)
    (problem,) = outcome.json["problems"]
    assert f"part 1 ({key}) recomputed: differs, {name} by 0.25" in problem


def test_one_rounding_is_within_the_bound(copied: Job) -> None:
    forge(copied, 0, "logits", 0, 1e-6)
    outcome = copied.gkd("verify", "--recompute", "3", "--json")
    assert outcome.code == 0
    assert outcome.json["recomputed"][0]["verdict"] == "within bound"
    assert 0 < outcome.json["recomputed"][0]["difference"] < outcome.json["recomputed"][0]["allowed"]


def test_a_forged_bound_allows_nothing(copied: Job) -> None:
    forge(copied, 1, "logits", 7, 0.25)
    storage = stages.knowledge_folder(copied.session())
    manifest = Manifest.load(storage, "knowledge")
    for info in manifest.parts[1].meta["floats"].values():
        info["bound"] = 1e9
    manifest.save(storage)
    assert copied.gkd("verify", "--recompute", "3").code == 3


def test_the_seed_chooses_the_parts(finished: Job) -> None:
    session = finished.session()
    chosen = {tuple(one.part for one in recompute_sample(session, 1, seed)[1]) for seed in range(4)}
    assert len(chosen) > 1
    assert recompute_sample(session, 1, 0) == recompute_sample(session, 1, 0)
    session.close()


@pytest.mark.parametrize("settings", [["infer.scores_dtype=uint8", "infer.dtype=fp16"], ["infer.scores=embeddings"]])
def test_every_kind_of_knowledge(tmp_path: Path, settings: list[str]) -> None:
    job = make_job(tmp_path, BASE.replace("num_parts: 3", "num_parts: 2"))
    for stage in ("partition", "teach", "infer"):
        assert job.gkd(stage, *settings).code == 0
    outcome = job.gkd("verify", *settings, "--recompute", "2", "--json")
    assert {one["verdict"] for one in outcome.json["recomputed"]} == {"equal bits"}


def test_nothing_is_recomputed_from_a_damaged_graph(copied: Job) -> None:
    file = next((copied.run / "graph").glob("part-00002-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcome = copied.gkd("verify", "--recompute", "1", "--json")
    assert outcome.code == 3
    assert outcome.json["recomputed"] == []
    assert outcome.json["problems"][-1] == "nothing was recomputed: repair what is above first"


def test_wrong_input(copied: Job) -> None:
    outcome = copied.gkd("verify", "--recompute", "0")
    assert (outcome.code, outcome.complaint) == (2, "--recompute must be at least 1 (got 0); correct it")
    other = copied.gkd("verify", "infer.dtype=bf16", "--recompute", "1")
    assert other.code == 3
    assert "run `gkd infer` first" in other.complaint
    assert json.loads((copied.run / "graph" / "manifest.json").read_text())["kind"] == "graph"


def test_a_closure_has_what_is_needed_and_no_more() -> None:
    """Five parts in a row, three layers: what part 0 knows follows from one part more per layer below."""
    borders = [[near for near in (part - 1, part + 1) if 0 <= near < 5] for part in range(5)]
    plan = TaskGraph(3, borders, Wants(scores={3: {"dot"}}))
    closure = Closure(plan, [0])
    assert closure.tasks() == [
        *(Task(1, part) for part in range(4)),
        *(Task(2, part) for part in range(3)),
        *(Task(3, part) for part in range(2)),
        Task(KNOWLEDGE, 0),
    ]
    assert closure.readers(Task(1, 3)) == [Task(2, 2)]
    assert len(Closure(plan, range(5)).tasks()) == len(plan.tasks()) < MAX_TASKS


def test_what_cannot_be_compared_differs(finished: Job) -> None:
    entry = Manifest.load(stages.knowledge_folder(finished.session()), "knowledge").parts[0]
    value = torch.zeros(2, 3)
    for before, after in (({"logits": value}, {}), ({"logits": value}, {"logits": value[:1]})):
        found = worst_difference(0, entry, before, after, entry)
        assert (found.verdict, found.difference) == ("differs", float("inf"))
    nan = worst_difference(0, entry, {"logits": value * float("nan")}, {"logits": value}, entry)
    assert (nan.verdict, nan.tensor) == ("differs", "logits")
