"""The command: what it prints, what it returns, and one clean line for every error."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml
from flow_runs import STAGES, Job, gkd

from gkd_dist import cli
from gkd_dist.config_file import parse_config
from gkd_dist.errors import ConfigError, DataError, GkdError, InfrastructureError

VERBS = ["run", *STAGES, "predict", "verify", "inspect", "config"]


def guarded(act: Callable[[], int], *arguments: str, debug: bool = False) -> int:
    """An action under the guard of `main`."""
    return cli._guarded(act, argparse.Namespace(debug=debug, verbose=False), list(arguments))


def raiser(error: BaseException) -> Callable[[], int]:
    def act() -> int:
        raise error

    return act


def test_sigterm_has_its_own_handler_again_after_a_command() -> None:
    before, inside = signal.getsignal(signal.SIGTERM), []
    assert guarded(lambda: inside.append(signal.getsignal(signal.SIGTERM)) or 0) == 0
    assert inside != [before]
    assert signal.getsignal(signal.SIGTERM) == before


# --- verbs -----------------------------------------------------------------------------------


def test_without_a_verb_it_lists_them_all() -> None:
    outcome = gkd()
    assert outcome.code == 0
    assert re.findall(r"^    (\w+)\s", outcome.out, re.MULTILINE) == VERBS
    assert "exit codes: 0 done, 2 wrong configuration, 3 wrong data, 4 infrastructure" in outcome.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    outcome = gkd(verb, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: gkd {verb} ")


def test_stages_say_what_they_read_and_write() -> None:
    outcome = gkd("infer", "--help")
    assert "read graph/, teacher/, write knowledge/" in outcome.out


def test_version() -> None:
    outcome = gkd("--version")
    assert (outcome.code, outcome.out.split()[0]) == (0, "gkd_dist")


@pytest.mark.parametrize(
    "arguments",
    [["dance"], ["run"], ["run", "x.yaml", "--redo", "dance"], ["verify"], ["run", "x.yaml", "--dry-run", "--bogus=1"]],
)
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    outcome = gkd(*arguments)
    assert outcome.code == 2
    assert "usage: gkd" in outcome.err


def test_overrides_may_stand_anywhere_after_the_file(finished: Job) -> None:
    file = str(finished.config)
    for arguments in (
        [file, "seed=1", "--dry-run", "seed=2"],
        ["--dry-run", file, "seed=2"],
        [file, "--dry-run", "seed=2"],
    ):
        args = cli._parse(["run", *arguments])
        assert (args.config, args.overrides[-1], args.dry_run) == (file, "seed=2", True)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a"), 2), (DataError("a"), 3), (InfrastructureError("a"), 4), (GkdError("a"), 1)],
)
def test_errors_of_ours_are_one_line_and_a_code(error: GkdError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(raiser(error)) == code
    assert capsys.readouterr().err == "gkd: error: a\n"


def test_unexpected_errors_name_themselves_and_the_way_to_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(raiser(ZeroDivisionError("by zero"))) == 1
    assert capsys.readouterr().err == (
        "gkd: unexpected error: ZeroDivisionError: by zero; run again with --debug for the traceback\n"
    )


@pytest.mark.parametrize("error", [DataError("a"), ZeroDivisionError()])
def test_debug_lets_errors_through(error: Exception) -> None:
    with pytest.raises(type(error)):
        guarded(raiser(error), debug=True)


def test_an_interrupted_command_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "my run.yaml", "distill.lr=0.1", "--redo", "teach", "--redo=infer"]
    assert guarded(raiser(KeyboardInterrupt()), *arguments) == 130
    said = capsys.readouterr().err.strip().rpartition("go on with: ")[2]
    assert shlex.split(said) == ["gkd", "run", "my run.yaml", "distill.lr=0.1"]  # what is redone was discarded


def test_the_command_to_go_on_with_keeps_a_file_of_any_name() -> None:
    assert cli._without_redo(["teach", "--redo", "c.yaml"]) == ["teach", "c.yaml"]
    assert cli._without_redo(["teach", "c.yaml", "--redo"]) == ["teach", "c.yaml"]


def test_sigterm_is_as_gentle_as_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    def act() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert guarded(act, "run", "c.yaml") == 143
    assert "go on with: gkd run c.yaml" in capsys.readouterr().err


# --- config ----------------------------------------------------------------------------------


def test_the_resolved_configuration_can_be_read_back(finished: Job) -> None:
    shown = gkd("config", "show", str(finished.config), "distill.lr=0.5")
    assert shown.code == 0
    assert parse_config(shown.out) == finished.load("distill.lr=0.5")


def test_the_schema_accepts_the_configurations_that_ship() -> None:
    schema = gkd("config", "schema").json
    files = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))
    assert files
    for file in files:
        jsonschema.validate(yaml.safe_load(file.read_text()), schema)


def test_show_needs_a_file() -> None:
    outcome = gkd("config", "show")
    assert outcome.code == 2
    assert "needs a file" in outcome.complaint
