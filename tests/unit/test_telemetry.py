"""Log lines, progress with and without a terminal, timers and memory."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr

import pytest

from gkd_dist.telemetry import Progress, Timer, duration, progress_line, setup_logging

log = logging.getLogger("gkd_dist.somewhere")


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clean_logging() -> Iterator[None]:
    """Puts handlers and levels back as they were."""
    loggers = [logging.getLogger(), logging.getLogger("gkd_dist")]
    before = [(one, list(one.handlers), one.level) for one in loggers]
    yield
    for one, handlers, level in before:
        one.handlers[:] = handlers
        one.setLevel(level)


@pytest.mark.usefixtures("clean_logging")
class TestLogging:
    def test_lines_have_the_time_and_name_only_unusual_levels(self, capsys: pytest.CaptureFixture[str]):
        setup_logging()
        log.debug("not shown")
        log.info("partition: started")
        log.warning("little halo")
        lines = capsys.readouterr().err.splitlines()
        assert [re.sub(r"^\d\d:\d\d:\d\d", "T", line) for line in lines] == [
            "T partition: started",
            "T warning: little halo",
        ]

    def test_verbose_shows_debug_of_this_package_only(self, capsys: pytest.CaptureFixture[str]):
        setup_logging(verbose=True)
        log.debug("ours")
        logging.getLogger("other").info("theirs")
        logging.getLogger("other").warning("their warning")
        assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == [
            "ours",
            "warning: their warning",
        ]

    def test_json_lines_can_be_parsed(self, capsys: pytest.CaptureFixture[str]):
        setup_logging(json_lines=True)
        log.info("two\nlines and %s", "é")
        try:
            raise ValueError("bad")
        except ValueError:
            log.exception("failed")
        first, second = map(json.loads, capsys.readouterr().err.splitlines())
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
        assert first == {"level": "info", "logger": "gkd_dist.somewhere", "message": "two\nlines and é"}
        assert second["error"].endswith("ValueError: bad")

    def test_a_second_call_replaces_the_first(self, capsys: pytest.CaptureFixture[str]):
        setup_logging()
        setup_logging(json_lines=True)
        log.info("once")
        assert len(capsys.readouterr().err.splitlines()) == 1

    def test_lines_follow_stderr_when_it_is_replaced(self, monkeypatch: pytest.MonkeyPatch):
        setup_logging()
        replaced = io.StringIO()
        monkeypatch.setattr(sys, "stderr", replaced)
        log.info("here")
        assert replaced.getvalue().endswith(" here\n")


class TestLines:
    """Where stderr is no terminal."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    def test_one_line_per_interval_and_one_at_the_end(self, clock: Clock, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO, "gkd_dist")
        with Progress(interactive=False, every_s=5, clock=clock).task("teach", total=10) as task:
            for _ in range(10):
                clock.now += 2
                task.advance(1, text="val 0.81")
        assert caplog.messages == [
            "teach: 3/10 (30%), 6 s, 14 s left, val 0.81",
            "teach: 6/10 (60%), 12 s, 8 s left, val 0.81",
            "teach: 9/10 (90%), 18 s, 2 s left, val 0.81",
            "teach: 10/10 (100%), 20 s, val 0.81",
        ]

    def test_the_last_line_is_not_repeated(self, clock: Clock, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO, "gkd_dist")
        with Progress(interactive=False, every_s=5, clock=clock).task("infer", total=1) as task:
            clock.now += 6
            task.advance()
        assert caplog.messages == ["infer: 1/1 (100%), 6 s"]

    def test_a_total_may_come_later(self, clock: Clock, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO, "gkd_dist")
        with Progress(interactive=False, every_s=5, clock=clock).task("infer") as task:
            clock.now += 5
            task.advance(2)
            clock.now += 5
            task.advance(2, total=8)
        assert caplog.messages == ["infer: 2, 5 s", "infer: 4/8 (50%), 10 s, 10 s left"]

    def test_errors_pass_through(self, clock: Clock):
        with pytest.raises(KeyError), Progress(interactive=False, clock=clock).task("teach", total=1):
            raise KeyError("x")

    def test_nothing_to_do(self):
        assert progress_line("infer", 0, 0, 0.0) == "infer: 0/0, 0 s"

    @pytest.mark.parametrize(
        ("seconds", "words"),
        [
            (0, "0 s"), (0.256, "0.26 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"),
            (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7810, "2 h 10 min"),
        ],
    )  # fmt: skip
    def test_durations(self, seconds: float, words: str):
        assert duration(seconds) == words


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


