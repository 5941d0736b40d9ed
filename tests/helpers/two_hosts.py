"""Two hosts on one machine: ``node1`` and ``node2``, joined by a cable, each with a real sshd.

Each has its own network, processes, mounts and host name (Linux namespaces), so that processes,
ports and logins of one do not affect the other or this machine. The file system is this machine's,
like the shared one of a cluster. The namespaces end with the process that created them.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from ds_linclip.process.parent_death import end_with_parent

__all__ = ["TwoHosts", "two_hosts"]

ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "sshd", "ssh-keygen", "pdsh")
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class TwoHosts:
    """Two hosts.

    Attributes:
        folder: Keys, configs and ``hostfile``; ``node1.log`` and ``node2.log`` are their sshd's.
        names: Host names, the same for ssh, pdsh and sockets.
        addresses: IPv4 addresses by name; the interface is ``eth0`` on both.
    """

    folder: Path
    names: tuple[str, str] = ("node1", "node2")
    addresses: dict[str, str] = field(default_factory=lambda: dict(ADDRESSES))
    _networks: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _unshared: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _own: dict[str, set[int]] = field(default_factory=dict)

    def hostfile(self, slots: int = 1) -> Path:
        """``<folder>/hostfile``, both hosts with that many slots each."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        return path

    def start(
        self, host: str, *command: object, cwd: Path | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Start a command on a host, as from a shell there; its output is piped, as text.

        The process returned is outside of the host: send signals to those of :meth:`processes`.
        """
        return subprocess.Popen(
            [*self._enter(host, cwd), *map(str, command)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self,
        host: str,
        *command: object,
        cwd: Path | None = None,
        timeout: float = 240,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host; after the limit it is killed, with the hosts."""
        with self.start(host, *command, cwd=cwd, **environment) as running:
            try:
                out, err = running.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                self.close()
                out, err = running.communicate()
                raise AssertionError(f"{command} took {timeout} s:\n{out}\n{err}") from None
        return subprocess.CompletedProcess(running.args, running.returncode, out, err)

    def processes(self, host: str) -> dict[int, str]:
        """Return the command lines on a host except init and sshd, by the pid on this machine."""
        found = self._in_namespace(host)
        return {pid: line for pid, line in found.items() if pid not in self._own[host]}

    def power_off(self, host: str) -> None:
        """Kill everything on a host at once; the link stays up, but nothing answers."""
        self._unshared[host].kill()
        self._unshared[host].wait()

    def power_on(self, host: str) -> None:
        """Start a host's sshd, at first or again."""
        log = (self.folder / f"{host}.log").open("ab")
        namespaces = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._unshared[host] = subprocess.Popen(
            [*self._wire(host), "unshare", *namespaces, "bash", str(self.folder / host / "init")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,
        )
        log.close()
        login = ["ssh", "-o", "ConnectTimeout=2", host, "true"]
        self._wait(lambda: self._init(host) is not None, f"{host} to start")
        self._wait(
            lambda: (
                subprocess.run([*self._enter(host), *login], capture_output=True).returncode == 0
            ),
            f"a login to {host}",
        )
        self._wait(lambda: len(self._in_namespace(host)) == 2, "that login to end")
        self._own[host] = set(self._in_namespace(host))

    def link(self, host: str, state: str) -> None:
        """Unplug the cable of a host (``down``), or plug it in (``up``), without any message."""
        subprocess.run([*self._wire(host), "ip", "link", "set", "eth0", state], check=True)

    def close(self) -> None:
        """End the hosts and all their processes."""
        for process in (*self._unshared.values(), *self._networks.values()):
            process.kill()
            process.wait()

    def open(self) -> None:
        """Create the hosts; called by :func:`two_hosts`."""
        for host in self.names:
            self._networks[host] = subprocess.Popen(
                ["unshare", "--net", "sleep", "infinity"], preexec_fn=end_with_parent
            )
            self._wait(partial(self._has_network, host), "a network namespace")
        first, second = (str(self._networks[host].pid) for host in self.names)
        cable = ["ip", "link", "add", "eth0", "netns", first, "type", "veth"]
        _run([*cable, "peer", "name", "eth0", "netns", second])
        self._write_ssh()
        for host in self.names:
            for command in (
                f"ip address add {self.addresses[host]}/24 dev eth0",
                "ip link set eth0 up",
                "ip link set lo up",
            ):
                _run([*self._wire(host), *command.split()])
            self.power_on(host)

    def _write_ssh(self) -> None:
        """Write one key per host, for host and user; each host accepts these two keys only."""
        sshd = shutil.which("sshd", path=SEARCHED)
        known = [f"{address} {host}" for host, address in self.addresses.items()]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(known) + "\n")
        for host in self.names:
            (self.folder / host).mkdir()
            key = self.folder / host / "key"
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host, "-f", str(key)])
        keys = {host: (self.folder / host / "key.pub").read_text() for host in self.names}
        for host in self.names:
            folder = self.folder / host
            (folder / "authorized_keys").write_text("".join(keys.values()))
            (folder / "ssh_known_hosts").write_text(
                "".join(f"{name},{self.addresses[name]} {key}" for name, key in keys.items())
            )
            (folder / "ssh_config").write_text(
                "Host *\nIdentityFile /etc/ssh/key\nIdentitiesOnly yes\n"
                "UserKnownHostsFile /dev/null\nStrictHostKeyChecking yes\nLogLevel ERROR\n"
            )
            (folder / "sshd_config").write_text(
                "HostKey /etc/ssh/key\nAuthorizedKeysFile /etc/ssh/authorized_keys\n"
                "StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
                "PermitRootLogin yes\nUsePAM no\nPidFile none\nMaxStartups 100\n"
            )
            # bash stays: as process 1 it adopts orphans.
            (folder / "init").write_text(
                textwrap.dedent(f"""\
                set -e
                mount --bind {shlex.quote(str(self.folder / "hosts"))} /etc/hosts
                mount --bind {shlex.quote(str(folder))} /etc/ssh
                mount -t tmpfs tmpfs /run
                mkdir /run/sshd
                [ ! -d ~/.ssh ] || mount -t tmpfs tmpfs ~/.ssh
                hostname {host}
                {sshd} -D -e
                exit
                """)
            )

    def _wire(self, host: str) -> list[str]:
        return ["nsenter", "--target", str(self._networks[host].pid), "--net", "--"]

    def _enter(self, host: str, cwd: Path | None = None) -> list[str]:
        target = ["nsenter", "--target", str(self._init(host))]
        return [*target, "--net", "--uts", "--mount", "--pid", f"--wdns={cwd or Path.cwd()}", "--"]

    def _init(self, host: str) -> int | None:
        """Return the pid of a host's process 1 on this machine."""
        unshared = self._unshared[host].pid
        with contextlib.suppress(FileNotFoundError):
            children = Path(f"/proc/{unshared}/task/{unshared}/children").read_text().split()
            return int(children[0]) if children else None
        return None

    def _in_namespace(self, host: str) -> dict[int, str]:
        init, found = self._init(host), {}
        if init is None:
            return {}
        space = os.readlink(f"/proc/{init}/ns/pid")
        for process in Path("/proc").glob("[0-9]*"):
            # PermissionError: a process that belongs to somebody else.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and os.readlink(process / "ns" / "pid") == space:
                    line = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(process.name)] = line.decode(errors="replace").strip()
        return found

    def _has_network(self, host: str) -> bool:
        process = self._networks[host]
        if process.poll() is not None:
            raise OSError("unshare --net is not allowed")
        return os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")

    def _wait(self, condition: Callable[[], bool], for_what: str) -> None:
        until = time.monotonic() + 30
        while not condition():
            if time.monotonic() > until:
                logs = "".join(path.read_text() for path in self.folder.glob("node*.log"))
                raise TimeoutError(f"waited for {for_what}: {logs}")
            time.sleep(0.05)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Yield two hosts; skip the test where they cannot be created.

    Args:
        folder: Empty; for keys, configs and logs.
    """
    if os.geteuid() != 0:
        pytest.skip("two hosts need root, to create namespaces")
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    if missing:
        pytest.skip(f"two hosts need {', '.join(missing)} (openssh-server, pdsh, iproute2)")
    unshare = "unshare --net --uts --mount --pid --fork ip link add v0 type veth peer name v1"
    allowed = subprocess.run(unshare.split(), capture_output=True, text=True)
    if allowed.returncode != 0:
        pytest.skip(f"two hosts need namespaces and veth: {allowed.stderr.strip()}")
    hosts = TwoHosts(folder)
    try:
        hosts.open()
        yield hosts
    finally:
        hosts.close()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr}")
