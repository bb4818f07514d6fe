"""Hosts with names and addresses of their own on one machine: two Linux network namespaces."""

import os
import shutil
import signal
import subprocess
import uuid
from contextlib import contextmanager, suppress

import pytest

NAMES = ["host0", "host1"]
INTERFACE = "lan"
# As on a host: its own name, and a file with the names of all.
BOOT = 'echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class Host:
    """A network namespace in which programs see a host of this name."""

    def __init__(self, name, namespace, hosts_file):
        self.name, self.namespace, self.hosts_file = name, namespace, hosts_file
        self.processes = []

    def start(self, command, log, environment):
        """Start a program, whose output is appended to a file."""
        boot = ["unshare", "--uts", "--mount", "sh", "-c", BOOT, "sh", self.name, self.hosts_file]
        with log.open("a") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *boot, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, **environment},
            )
        self.processes.append(process)
        return process

    def die(self):
        """Kill all programs at once, as a power failure would."""
        for pid in _ip("netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.wait()


@contextmanager
def two_hosts(folder):
    """Two hosts that find each other by name, deleted with all their programs at the end.

    Skips the test where they cannot be made.
    """
    missing = [program for program in ("ip", "unshare", "mount") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found, which network namespaces take")
    hosts_file = folder / "hosts"
    addresses = [f"10.213.7.{number}" for number in (1, 2)]
    lines = [f"{address} {name}\n" for address, name in zip(addresses, NAMES, strict=True)]
    hosts_file.write_text("".join(["127.0.0.1 localhost\n", *lines]))
    run = uuid.uuid4().hex[:8]
    hosts = [Host(name, f"{name}-{run}", str(hosts_file)) for name in NAMES]
    try:
        try:
            for host in hosts:
                _ip("netns", "add", host.namespace)
            ends = ["type", "veth", "peer", "name", INTERFACE, "netns", hosts[1].namespace]
            _ip("-n", hosts[0].namespace, "link", "add", INTERFACE, *ends)
            for host, address in zip(hosts, addresses, strict=True):
                _ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
                for link in ("lo", INTERFACE):
                    _ip("-n", host.namespace, "link", "set", link, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made: {error.stderr.strip()}")
        yield hosts
    finally:
        for host in hosts:
            if host.namespace in _ip("netns", "list").split():
                host.die()
                _ip("netns", "delete", host.namespace)


def _ip(*arguments):
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
