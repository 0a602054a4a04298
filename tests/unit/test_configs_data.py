"""The config files under ``configs/`` are whole runs: valid, where they say they are, and described."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gkd_dist.config import Config, LspLoss, PygSource

FOLDER = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
PUBLISHED = {
    "cora": ("Planetoid", {"name": "Cora"}),
    "citeseer": ("Planetoid", {"name": "CiteSeer"}),
    "computers": ("Amazon", {"name": "Computers"}),
    "coauthor_cs": ("Coauthor", {"name": "CS"}),
}


def read(name: str) -> Config:
    return Config.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


def test_the_files_are_here() -> None:
    assert {"quickstart", *PUBLISHED} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_a_valid_run_under_its_own_name(file: Path) -> None:
    assert read(file.stem).run == f"runs/{file.stem}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_first_what_it_shows(file: Path) -> None:
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert file.read_text().startswith("# ")
    assert any(line.startswith("# Shows ") for line in header)
    assert any(f"gkd run configs/{file.name}" in line for line in header), "how it is started"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_readme_has_a_row_for_each_file(file: Path) -> None:
    assert f"| `{file.name}` |" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_graphs_are_read_by_class_and_name(name: str) -> None:
    source = read(name).graph.source
    assert isinstance(source, PygSource)
    assert (source.name, source.args) == PUBLISHED[name]


def test_graphs_without_a_published_split_draw_the_usual_one() -> None:
    for name in ("computers", "coauthor_cs"):
        split = read(name).graph.split
        assert split is not None
        assert split.model_dump() == {"kind": "per_class", "train": 20, "val": 30, "seed": None}
    for name in ("cora", "citeseer"):
        assert read(name).graph.split is None


def test_the_quickstart_generates_the_default_graph() -> None:
    source = read("quickstart").graph.source
    assert source == type(source)(kind="synthetic")


@pytest.mark.parametrize("name", ["quickstart", *PUBLISHED])
def test_every_run_shows_all_three_losses_on_two_workers(name: str) -> None:
    config = read(name)
    assert [loss.kind for loss in config.losses] == ["label", "kd", "lsp"]
    assert config.distill.num_workers == 2
    assert config.distill.units_per_step == "all"
    lsp = config.losses[2]
    assert isinstance(lsp, LspLoss)
    assert (lsp.teacher_layer, lsp.student_layer) == (-2, -2), "the only hidden layer"
