"""The choice between compiled and other edge scores: when, kept over a resume, and what is said."""

from __future__ import annotations

import logging

import pytest
import torch

from gkd_dist.config import DistillConfig
from gkd_dist.distill import compiling
from gkd_dist.distill.checkpoint import load_checkpoint
from gkd_dist.distill.compiling import WORTH_IT, choose_compiled, wants_compiled
from gkd_dist.distill.job import torch_factory
from gkd_dist.distill.trainer import Trainer
from gkd_dist.errors import ConfigError
from gkd_dist.models.io import read_model
from gkd_dist.world import World
from tests.training import make_task, small_world


@pytest.fixture
def no_compiler(monkeypatch):
    """This machine without g++; that `compiler_problem` finds out is tested with the scores."""
    monkeypatch.setattr(compiling, "compiler_problem", lambda device: "CppCompileError: no g++")


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr(compiling, "compiler_problem", lambda device: None)


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_auto_is_a_matter_of_size():
    assert not wants_compiled("auto", WORTH_IT / 2)
    assert wants_compiled("auto", WORTH_IT)
    assert wants_compiled(True, 0)
    assert not wants_compiled(False, 10 * WORTH_IT)


@pytest.mark.usefixtures("compiler")
def test_a_resumed_run_goes_on_as_it_was(caplog):
    caplog.set_level(logging.WARNING)
    for recorded in (True, False):
        for values in (0, 2 * WORTH_IT):
            assert choose_compiled("auto", recorded, values, World()) == recorded
    assert messages(caplog) == []


@pytest.mark.usefixtures("compiler")
def test_a_setting_goes_before_what_was_and_that_is_said(caplog):
    assert choose_compiled(True, False, 0, World())
    assert "edge scores were in chunks before the checkpoint and are compiled from here on" in messages(caplog)[0]


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_there_are_chunks_and_one_line(caplog):
    assert not choose_compiled("auto", None, 2 * WORTH_IT, World())
    (line,) = messages(caplog)
    assert "in chunks" in line
    assert "no g++" in line
    caplog.clear()
    assert not choose_compiled("auto", None, 0, World())  # nobody wanted one
    assert messages(caplog) == []


@pytest.mark.usefixtures("no_compiler")
def test_a_resume_on_a_machine_without_a_compiler_says_so(caplog):
    assert not choose_compiled("auto", True, 0, World())
    assert "weights may differ in the last bits" in messages(caplog)[0]
    assert "no g++" in messages(caplog)[0]


@pytest.mark.usefixtures("no_compiler")
def test_what_was_asked_for_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match=r"install a C\+\+ compiler \(g\+\+\) there, or set distill.compile=auto"):
        choose_compiled(True, None, 0, World())


def test_compiled_training_follows_the_other_and_is_recorded(tmp_path):
    """A real compiler, a real run: the same weights but for rounding, and the checkpoint knows."""
    storage = small_world(tmp_path)
    found = {}
    for compile_scores in (True, False):
        train = DistillConfig(
            epochs=3, num_workers=1, launcher="inline", compile=compile_scores, checkpoint_every=1, optimizer="sgd"
        )
        task = make_task(storage, f"compiled-{compile_scores}", train, dropout=0.0)
        trainer = Trainer(task, World(), torch_factory(train, World()))
        assert trainer.objective.compiled == compile_scores
        trainer.run()
        assert load_checkpoint(task.output, task.fingerprint).compiled == compile_scores
        found[compile_scores] = read_model(task.output)[0].state_dict()
    for name, expected in found[False].items():
        torch.testing.assert_close(found[True][name], expected, rtol=1e-4, atol=1e-6)
