"""What lies between the hosts: open ports, clocks, the speed of all-reduce."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

__all__ = [
    "Links",
    "Offset",
    "Speed",
    "listen",
    "measure_clocks",
    "measure_links",
    "offset_of",
    "reach",
]

_ROUND_TRIPS = 20
#: Bytes of the message: one for the latency, two for the bandwidth.
_SIZES = (8, 2**20, 2**26)
_SECONDS_PER_SIZE, _MAX_REPEATS = 0.3, 100


@dataclass(frozen=True)
class Offset:
    """Of another clock.

    Attributes:
        seconds: It is so far ahead of this one.
        bound: The truth is within so many seconds of that: half of the shortest round trip.
    """

    seconds: float
    bound: float


@dataclass(frozen=True)
class Speed:
    """Of an all-reduce of one size, in the terms of nccl-tests.

    Attributes:
        size: Bytes of every rank's message.
        num_ranks: That take part.
        seconds: Mean over repetitions and ranks.
    """

    size: int
    num_ranks: int
    seconds: float

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes per second: size over time."""
        return self.size / self.seconds

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second that every rank must send, and receive, whatever the algorithm: times
        2 (n - 1) / n. To be compared with what a link can do, for any number of ranks."""
        return self.algorithm_bandwidth * 2 * (self.num_ranks - 1) / self.num_ranks


@dataclass(frozen=True)
class Links:
    """Speeds of the groups that a rank is in; empty where it is in none.

    Attributes:
        everywhere: Of all ranks.
        within_host: Of the ranks of this host, all hosts at once.
        to_next_host: Of the first ranks of this host and the next one in rank order, every other
            pair of hosts at once; known to the first rank of each host but the last.
    """

    everywhere: list[Speed]
    within_host: list[Speed]
    to_next_host: list[Speed]


def listen() -> socket.socket:
    """A socket at a free port of this host, as the process groups take them."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def reach(address: str, port: int, timeout: float) -> float:
    """Seconds to connect to it.

    Raises:
        OSError: naming it, when it cannot be reached.
    """
    begun = time.perf_counter()
    try:
        socket.create_connection((address, port), timeout=timeout).close()
    except OSError as error:
        raise OSError(f"{address}:{port} cannot be reached: {error}") from error
    return time.perf_counter() - begun


def measure_clocks(leaders: Sequence[int]) -> dict[int, Offset]:
    """How far the clocks of other ranks are ahead of rank 0's, in Cristian's way: an answer is as
    old as half of the round trip; known to rank 0 alone. All ranks call this."""
    found = {}
    mine, theirs = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    rank = dist.get_rank()
    for leader in leaders[1:]:
        samples = []
        for _ in range(_ROUND_TRIPS if rank in (0, leader) else 0):
            if rank == 0:
                sent = time.time()
                dist.send(mine, leader)
                dist.recv(theirs, leader)
                samples.append((sent, theirs.item(), time.time()))
            else:
                dist.recv(theirs, 0)
                dist.send(mine.fill_(time.time()), 0)
        if samples:
            found[leader] = offset_of(samples)
    return found


def offset_of(samples: Sequence[tuple[float, float, float]]) -> Offset:
    """From round trips: this clock when it began, the other clock, this clock when it ended."""
    sent, other, received = min(samples, key=lambda sample: sample[2] - sample[0])
    return Offset(other - (sent + received) / 2, (received - sent) / 2)


def measure_links(hosts: Sequence[str], device: torch.device) -> Links:
    """Time all-reduce between all ranks, within hosts and between neighbouring hosts.

    Args:
        hosts: Name of every rank's host.
        device: Where this rank's messages are.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    names = list(dict.fromkeys(hosts))
    leaders = [hosts.index(name) for name in names]
    per_host = [[rank for rank, host in enumerate(hosts) if host == name] for name in names]
    pairs = list(pairwise(leaders))
    groups: list[Sequence[Sequence[int]]] = [[range(len(hosts))], per_host, pairs[::2], pairs[1::2]]
    everywhere, within, *to_next = (_speeds_at_once(each, device) for each in groups)
    rank = dist.get_rank()
    number = leaders.index(rank) % 2 if rank in leaders[:-1] else None
    return Links(everywhere, within, [] if number is None else to_next[number])


def _speeds_at_once(groups: Sequence[Sequence[int]], device: torch.device) -> list[Speed]:
    """Of this rank's group, of several that share no rank; all ranks call this."""
    if not groups:
        return []
    group, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in groups])
    found = [] if group is None or group.size() == 1 else _speeds(group, device)
    dist.all_reduce(torch.zeros(1))  # the next ones do not begin before all are done
    return found


def _speeds(group: dist.ProcessGroup, device: torch.device) -> list[Speed]:
    found = []
    for size in _SIZES:
        message = torch.zeros(size // 4, device=device)
        _seconds(message, group, 1)
        once = torch.tensor(_seconds(message, group, 1), dtype=torch.float64, device=device)
        dist.all_reduce(once, dist.ReduceOp.MAX, group)
        repeats = max(1, min(_MAX_REPEATS, int(_SECONDS_PER_SIZE / once.item())))
        mean = torch.tensor(_seconds(message, group, repeats), dtype=torch.float64, device=device)
        dist.all_reduce(mean, dist.ReduceOp.SUM, group)
        found.append(Speed(size, group.size(), mean.item() / group.size()))
    return found


def _seconds(message: torch.Tensor, group: dist.ProcessGroup, repeats: int) -> float:
    _synchronize(message)
    begun = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(message, group=group)
    _synchronize(message)
    return (time.perf_counter() - begun) / repeats


def _synchronize(message: torch.Tensor) -> None:
    if message.is_cuda:
        torch.cuda.synchronize(message.device)
