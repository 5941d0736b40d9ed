"""Ranks that find each other before torch.distributed runs, and gather results within a time limit.

Results travel as JSON through torch's TCPStore on rank 0: unlike a collective, it tells which ranks
are silent.
"""

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_linclip.preflight.verdicts import RankResults, keys_by_value

__all__ = ["Rendezvous", "RendezvousError"]

#: Seconds beyond the time limit after which a result still on its way counts as lost.
_GRACE = 5.0


class RendezvousError(RuntimeError):
    """Some ranks did not arrive, or are gone.

    Attributes:
        host: The hosts of these ranks, as far as known, or the host that cannot reach rank 0.
        is_known_to_rank_zero: Whether rank 0 has the same error.
    """

    def __init__(self, message: str, host: str, *, is_known_to_rank_zero: bool) -> None:
        super().__init__(message)
        self.host = host
        self.is_known_to_rank_zero = is_known_to_rank_zero


class Rendezvous:
    """All ranks of one start; every method is called by all of them together.

    Args:
        store: The store that they share; None in a world of one.
        rank: The rank of this process.
        world_size: The number of ranks.
        timeout: Seconds that each gathering may take.

    Attributes:
        hosts: The host name of every rank; empty before :meth:`wait_for_all`.
        master: Address and port of the store on rank 0.
        address: The address under which other hosts reach this one.
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
    def join(cls, timeout: float) -> "Rendezvous":
        """Connect to the store on rank 0 that the launcher's environment variables name.

        Without a launcher the rendezvous is one of this process alone. Within ``timeout`` seconds
        all ranks must arrive, and each gathering must end.

        Raises:
            RendezvousError: when the store cannot be created or reached.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls(None, 0, 1, timeout)
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun already runs a store at that port.
        is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            if not is_server:
                _wait_for_port(address, port, timeout)
            store = _open_store(address, port, world_size, timeout, is_server)
        except (OSError, dist.DistError) as error:
            what = f"master {address}:{port} cannot be reached in {timeout:.0f} s"
            if is_server:
                what = f"port {port} for the master is not free; choose another (--master_port)"
            raise RendezvousError(
                f"{what}: {_first_line(error)}", socket.gethostname(), is_known_to_rank_zero=False
            ) from error
        return cls(store, rank, world_size, timeout)

    def wait_for_all(self) -> None:
        """Wait for all ranks and set :attr:`hosts`; raises as :meth:`gather`."""
        self.hosts = list(self.gather("arrive", socket.gethostname).values.values())

    @property
    def leaders(self) -> list[int]:
        """The first rank of each host."""
        return [self.hosts.index(host) for host in dict.fromkeys(self.hosts)]

    def gather(
        self, name: str, fn: Callable[[], Any], ranks: Sequence[int] | None = None
    ) -> RankResults:
        """Run ``fn`` on every rank and return the results of all on every rank.

        It runs in a thread, since a file system or a collective that does not answer cannot be
        interrupted. A rank on which it raises, or takes too long, has an error for a result.

        Args:
            name: A name for this gathering, used only once.
            fn: Returns what JSON can hold.
            ranks: The ranks to run it on; default: all.

        Raises:
            RendezvousError: on all ranks that are left, when another one sends nothing at all.
        """
        is_asked = ranks is None or self.rank in ranks
        result = _run_within(self.timeout, fn) if is_asked else {}
        results = [result] if self._store is None else self._exchange(self._store, name, result)
        return RankResults(
            self.hosts,
            {rank: each["value"] for rank, each in enumerate(results) if "value" in each},
            {rank: each["error"] for rank, each in enumerate(results) if "error" in each},
        )

    def connect_process_group(self, device: torch.device) -> None:
        """Create torch's process group: gloo between CPUs, on GPUs also nccl between these."""
        assert self._store is not None
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)  # for this thread
        # A connection of its own, since this call may hang in its thread.
        place = self._store.host, self._store.port
        store = _open_store(*place, self.world_size, self.timeout, False)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("process-group", store),
            rank=self.rank,
            world_size=self.world_size,
            # nccl ends the process when its time is up; this rendezvous gives up before that.
            timeout=timedelta(seconds=(2 if on_gpu else 1) * self.timeout),
        )

    def close(self) -> None:
        """Leave when rank 0 does: a launcher ends the other ranks once one has left. Rank 0 itself,
        which holds the store, leaves last."""
        if self._store is None:
            return
        others = [rank for rank in range(1, self.world_size) if rank not in self._silent]
        with suppress(dist.DistError):  # the other side is gone already
            if self.rank > 0:
                self._store.wait(["closing"], timedelta(seconds=_GRACE))
                self._store.set(f"left/{self.rank}", "")
            else:
                self._store.set("closing", "")
                _are_set_within(_GRACE, self._store, [f"left/{rank}" for rank in others])

    def _exchange(self, store: dist.TCPStore, name: str, result: dict[str, Any]) -> list[Any]:
        """Return the results of all ranks, which rank 0 collects."""
        keys = [f"{name}/{rank}" for rank in range(self.world_size)]
        patience = self.timeout + _GRACE
        try:
            store.set(keys[self.rank], json.dumps(result))
            if self.rank == 0:
                # Ranks start together, but for the first gathering, and a slow one sends an error.
                is_complete = _are_set_within(patience, store, keys)
                received = [
                    json.loads(store.get(key)) if is_complete or store.check([key]) else None
                    for key in keys
                ]
                store.set(name, json.dumps(received))
            store.wait([name], timedelta(seconds=patience + _GRACE))
            results: list[Any] = json.loads(store.get(name))
        except dist.DistError as error:
            raise RendezvousError(
                f"rank 0 is gone at {name!r}: {_first_line(error)}",
                self._known_hosts()[0],
                is_known_to_rank_zero=self.rank == 0,
            ) from error
        self._silent = [rank for rank, each in enumerate(results) if each is None]
        if self._silent:
            hosts = self._known_hosts()
            silent = keys_by_value({rank: hosts[rank] or "hosts unknown" for rank in self._silent})
            ranks = "; ".join(f"{host}: {', '.join(map(str, r))}" for host, r in silent.items())
            raise RendezvousError(
                f"no answer to {name!r} within {patience:.0f} s from ranks of {ranks}",
                ", ".join(silent),
                is_known_to_rank_zero=True,
            )
        return results

    def _known_hosts(self) -> list[str]:
        return self.hosts or _launched_hosts(self.world_size)


