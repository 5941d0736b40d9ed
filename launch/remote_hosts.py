"""Other hosts of a run, through ssh: what DeepSpeed's launcher leaves undone there.

It starts ranks on them and forgets them: a connection that breaks ends none of them, and a signal
is theirs for 30 seconds. What a start has started carries its mark in the environment, by which it
is found on every host.
"""

import os
import shlex
import signal
import sys
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ds_linclip.supervision import Answer, ask_hosts

__all__ = ["RemoteHosts", "for_pdsh"]

#: What DeepSpeed does not send by itself; it sends NCCL* (with GPUs), PYTHON*, UCX* and MV2*.
SENT = ("DS_ACCELERATOR", "FI_", "GLOO_", "NCCL_", "OMP_", "TORCH_", "TRITON_")
MARK = "LINCLIP_START"


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

    def silent(self, hosts: Iterable[str]) -> dict[str, str]:
        """Hosts that cannot run this project's Python in the current folder, and why."""
        answers = self._ask(hosts, f"cd {shlex.quote(os.getcwd())} && {_python()} --version")
        return {host: answer.text for host, answer in answers.items() if not answer.is_good}

    def port(self, host: str, wanted: int | None) -> int:
        """The wanted port, or a free one.

        Raises:
            ValueError: when it is taken, or when the host does not answer.
        """
        code = f"import socket; print(socket.create_server(('', {wanted or 0})).getsockname()[1])"
        answer = self._ask([host], f"{_python()} -c {shlex.quote(code)}")[host]
        if answer.is_good:
            return int(answer.text)
        if "already in use" in answer.text:
            raise ValueError(
                f"--master-port ({wanted}) is taken on host {host}: choose another one, or leave "
                "it out for a free one"
            )
        raise ValueError(f"host {host} cannot be asked for a port: {answer.text}")

    def environment(self, path: Path) -> dict[str, str]:
        """Write what the ranks of the next start get to know; DeepSpeed reads it by what returns.

        DeepSpeed's own files of that kind, of the home and the current folder, come first.
        """
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        lines = []
        for file in (Path.home() / name, Path(name)):
            lines += file.read_text().splitlines() if file.is_file() else []
        lines += [f"{key}={value}" for key, value in os.environ.items() if key.startswith(SENT)]
        path.write_text("\n".join([*filter(None, lines), self._mark]) + "\n")
        return {"DS_ENV_FILE": str(path.resolve())}

    def ask_to_leave(self, host: str) -> bool:
        """SIGTERM to the first rank of a host, which tells the others; False if it is not there."""
        found = f"$(grep -lszx {self._mark} /proc/[0-9]*/environ)"
        rank = f"$(grep -lszx LOCAL_RANK=0 {found} /dev/null | tr -dc '0-9\\n')"
        return self._ask([host], f"kill -{int(signal.SIGTERM)} {rank}")[host].is_good

    def end(self, hosts: Iterable[str], patience: int = 10) -> dict[str, str]:
        """End what the start has left; hosts where that could not be done, and why.

        Ranks that leave by themselves get some seconds for it: their launcher, which is one of
        several, may have heard of it first.
        """
        script = "; ".join(
            (
                f"found() {{ grep -lszx {self._mark} /proc/[0-9]*/environ | tr -dc '0-9\\n'; }}",
                f'for n in $(seq {patience}); do [ -z "$(found)" ] || sleep 1; done',
                'while [ -n "$(found)" ]; do kill -9 $(found); sleep 0.1; done 2> /dev/null',
            )
        )
        answers = self._ask(hosts, script, self.seconds + patience)
        return {host: answer.text for host, answer in answers.items() if not answer.is_good}

    def _ask(
        self, hosts: Iterable[str], script: str, seconds: float | None = None
    ) -> dict[str, Answer]:
        command = [*shlex.split(self.shell), f"sh -c {shlex.quote(script)}"]
        return ask_hosts(hosts, command, seconds or self.seconds)


def for_pdsh(argument: str) -> str:
    """What DeepSpeed must be given for a rank to get this argument.

    pdsh hands its command to a shell, which takes quotes, braces and dollars for its own. DeepSpeed
    puts what has a space between double quotes, and nothing else.
    """
    if " " in argument:
        quoted = "".join(f"\\{c}" if c in "\\$`" else c for c in argument)
    else:
        quoted = shlex.quote(argument)
    return quoted.replace("%", "%%")


def _python() -> str:
    return shlex.quote(sys.executable)
