"""Curves are written, mirrored to stores without files, and read back by TensorBoard's own reader."""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gkd_dist.errors import StorageError
from gkd_dist.storage import Storage
from gkd_dist.tensorboard import MetricsWriter, read_curves


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """One store whose files TensorBoard can read and one that must be mirrored."""
    return Storage.open(str(tmp_path / "run") if request.param == "file" else f"memory://{tmp_path.name}")


@pytest.fixture
def remote(tmp_path: Path) -> Storage:
    return Storage.open(f"memory://{tmp_path.name}")


def wait_until(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class TestRoundTrip:
    def test_scalars_come_back_by_name_and_step(self, store: Storage):
        with MetricsWriter(store, "tensorboard/teacher") as writer:
            for step in (1, 2, 3):
                writer.scalar("loss/total", 1 / step, step)
            writer.scalar("accuracy/val", 0.5, 3)
        curves = read_curves(store.child("tensorboard/teacher"))
        assert list(curves) == ["accuracy/val", "loss/total"]
        assert [step for step, _ in curves["loss/total"]] == [1, 2, 3]
        assert [value for _, value in curves["loss/total"]] == pytest.approx([1, 1 / 2, 1 / 3])

    def test_every_point_is_kept(self, store: Storage):
        with MetricsWriter(store, "t") as writer:
            for step in range(10_001):  # TensorBoard itself keeps a sample of 10,000
                writer.scalar("lr", step, step)
        assert read_curves(store.child("t"))["lr"] == [(step, float(step)) for step in range(10_001)]

    def test_values_that_are_not_finite_are_left_out(self, store: Storage):
        with MetricsWriter(store, "t") as writer:
            for step, value in enumerate([1.0, math.nan, math.inf, 2.0]):
                writer.scalar("loss/total", value, step)
        assert read_curves(store.child("t")) == {"loss/total": [(0, 1.0), (3, 2.0)]}

    def test_nothing_written(self, store: Storage):
        assert read_curves(store.child("t")) == {}

    def test_models_of_one_run_are_apart(self, store: Storage):
        for name, value in (("alone", 1.0), ("distilled", 2.0)):
            with MetricsWriter(store, f"tensorboard/{name}") as writer:
                writer.scalar("lr", value, 1)
        assert read_curves(store.child("tensorboard/alone")) == {"lr": [(1, 1.0)]}
        assert read_curves(store.child("tensorboard/distilled")) == {"lr": [(1, 2.0)]}
        assert read_curves(store.child("tensorboard")) == {}

    def test_texts_and_histograms(self, tmp_path: Path):
        with MetricsWriter(Storage.open(str(tmp_path)), "t") as writer:
            writer.text("summary", "| epochs | 3 |")
            writer.histogram("grads", torch.tensor([1.0, 2.0, 2.0]), 7)
            writer.histogram("grads", torch.tensor([]), 8)
        events = EventAccumulator(str(tmp_path / "t"))
        events.Reload()
        (text,) = events.Tensors("summary/text_summary")
        assert text.tensor_proto.string_val[0] == b"| epochs | 3 |"
        (histogram,) = events.Histograms("grads")
        assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (7, 3.0, 5.0)

    def test_closing_twice(self, store: Storage):
        writer = MetricsWriter(store, "t")
        writer.scalar("lr", 1.0, 1)
        writer.close()
        writer.close()
        assert read_curves(store.child("t")) == {"lr": [(1, 1.0)]}


class TestResume:
    def test_points_after_the_checkpoint_are_replaced(self, store: Storage):
        with MetricsWriter(store, "t", purge_step=1) as writer:
            for step in range(1, 7):
                writer.scalar("lr", 1.0, step)
        with MetricsWriter(store, "t", purge_step=5) as writer:  # killed at 6, the checkpoint was of step 4
            for step in range(5, 8):
                writer.scalar("lr", 2.0, step)
        assert read_curves(store.child("t"))["lr"] == [(s, 1.0) for s in (1, 2, 3, 4)] + [(s, 2.0) for s in (5, 6, 7)]

    def test_a_run_that_starts_over_hides_all_of_the_old_one(self, store: Storage):
        for value in (1.0, 2.0):
            with MetricsWriter(store, "t", purge_step=1) as writer:
                writer.scalar("lr", value, 1)
        assert read_curves(store.child("t"))["lr"] == [(1, 2.0)]

    def test_a_file_that_ends_in_the_middle_of_a_point(self, tmp_path: Path):
        store = Storage.open(str(tmp_path))
        with MetricsWriter(store, "t") as writer:
            for step in (1, 2):
                writer.scalar("lr", 1.0, step)
        (file,) = (tmp_path / "t").iterdir()
        file.write_bytes(file.read_bytes()[:-5])
        assert read_curves(store.child("t")) == {"lr": [(1, 1.0)]}


class TestMirror:
    def test_points_are_in_the_store_while_the_run_goes_on(self, remote: Storage):
        writer = MetricsWriter(remote, "t", flush_s=0.05)
        writer.scalar("lr", 1.0, 1)
        wait_until(lambda: read_curves(remote.child("t")) == {"lr": [(1, 1.0)]})
        writer.scalar("lr", 2.0, 2)
        wait_until(lambda: len(read_curves(remote.child("t"))["lr"]) == 2)
        writer.close()

    def test_flush_waits_for_the_store(self, remote: Storage):
        with MetricsWriter(remote, "t", flush_s=1000) as writer:
            writer.scalar("lr", 1.0, 1)
            writer.flush()
            assert read_curves(remote.child("t")) == {"lr": [(1, 1.0)]}

    def test_close_leaves_neither_thread_nor_folder(self, remote: Storage, tmp_path: Path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with MetricsWriter(remote, "t") as writer:
            writer.scalar("lr", 1.0, 1)
            assert list(tmp_path.iterdir())
        assert list(tmp_path.iterdir()) == []
        assert not [thread for thread in threading.enumerate() if thread.name == "gkd-tensorboard-mirror"]

    def test_an_unreachable_store_costs_a_warning_and_no_training(
        self, remote: Storage, tmp_path: Path, monkeypatch, caplog
    ):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        caplog.set_level(logging.WARNING, "gkd_dist")

        def refuse(self: Storage, key: str, data: bytes) -> None:
            raise StorageError("memory://run: no answer")

        with monkeypatch.context() as broken:
            broken.setattr(Storage, "write", refuse)
            writer = MetricsWriter(remote, "t", flush_s=1000)
            writer.scalar("lr", 1.0, 1)
            writer.flush()
            writer.flush()
            writer.close()
        (kept,) = tmp_path.iterdir()
        assert [message.partition(":")[0] for message in caplog.messages] == [
            f"curves are not in the store yet, they are kept in {kept}",
            f"copy {kept} to memory",
        ]
        assert read_curves(Storage.open(str(kept))) == {"lr": [(1, 1.0)]}

    def test_a_store_that_comes_back_gets_everything(self, remote: Storage, monkeypatch):
        writer = MetricsWriter(remote, "t", flush_s=1000)
        with monkeypatch.context() as broken:
            broken.setattr(Storage, "write", lambda self, key, data: (_ for _ in ()).throw(StorageError("no answer")))
            writer.scalar("lr", 1.0, 1)
            writer.flush()
        writer.scalar("lr", 2.0, 2)
        writer.close()
        assert read_curves(remote.child("t")) == {"lr": [(1, 1.0), (2, 2.0)]}


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write event files"):
        MetricsWriter(Storage.open(str(tmp_path)), "file/teacher")
