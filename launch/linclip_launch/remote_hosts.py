"""A run's part on every one of its hosts, through ssh.

``deepspeed --hostfile`` hands this to pdsh, which waits for the hosts that are well when another
one has failed, says only the largest exit code, and leaves ranks behind where a connection breaks.
Here each host gets ``deepspeed --no_ssh`` by a connection of its own, and what was started is found
again on every host by a mark in its environment.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ds_linclip.resilience.restart_policy import Answer, ask_hosts

__all__ = ["RemoteHosts"]

#: What the ranks get of the environment; launch/environment.sh says what for.
SENT = ("DS_ACCELERATOR", "FI_", "GLOO_", "NCCL_", "OMP_", "PYTHON", "TORCH_", "TRITON_", "UCX_")
#: Seconds that hosts have left when the first of them has ended.
PATIENCE = 30


@dataclass
class RemoteHosts:
    """A shell on every host.

    Attributes:
        shell: Command that runs one more argument on ``{host}``.
        seconds: To wait for an answer.
    """

    shell: str
    seconds: float
    _mark: str = field(default="", init=False)

    def unfit(self, hosts: Iterable[str], master: str | None = None) -> dict[str, str]:
        """Hosts that cannot run this Python in the current folder or find the master, and why."""
        code = (
            f"import socket, sys\ntry: socket.getaddrinfo({master!r}, 0)\n"
            f"except OSError as error: sys.exit(f'{master}: {{error}}')"
        )
        answers = self._ask(hosts, f"cd {shlex.quote(os.getcwd())} && {_python(code)}")
        return {host: answer.text for host, answer in answers.items() if not answer.is_good}

    def port(self, host: str, wanted: int | None) -> int:
        """The wanted port, or a free one.

        Raises:
            ValueError: when it is taken, or when the host does not answer.
        """
        code = f"import socket; print(socket.create_server(('', {wanted or 0})).getsockname()[1])"
        answer = self._ask([host], _python(code))[host]
        if answer.is_good:
            return int(answer.text)
        if "already in use" in answer.text:
            raise ValueError(
                f"--master-port ({wanted}) is taken on host {host}: choose another one, or leave "
                "it out for a free one"
            )
        raise ValueError(f"host {host} cannot be asked for a port: {answer.text}")

    def run(self, commands: Mapping[str, list[str]], is_to_leave: Callable[[], bool]) -> int:
        """Run a command on every host until all have ended, or one has and the patience too.

        Args:
            commands: By host; the first one has rank 0.
            is_to_leave: Whether the ranks are to be asked to leave now.

        Returns:
            The exit code of the first one to fail; 0 when none has.
        """
        self._mark = f"LINCLIP_START={uuid.uuid4().hex}"
        sent = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(SENT)]
        running = {}
        for host, command in commands.items():
            script = f"cd {shlex.quote(os.getcwd())} && exec "
            script += shlex.join(["env", *sent, self._mark, *command])
            # A session of its own: the terminal's Ctrl-C is the supervisor's.
            running[host] = subprocess.Popen(
                self._command(host, script), stdin=subprocess.DEVNULL, start_new_session=True
            )
        exit_code, until, is_asked = 0, float("inf"), False
        while any(process.poll() is None for process in running.values()):
            for process in running.values():
                if process.poll() is not None:
                    exit_code = exit_code or process.returncode
                    until = min(until, time.monotonic() + PATIENCE)
            if time.monotonic() > until:
                break
            if is_to_leave() and not is_asked:
                self._ask_to_leave(commands)
                is_asked = True
            time.sleep(0.2)
        for host, why in self._end(commands).items():
            print(f"host {host} may still have ranks of this start: {why}", file=sys.stderr)
        for process in running.values():
            process.kill()
            exit_code = exit_code or process.wait()
        return exit_code

    def _ask_to_leave(self, hosts: Iterable[str]) -> None:
        """SIGTERM to rank 0, which tells the others; the end of all where it is not there yet."""
        rank = f"$(grep -lszx RANK=0 $({self._find()}) /dev/null | tr -dc '0-9\\n')"
        first = next(iter(hosts))
        if not self._ask([first], f"kill -{int(signal.SIGTERM)} {rank}")[first].is_good:
            self._end(hosts)

    def _end(self, hosts: Iterable[str]) -> dict[str, str]:
        """End what was started and is left; hosts where that could not be done, and why."""
        found = f"$({self._find()} | tr -dc '0-9\\n')"
        script = f'while p={found}; [ -n "$p" ]; do kill -9 $p; sleep 0.1; done 2> /dev/null'
        answers = self._ask(hosts, script)
        return {host: answer.text for host, answer in answers.items() if not answer.is_good}

    def _find(self) -> str:
        return f"grep -lszx {self._mark} /proc/[0-9]*/environ"

    def _ask(self, hosts: Iterable[str], script: str) -> dict[str, Answer]:
        return ask_hosts({host: self._command(host, script) for host in hosts}, self.seconds)

    def _command(self, host: str, script: str) -> list[str]:
        words = [word.replace("{host}", host) for word in shlex.split(self.shell)]
        return [*words, f"sh -c {shlex.quote(script)}"]


def _python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])
