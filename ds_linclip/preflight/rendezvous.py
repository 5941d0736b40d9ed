"""Ranks that find each other and answer questions together, none of them waiting for ever.

Questions and answers go through torch's store, a socket to rank 0 each: it tells who is silent,
which a collective does not.
"""

import base64
import json
import os
import pickle
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Failed", "Meeting", "MeetingError"]

#: Seconds beyond the time limit until an answer, that of having none included, is taken for lost.
_GRACE = 5.0


class MeetingError(RuntimeError):
    """Ranks that did not come, or went away.

    Attributes:
        host: Theirs, as far as is known, or that of the rank that cannot reach them.
        is_known_to_rank_zero: It has the same error.
    """

    def __init__(self, message: str, host: str, *, is_known_to_rank_zero: bool) -> None:
        super().__init__(message)
        self.host = host
        self.is_known_to_rank_zero = is_known_to_rank_zero


@dataclass(frozen=True)
class Failed:
    """The answer of a rank that has none.

    Attributes:
        reason: What was raised, or that it took too long.
    """

    reason: str


@dataclass(frozen=True)
class _Silent:
    """In the place of the answer of a rank that gives none, not even that."""


class Meeting:
    """All ranks of one start; all of them call every method together.

    Args:
        store: That they share; None in a world of one.
        rank, world_size: Of this process, of all.
        timeout: Seconds that any question may take.

    Attributes:
        hosts: Name of every rank's host, in rank order, once all have come; empty before. Where
            several have one name, the number of the node is behind it.
        master: Where rank 0 waits for the others.
        address: This host's, as others reach it.
    """

    def __init__(
        self, store: dist.TCPStore | None, rank: int, world_size: int, timeout: float
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._store = store
        self.master = "" if store is None else f"{store.host}:{store.port}"
        self.address = "127.0.0.1" if store is None else _own_address(store, rank)
        self.hosts: list[str] = []
        self._silent: list[int] = []

    @classmethod
    def join(cls, timeout: float) -> "Meeting":
        """Come where rank 0 waits, as the launcher has it; without a launcher, a world of one.

        Args:
            timeout: Seconds within which all must come, and that any question may take.

        Raises:
            MeetingError: when the store cannot be made or reached.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls(None, 0, 1, timeout)
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun keeps a store of its own at that port.
        is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            if not is_server:
                _wait_for(address, port, timeout)
            patience = timedelta(seconds=timeout)
            store = dist.TCPStore(
                address, port, world_size, is_server, patience, wait_for_workers=False
            )
        except (OSError, dist.DistError) as error:
            what = f"master {address}:{port} cannot be reached in {timeout:.0f} s"
            if is_server:
                what = f"port {port} for the master is not free; choose another (--master_port)"
            raise MeetingError(
                f"{what}: {_first_line(error)}", socket.gethostname(), is_known_to_rank_zero=False
            ) from error
        return cls(store, rank, world_size, timeout)

    def wait_for_all(self) -> None:
        """Learn who is where; the first question.

        Raises:
            MeetingError: as :meth:`ask`.
        """
        places = self.ask("arrive", _place)
        nodes = Counter(host for host, _ in set(places))
        self.hosts = [host if nodes[host] == 1 else f"{host}#{node}" for host, node in places]

    @property
    def leaders(self) -> list[int]:
        """The first rank of each host."""
        return [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]

    def ask(
        self, question: str, fn: Callable[[], Any], whom: Sequence[int] | None = None
    ) -> list[Any]:
        """What ``fn`` gives on every rank, in rank order, to all.

        It runs in a thread, since a file system or a collective that does not answer cannot be
        interrupted.

        Args:
            question: Its name, new in this meeting.
            fn: Returns what can be pickled.
            whom: Ranks to run it on; the others' answers are None. Default: all.

        Returns:
            The answers; :class:`Failed` of a rank on which it raised, or took too long.

        Raises:
            MeetingError: when a rank is silent, on all that are left.
        """
        answer = None
        if whom is None or self.rank in whom:
            answer = _within(self.timeout, fn)
        if self._store is None:
            return [answer]
        try:
            found = self._exchange(self._store, question, answer)
        except dist.DistError as error:
            raise MeetingError(
                f"rank 0 went away at {question!r}: {_first_line(error)}",
                (self.hosts or _launched_hosts(self.world_size))[0],
                is_known_to_rank_zero=self.rank == 0,
            ) from error
        self._silent = [rank for rank, each in enumerate(found) if isinstance(each, _Silent)]
        if self._silent:
            raise self._error(question)
        return found

    def connect(self, device: torch.device) -> None:
        """Make torch's process group: gloo between CPUs, with GPUs also nccl between these."""
        assert self._store is not None
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        store = self._store.clone()  # type: ignore[attr-defined]  # a connection of its own
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("process-group", store),
            rank=self.rank,
            world_size=self.world_size,
            # nccl ends the process when it gives up: this meeting gives up before.
            timeout=timedelta(seconds=(2 if device.type == "cuda" else 1) * self.timeout),
        )

    def close(self) -> None:
        """Part, when rank 0 does: a launcher ends the other ranks once one has left. Rank 0 itself,
        which holds the store, goes last."""
        if self._store is None:
            return
        others = [rank for rank in range(1, self.world_size) if rank not in self._silent]
        with suppress(dist.DistError):  # nothing is left to be said to those that are gone
            if self.rank > 0:
                self._store.wait(["over"], timedelta(seconds=_GRACE))
                self._store.set(f"left/{self.rank}", "")
            else:
                self._store.set("over", "")
                _all_there(self._store, [f"left/{rank}" for rank in others], _GRACE)

    def _exchange(self, store: dist.TCPStore, question: str, answer: Any) -> list[Any]:
        """All answers, gathered by rank 0; of those that give none :class:`_Silent`."""
        names = [f"{question}/{rank}" for rank in range(self.world_size)]
        _put(store, names[self.rank], answer)
        if self.rank > 0:
            store.wait([question], timedelta(seconds=self._patience + _GRACE))
            return pickle.loads(store.get(question))
        # Ranks begin a question together but for the first, and their slowness ends in an answer.
        is_complete = _all_there(store, names, self._patience)
        found = [
            pickle.loads(store.get(name)) if is_complete or store.check([name]) else _Silent()
            for name in names
        ]
        _put(store, question, found)
        return found

    @property
    def _patience(self) -> float:
        return self.timeout + _GRACE

    def _error(self, question: str) -> MeetingError:
        hosts = self.hosts or _launched_hosts(self.world_size)
        silent: dict[str, list[str]] = {}
        for rank in self._silent:
            silent.setdefault(hosts[rank] or "hosts unknown", []).append(str(rank))
        ranks = "; ".join(f"{host}: {', '.join(numbers)}" for host, numbers in silent.items())
        return MeetingError(
            f"no answer to {question!r} within {self._patience:.0f} s from ranks of {ranks}",
            ", ".join(silent),
            is_known_to_rank_zero=True,
        )


