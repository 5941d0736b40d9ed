"""Checks of what lies between the ranks: open ports, process group, clocks, all-reduce."""

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TypedDict

import torch
import torch.distributed as dist

from ds_linclip.preflight.rendezvous import Rendezvous
from ds_linclip.preflight.table import CheckResult, problems_if, skipped
from ds_linclip.preflight.verdicts import format_range, keys_by_value, seconds_of
from ds_linclip.process.number_text import format_figure

__all__ = ["AllReduceSpeed", "ClockOffset", "all_reduce_speed", "check_network", "clock_offset"]

_CONNECT_SECONDS = 10.0
_NUM_ROUND_TRIPS = 20
#: Bytes of the messages: one for the latency, two for the bandwidth.
_SIZES = (8, 2**20, 2**26)
_SECONDS_PER_SIZE, _MAX_REPEATS = 0.3, 100
#: A link below this share of the median bandwidth is a warning.
_SLOW_SHARE = 0.5
_INTERFACE = "name the interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"


class ClockOffset(TypedDict):
    """The seconds by which another clock is ahead of this one, and their greatest error."""

    seconds: float
    bound: float


class AllReduceSpeed(TypedDict):
    """The speed of an all-reduce of one size, in the terms of nccl-tests.

    Attributes:
        size: Bytes of every rank's message.
        num_ranks: The ranks that take part.
        seconds: The mean over repetitions and ranks.
        algorithm_bandwidth: Bytes per second: size over time.
        bus_bandwidth: Bytes per second that a link carries: with any algorithm every one of n ranks
            must send, and receive, 2 (n - 1) / n times the size.
    """

    size: int
    num_ranks: int
    seconds: float
    algorithm_bandwidth: float
    bus_bandwidth: float


#: Speeds of all sizes, by the link or the host that they were measured on.
_Speeds = Mapping[str, Sequence[AllReduceSpeed]]


def check_network(
    rendezvous: Rendezvous, device: torch.device, max_skew_seconds: float
) -> Iterator[CheckResult]:
    """Yield the results of all checks between ranks; those after a failure are not made.

    Clocks that differ by more than ``max_skew_seconds`` are a warning.
    """
    ports = _check_ports(rendezvous)
    yield ports
    if ports.problems:
        yield from skipped("needs ports", "process group", "clocks", "all-reduce")
        return
    process_group = _check_process_group(rendezvous, device)
    yield process_group
    if process_group.problems:
        yield from skipped("needs the process group", "clocks", "all-reduce")
        return
    yield _check_clocks(rendezvous, max_skew_seconds)
    yield from _check_all_reduce(rendezvous, device)


def _check_ports(rendezvous: Rendezvous) -> CheckResult:
    """Connect from each host to the one before it, from the first one to the last."""
    # Any free port, as the process groups use them.
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=is_dual) as server:
        own_port = server.getsockname()[1]
        addresses = rendezvous.gather("listen", lambda: (rendezvous.address, own_port))
        leaders = rendezvous.leaders if len(rendezvous.leaders) > 1 else []
        before = dict(zip(leaders, [*leaders[-1:], *leaders], strict=False))

        def connect() -> None:
            host, port = addresses.values[before[rendezvous.rank]]
            try:
                socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            except OSError as error:
                raise OSError(f"{host}:{port} cannot be reached: {error}") from error

        connected = rendezvous.gather("connect", partial(seconds_of, connect), leaders)
    problems = problems_if(
        connected.failures(),
        "hosts must reach each other at any free port, as the process groups use them",
        f"open the firewall between the hosts, or {_INTERFACE}",
    )
    found = f"master {rendezvous.master} reached by all"
    if connected.values:
        found += f"; from host to host in {format_range(connected.by_host(max), 1e3)} ms"
    return CheckResult(check="ports", found=found, problems=problems)


