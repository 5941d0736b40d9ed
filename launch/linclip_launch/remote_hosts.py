"""The hosts of a run, reached through ssh.

``deepspeed --hostfile`` hands a run to pdsh, which waits for the healthy hosts when another one has
failed, returns only the largest exit code, and leaves ranks behind where a connection breaks. Here
each host runs ``deepspeed --no_ssh`` over a connection of its own, and what was started is found
on every host by a mark in its environment.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["HostReply", "RemoteHosts", "run_on_hosts"]

#: Environment variables that ranks get, by prefix; launch/environment.sh explains them.
SENT = (
    *("DS_ACCELERATOR", "FI_", "GLOO_", "LINCLIP_", "NCCL_", "OMP_", "PYTHON", "TORCH_", "TRITON_"),
    "UCX_",
)
#: Seconds that the other hosts get once the first of them has ended.
PATIENCE = 30


class HostReply(NamedTuple):
    """Whether a command on a host ended with exit code 0, and its last line of output or errors."""

    is_ok: bool
    text: str


def run_on_hosts(commands: Mapping[str, list[str]], timeout: float) -> dict[str, HostReply]:
    """Run, all at once, the local commands that reach each host; return the replies by host. A host
    counts as silent after ``timeout`` seconds."""

    def run(host: str) -> HostReply:
        try:
            done = subprocess.run(
                commands[host],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return HostReply(False, f"no answer in {timeout:.0f} s")
        except OSError as error:
            return HostReply(False, str(error))
        is_ok = done.returncode == 0
        lines = (done.stdout if is_ok else done.stderr).strip().splitlines()
        return HostReply(is_ok, lines[-1] if lines else f"exit code {done.returncode}")

    with ThreadPoolExecutor(32) as pool:
        return dict(zip(commands, pool.map(run, commands), strict=True))


@dataclass
class RemoteHosts:
    """Commands on hosts, through a remote shell.

    Attributes:
        shell: The local command that runs one more argument on ``{host}``.
        timeout: Seconds to wait for the reply of a host.
    """

    shell: str
    timeout: float
    _mark: str = field(default="", init=False)

    def unusable(self, hosts: Iterable[str], master: str | None = None) -> dict[str, str]:
        """Return the hosts that cannot run this Python in the current folder, or cannot resolve the
        name of the master, each with the reason."""
        code = (
            f"import socket, sys\ntry: socket.getaddrinfo({master!r}, 0)\n"
            f"except OSError as error: sys.exit(f'{master}: {{error}}')"
        )
        return self._failures(hosts, f"cd {shlex.quote(os.getcwd())} && {_python(code)}")

    def port(self, host: str, wanted: int | None) -> int:
        """Return the wanted port, or a free one.

        Raises:
            ValueError: when the port is taken, or when the host does not answer.
        """
        code = f"import socket; print(socket.create_server(('', {wanted or 0})).getsockname()[1])"
        reply = self._run([host], _python(code))[host]
        if reply.is_ok:
            return int(reply.text)
        if "already in use" in reply.text:
            raise ValueError(
                f"--master-port ({wanted}) is taken on host {host}: choose another one, or leave "
                "it out for a free one"
            )
        raise ValueError(f"host {host} has no port to offer: {reply.text}")

    def run(self, commands: Mapping[str, list[str]], should_leave: Callable[[], bool]) -> int:
        """Run a command on every host until all have ended, or one has for 30 seconds; then end
        what is left. The first host has rank 0.

        When ``should_leave`` returns true, the ranks are requested to save and leave.

        Returns:
            The exit code of the first command to fail; 0 when none has.
        """
        self._mark = f"LINCLIP_START={uuid.uuid4().hex}"
        sent = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(SENT)]
        running = {}
        for host, command in commands.items():
            script = f"cd {shlex.quote(os.getcwd())} && exec "
            script += shlex.join(["env", *sent, self._mark, *command])
            # In its own session: the terminal's Ctrl-C is meant for the supervisor.
            running[host] = subprocess.Popen(
                self._command(host, script), stdin=subprocess.DEVNULL, start_new_session=True
            )
        exit_code, until, is_requested = 0, float("inf"), False
        while any(process.poll() is None for process in running.values()):
            for process in running.values():
                if process.poll() is not None:
                    exit_code = exit_code or process.returncode
                    until = min(until, time.monotonic() + PATIENCE)
            if time.monotonic() > until:
                break
            if should_leave() and not is_requested:
                self._request_to_leave(commands)
                is_requested = True
            time.sleep(0.2)
        for host, reason in self._end(commands).items():
            print(f"host {host} may still have ranks of this start: {reason}", file=sys.stderr)
        for process in running.values():
            process.kill()
            exit_code = exit_code or process.wait()
        return exit_code

    def _request_to_leave(self, hosts: Iterable[str]) -> None:
        """Send SIGTERM to rank 0, which notifies the others; end all if it has not started yet."""
        rank = f"$(grep -lszx RANK=0 $({self._find()}) /dev/null | tr -dc '0-9\\n')"
        first = next(iter(hosts))
        if not self._run([first], f"kill -{int(signal.SIGTERM)} {rank}")[first].is_ok:
            self._end(hosts)

    def _end(self, hosts: Iterable[str]) -> dict[str, str]:
        """Kill all processes of this start; return the hosts where that failed, with the reason."""
        found = f"$({self._find()} | tr -dc '0-9\\n')"
        script = f'while p={found}; [ -n "$p" ]; do kill -9 $p; sleep 0.1; done 2> /dev/null'
        return self._failures(hosts, script)

    def _find(self) -> str:
        return f"grep -lszx {self._mark} /proc/[0-9]*/environ"

    def _failures(self, hosts: Iterable[str], script: str) -> dict[str, str]:
        replies = self._run(hosts, script)
        return {host: reply.text for host, reply in replies.items() if not reply.is_ok}

    def _run(self, hosts: Iterable[str], script: str) -> dict[str, HostReply]:
        commands = {host: self._command(host, script) for host in hosts}
        return run_on_hosts(commands, self.timeout)

    def _command(self, host: str, script: str) -> list[str]:
        words = [word.replace("{host}", host) for word in shlex.split(self.shell)]
        return [*words, f"sh -c {shlex.quote(script)}"]


def _python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])
