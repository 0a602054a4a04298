"""Every config of the repository is one that `gkd run` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkd_dist.config_file import load_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def test_there_is_a_quickstart_that_needs_no_data() -> None:
    assert "quickstart" in {path.stem for path in CONFIGS}
    config = load_config(next(path for path in CONFIGS if path.stem == "quickstart"))
    assert config.graph.source.kind == "synthetic"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_and_its_layers_exist(path: Path) -> None:
    config = load_config(path)

    layers = config.knowledge_layers()

    assert all(1 <= layer <= config.teacher.model.layers for layer in layers)
    assert config.halo_hops() >= 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_as_exact_as_the_design_promises_or_says_otherwise(path: Path) -> None:
    config = load_config(path)
    if config.partition.halo_hops != "auto":
        assert "halo" in path.read_text().partition("\n\n")[0].lower(), (
            "explain the smaller halo at the top of the file"
        )


def test_no_two_runs_share_a_folder() -> None:
    runs = [load_config(path).run for path in CONFIGS]
    assert len(runs) == len(set(runs))