def _check_process_group(rendezvous: Rendezvous, device: torch.device) -> CheckResult:
    backend = "gloo and nccl" if device.type == "cuda" else "gloo"
    connect = partial(rendezvous.connect_process_group, device)
    results = rendezvous.gather("process group", partial(seconds_of, connect))
    problems = problems_if(
        results.failures(),
        f"all ranks must create a process group ({backend})",
        "see whether the host name resolves to an address that others reach (not 127.*), or "
        + _INTERFACE,
    )
    found = "" if problems else f"{backend}, created in {max(results.values.values()):.2f} s"
    return CheckResult(check="process group", found=found, problems=problems)


def _check_clocks(rendezvous: Rendezvous, max_skew_seconds: float) -> CheckResult:
    rule = f"clocks must agree to {max_skew_seconds:g} s: logs, leases and signed requests use them"
    remedy = "let NTP or PTP set the clocks (chronyc tracking, timedatectl)"
    results = rendezvous.gather("clocks", partial(_measure_clocks, rendezvous))
    problems = problems_if(results.failures(), rule, remedy)
    offsets: dict[str, ClockOffset] = results.values.get(0, {})
    first = rendezvous.hosts[0]
    skewed = [
        (host, f"{offset['seconds']:+.3f} s (± {offset['bound']:.3f}) against {first}")
        for host, offset in offsets.items()
        if abs(offset["seconds"]) - offset["bound"] > max_skew_seconds
    ]
    problems += problems_if(skewed, rule, remedy, is_warning=True)
    found = "one host"
    if offsets:
        seconds = {first: 0.0, **{host: each["seconds"] for host, each in offsets.items()}}
        bound = 1e3 * max(each["bound"] for each in offsets.values())
        found = f"{format_range(seconds, 1e3)} ms ahead of {first}, ± {bound:.2g} ms"
    return CheckResult(check="clocks", found=found, problems=problems, figures=offsets)


def _measure_clocks(rendezvous: Rendezvous) -> dict[str, ClockOffset]:
    """Return, on rank 0, by how much the clock of each other host is ahead of rank 0's."""
    found = {}
    mine, theirs = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for leader in rendezvous.leaders[1:]:
        round_trips = []
        for _ in range(_NUM_ROUND_TRIPS if rendezvous.rank in (0, leader) else 0):
            if rendezvous.rank == 0:
                sent = time.time()
                dist.send(mine, leader)
                dist.recv(theirs, leader)
                round_trips.append((sent, theirs.item(), time.time()))
            else:
                dist.recv(theirs, 0)
                dist.send(mine.fill_(time.time()), 0)
        if round_trips:
            found[rendezvous.hosts[leader]] = clock_offset(round_trips)
    return found


def clock_offset(round_trips: Sequence[tuple[float, float, float]]) -> ClockOffset:
    """Estimate the offset of another clock from the shortest round trip (Cristian, 1989): the
    answer is as old as half of it. A round trip is this clock at the start, the other clock, this
    clock at the end, in seconds."""
    sent, other, received = min(round_trips, key=lambda trip: trip[2] - trip[0])
    return {"seconds": other - (sent + received) / 2, "bound": (received - sent) / 2}


def _check_all_reduce(rendezvous: Rendezvous, device: torch.device) -> Iterator[CheckResult]:
    """Time all-reduce between all ranks, within hosts, and between neighbouring hosts."""
    measure = partial(_measure_all_reduce, rendezvous.hosts, device)
    results = rendezvous.gather("all-reduce", measure)
    problems = problems_if(
        results.failures(),
        "all-reduce must finish on every link",
        "see NCCL_DEBUG=INFO, the cables, the firewall",
    )
    if problems:
        yield CheckResult(check="all-reduce", problems=problems)
        return
    speeds: dict[str, dict[str, Sequence[AllReduceSpeed]]] = {}
    for of_rank in results.values.values():
        for check, at_places in of_rank.items():
            speeds.setdefault(check, {}).update(at_places)
    for check, at_all_places in speeds.items():
        yield _rate_speeds(check, at_all_places)


