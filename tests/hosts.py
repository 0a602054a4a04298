"""Two hosts on one machine: network namespaces with a cable between them, a Ray node in each.

Needs root and iproute2; a test that finds neither is skipped and says what is missing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from flow_runs import process_env

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # of the block that is reserved for examples
PORT = 6379
# A dead host is noticed in seconds, not in a minute.
_WATCHFUL = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass
class Hosts:
    """The pair. The first one is the head; folders are shared."""

    name: str
    sockets: str  # a short path: those of sockets have at most 107 bytes
    env: Mapping[str, str]
    groups: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, host: int, *command: str) -> list[str]:
        """``command``, to be run on a host. It sees the network of that host and everything else as it is."""
        return ["nsenter", f"--net=/run/netns/{self.name}-{host}", *command]

    def start_ray(self, host: int, num_cpus: int) -> None:
        """Starts the Ray node of a host and waits until it is up."""
        role = ["--head", f"--port={PORT}"] if host == 0 else [f"--address={ADDRESSES[0]}:{PORT}"]
        command = self.command(
            host,
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *role, f"--node-ip-address={ADDRESSES[host]}"),
            *(f"--num-cpus={num_cpus}", "--num-gpus=0", "--object-store-memory=80000000", "--disable-usage-stats"),
            *(() if host else ("--include-dashboard=false", f"--temp-dir={self.sockets}")),
        )
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self, host: int) -> list[psutil.Process]:
        """All processes in the network of a host."""
        network = os.stat(f"/run/netns/{self.name}-{host}").st_ino
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.stat(f"/proc/{process.pid}/ns/net").st_ino == network:
                    found.append(process)
        return found

    def cut(self) -> None:
        """Pulls the cable."""
        _ip("-n", f"{self.name}-1", "link", "set", "eth0", "down")


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """The hosts, without Ray; whatever runs on them at the end is killed."""
    _require()
    name = f"gkd-{os.getpid()}-{secrets.token_hex(2)}"
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = {**process_env(), **_WATCHFUL, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    sockets = tempfile.mkdtemp(prefix="gkd-")
    hosts = Hosts(name, sockets, env)
    try:
        _lay_cable(name)
        yield hosts
    finally:
        for host in (1, 0):
            with suppress(FileNotFoundError):
                for process in hosts.processes(host):
                    with suppress(psutil.Error):
                        process.send_signal(signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", f"{name}-{host}"], capture_output=True, check=False)
        shutil.rmtree(sockets, ignore_errors=True)


def _require() -> None:
    for program, package in (("ip", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            pytest.skip(f"two hosts need the program {program}; install it: apt-get install {package}")
    probe = f"gkd-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no network namespace can be made here ({made.stderr.strip()}); run as root, with CAP_SYS_ADMIN")
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)


def _lay_cable(name: str) -> None:
    for host in (0, 1):
        _ip("netns", "add", f"{name}-{host}")
    _ip("-n", f"{name}-0", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", f"{name}-1")
    for host, address in enumerate(ADDRESSES):
        _ip("-n", f"{name}-{host}", "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", f"{name}-{host}", "link", "set", device, "up")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"`ip {' '.join(arguments)}` failed ({done.stderr.strip()}): no two hosts on this machine")