class TestBars:
    """On a terminal."""

    def test_a_bar_shows_name_count_and_text(self, wide_terminal: Terminal):
        with redirect_stderr(wide_terminal), Progress().task("teach", total=4) as task:
            task.advance(1)
            task.advance(2, text="val [0.81]")
        last = wide_terminal.getvalue().rsplit("teach", 1)[1]
        assert "3/4" in last
        assert "val [0.81]" in last  # not taken for markup

    def test_bars_overlap_and_may_be_opened_again(self, wide_terminal: Terminal):
        progress = Progress()
        with redirect_stderr(wide_terminal):
            with progress.task("outer", total=1) as outer, progress.task("inner") as inner:
                inner.advance(5, total=9)
                outer.advance()
            with progress.task("again", total=1) as again:
                again.advance()
        text = wide_terminal.getvalue()
        assert "5/9" in text
        assert "1/1" in text.rsplit("again", 1)[1]

    @pytest.mark.usefixtures("clean_logging")
    def test_log_lines_stand_above_the_bar(self, wide_terminal: Terminal):
        setup_logging()
        with redirect_stderr(wide_terminal), Progress().task("teach", total=2) as task:
            log.info("a line")
            task.advance(2)
        text = wide_terminal.getvalue()
        between = text[text.index("a line") : text.rindex("teach")]
        assert "\n" in between

    def test_an_error_leaves_the_terminal_as_it_was(self, wide_terminal: Terminal):
        with redirect_stderr(wide_terminal):
            with pytest.raises(KeyError), Progress().task("teach", total=2):
                raise KeyError("x")
            assert sys.stderr is wide_terminal
        assert wide_terminal.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


class TestMeasures:
    def test_a_timer_adds_up_its_blocks(self):
        clock = Clock()
        timer = Timer(clock)
        for seconds in (2.0, 3.0):
            with timer:
                clock.now += seconds
            clock.now += 10
        assert (timer.total_s, timer.last_s) == (5.0, 3.0)

    def test_inner_blocks_are_not_counted_twice(self):
        clock = Clock()
        timer = Timer(clock)
        with timer:
            clock.now += 1
            with timer:
                clock.now += 2
        assert timer.total_s == 3.0

    def test_a_block_that_fails_counts(self):
        clock = Clock()
        timer = Timer(clock)

        def fail() -> None:
            clock.now += 1
            raise KeyError("x")

        with pytest.raises(KeyError), timer:
            fail()
        assert timer.total_s == 1.0

    def test_peak_memory_stays_when_memory_is_given_back(self):
        code = """if True:
            from gkd_dist.telemetry import peak_rss_bytes
            print(peak_rss_bytes())
            block = b"x" * (128 << 20)
            del block
            print(peak_rss_bytes())
        """
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        before, after = map(int, result.stdout.split())
        assert after - before == pytest.approx(128 << 20, rel=0.02)

    def test_peak_memory_is_that_of_this_process_and_not_of_its_parent(self):
        code = """if True:
            import subprocess, sys
            from gkd_dist.telemetry import peak_rss_bytes
            block = b"x" * (256 << 20)
            print(peak_rss_bytes())
            child = "from gkd_dist.telemetry import peak_rss_bytes; print(peak_rss_bytes())"
            print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
        """
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        parent, child = map(int, result.stdout.split())
        assert parent > 256 << 20
        assert child < 128 << 20


def test_nothing_heavy_is_imported():
    code = "import sys, gkd_dist.telemetry, gkd_dist.tensorboard; print({'torch', 'tensorboard'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "set()"