def _rate_speeds(check: str, speeds: _Speeds) -> CheckResult:
    latency, *at_sizes = ({place: each[i] for place, each in speeds.items()} for i in range(3))
    seconds = {place: each["seconds"] for place, each in latency.items()}
    texts, bandwidths, unit = [f"latency {format_range(seconds, 1e3)} ms"], dict[str, float](), ""
    for size, at_size in zip(_SIZES[1:], at_sizes, strict=True):
        unit = f"{size / 2**20:.0f} MiB"
        bandwidths = {place: each["bus_bandwidth"] / 1e9 for place, each in at_size.items()}
        texts.append(f"{unit}: busbw {format_range(bandwidths)} GB/s")
        if len(at_size) == 1:
            (only,) = at_size.values()
            texts[-1] += f", algbw {format_figure(only['algorithm_bandwidth'] / 1e9)}"
    # Those of the largest message: smaller ones depend on the latency.
    median = sorted(bandwidths.values())[len(bandwidths) // 2]
    problems = problems_if(
        [
            (place, f"{format_figure(value)} GB/s with {unit} (busbw)")
            for place, value in bandwidths.items()
            if value < _SLOW_SHARE * median
        ],
        f"at least {_SLOW_SHARE:g} of the median, {format_figure(median)} GB/s",
        "check that link (ibstat, nvidia-smi topo -m), or leave the host out",
        is_warning=True,
    )
    return CheckResult(check=check, found="; ".join(texts), problems=problems, figures=speeds)


def _measure_all_reduce(hosts: Sequence[str], device: torch.device) -> Mapping[str, _Speeds]:
    """Return the speeds of this rank's groups, by check."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for this thread
    ranks_of = keys_by_value(dict(enumerate(hosts)))
    within = ranks_of if len(ranks_of) > 1 else {}  # else the same as all ranks
    neighbours = [(f"{a} to {b}", [ranks_of[a][0], ranks_of[b][0]]) for a, b in pairwise(ranks_of)]
    found: dict[str, dict[str, Sequence[AllReduceSpeed]]] = {}
    for check, groups in (
        ("all-reduce, all ranks", {"all hosts": list(range(len(hosts)))}),
        ("all-reduce, within hosts", within),
        # Every other pair of hosts at once, so that no host is in two.
        ("all-reduce, host to host", dict(neighbours[::2])),
        ("all-reduce, host to host", dict(neighbours[1::2])),
    ):
        if not groups:
            continue
        group, _ = dist.new_subgroups_by_enumeration(list(groups.values()))
        if group is not None and group.size() > 1:
            place = next(name for name, ranks in groups.items() if dist.get_rank() in ranks)
            found.setdefault(check, {})[place] = _measure_group(group, device)
        dist.all_reduce(torch.zeros(1))  # the next ones start when all of these are done
    return found


def _measure_group(group: dist.ProcessGroup, device: torch.device) -> list[AllReduceSpeed]:
    found = []
    for size in _SIZES:
        message = torch.zeros(size // 4, device=device)
        _mean_seconds(message, group, 1)
        once = _mean_seconds(message, group, 1)
        repeats = max(1, min(_MAX_REPEATS, int(_SECONDS_PER_SIZE / once)))
        found.append(all_reduce_speed(size, group.size(), _mean_seconds(message, group, repeats)))
    return found


def _mean_seconds(message: torch.Tensor, group: dist.ProcessGroup, repeats: int) -> float:
    """Return the seconds of an all-reduce, the same on all ranks: their mean."""

    def reduce() -> None:
        for _ in range(repeats):
            dist.all_reduce(message, group=group)
        if message.is_cuda:
            torch.cuda.synchronize(message.device)

    if message.is_cuda:
        torch.cuda.synchronize(message.device)
    seconds = torch.tensor(seconds_of(reduce), dtype=torch.float64, device=message.device)
    dist.all_reduce(seconds, group=group)
    return seconds.item() / group.size() / repeats


def all_reduce_speed(size: int, num_ranks: int, seconds: float) -> AllReduceSpeed:
    """Return both bandwidths of an all-reduce of ``size`` bytes that took ``seconds``.

    Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.
    """
    bandwidth = size / seconds
    return {
        "size": size,
        "num_ranks": num_ranks,
        "seconds": seconds,
        "algorithm_bandwidth": bandwidth,
        "bus_bandwidth": bandwidth * 2 * (num_ranks - 1) / num_ranks,
    }