def _wait_for(address: str, port: int, timeout: float) -> None:
    """Until somebody listens there; torch itself would fill the screen over it.

    Raises:
        OSError: what came of the last try.
    """
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), max(0.1, until - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.2)


def _all_there(store: dist.Store, names: list[str], seconds: float) -> bool:
    """Within that time; the store's own wait, when in vain, makes torch write of it."""
    until = time.monotonic() + seconds
    while not store.check(names):
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def _put(store: dist.Store, name: str, value: object) -> None:
    store.set(name, pickle.dumps(value))  # type: ignore[arg-type]  # takes bytes too


def _within(seconds: float, fn: Callable[[], Any]) -> Any:
    """What it returns, or :class:`Failed`; one that does not end is left behind."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(fn())
        except Exception as error:  # noqa: BLE001 - whatever it is, a person is to be told
            name = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            answers.append(Failed(f"{name}{_first_line(error)}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else Failed(f"no end within {seconds:.0f} s")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _place() -> tuple[str, str]:
    """Host name and, as the launcher has it, number of the node."""
    names = ("CROSS_RANK", "GROUP_RANK", "SLURM_NODEID")  # deepspeed's, torchrun's, srun's
    numbers = [os.environ[name] for name in names if name in os.environ]
    return socket.gethostname(), numbers[0] if numbers else ""


def _launched_hosts(world_size: int) -> list[str]:
    """Host of every rank as deepspeed's launcher, this process's parent, was told; empty strings
    where something else has started it."""
    for argument in Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0"):
        if argument.startswith(b"--world_info="):
            slots = json.loads(base64.urlsafe_b64decode(argument.partition(b"=")[2]))
            return [host for host, ranks in slots.items() for _ in ranks]
    return [""] * world_size


def _own_address(store: dist.TCPStore, rank: int) -> str:
    """From which this host talks to rank 0's; nothing is sent."""
    if rank == 0:
        return store.host  # that name may mean 127.0.1.1 here, and the right one elsewhere
    family, kind, _, _, target = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[
        0
    ]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