def _open_store(
    address: str, port: int, world_size: int, timeout: float, is_server: bool
) -> dist.TCPStore:
    limit = timedelta(seconds=timeout)
    return dist.TCPStore(address, port, world_size, is_server, limit, wait_for_workers=False)


def _wait_for_port(address: str, port: int, timeout: float) -> None:
    """Wait until the port is open; torch itself would fill the screen with warnings meanwhile."""
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), max(0.1, until - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.2)


def _are_set_within(seconds: float, store: dist.Store, keys: list[str]) -> bool:
    """Wait for keys; torch prints a warning when its own ``wait`` runs out of time."""
    until = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def _run_within(seconds: float, fn: Callable[[], Any]) -> dict[str, Any]:
    """Return the value or the error of ``fn``; its thread is left behind if it does not finish."""
    results: list[dict[str, Any]] = []

    def run() -> None:
        try:
            results.append({"value": fn()})
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the table
            name = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            results.append({"error": f"{name}{_first_line(error)}"})

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else {"error": f"not finished within {seconds:.0f} s"}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _launched_hosts(world_size: int) -> list[str]:
    """Return the host of every rank from the arguments of deepspeed's launcher, this process's
    parent; empty strings under another launcher."""
    for argument in Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0"):
        if argument.startswith(b"--world_info="):
            slots = json.loads(base64.urlsafe_b64decode(argument.partition(b"=")[2]))
            return [host for host, ranks in slots.items() for _ in ranks]
    return [""] * world_size


def _own_address(store: dist.TCPStore, rank: int) -> str:
    """Return the local address of the route to rank 0's host; nothing is sent."""
    if rank == 0:
        return store.host  # that name may mean 127.0.1.1 here, and the right address elsewhere
    found = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)
    family, kind, _, _, target = found[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
