"""Refusals that need no Ray to run."""

from __future__ import annotations

import socket
import time

import pytest

from gkd_dist.config import RayConfig
from gkd_dist.errors import ConfigError, InfrastructureError
from gkd_dist.infer.cluster import start_ray


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_an_address_where_nothing_answers_is_an_error_in_bounded_time(closed_port: int) -> None:
    start = time.monotonic()
    with (
        pytest.raises(InfrastructureError, match=rf"nothing answers at 127.0.0.1:{closed_port} .* ray.address=local"),
        start_ray(RayConfig(address=f"127.0.0.1:{closed_port}", timeout_s=1.0), 1, 0),
    ):
        pass
    assert time.monotonic() - start < 20


def test_a_listener_that_is_no_ray_is_an_error_in_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        start = time.monotonic()
        with (
            pytest.raises(InfrastructureError, match=rf"what listens at {address} is no working Ray cluster"),
            start_ray(RayConfig(address=address, timeout_s=2.0), 1, 0),
        ):
            pass
        assert time.monotonic() - start < 20


def test_ray_address_of_the_environment_is_used(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    with pytest.raises(InfrastructureError, match=f":{closed_port}"), start_ray(RayConfig(timeout_s=0.6), 1, 0):
        pass


def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="local, auto or host:port"), start_ray(RayConfig(address="there"), 1, 0):
        pass


def test_more_cpus_than_configured_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ConfigError, match=r"needs 4 CPUs at a time, ray.num_cpus is 2"),
        start_ray(RayConfig(num_cpus=2), 4, 0),
    ):
        pass
