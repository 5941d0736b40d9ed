"""The judgement of what ranks have found."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, TypeVar

from ds_linclip.config import Config, check_batch, check_ranks
from ds_linclip.preflight.network_probe import Links, Offset, Speed
from ds_linclip.preflight.node_checks import Machine, Shards, Space
from ds_linclip.preflight.rendezvous import Failed
from ds_linclip.preflight.table import Problem, Table

__all__ = ["Judge"]

T = TypeVar("T")

#: Below this share of the median a link is told of.
_SLOW_SHARE = 0.5
#: An fsync of a MiB that takes longer is told of, in seconds.
_SLOW_SYNC = 1.0
_SEPARATE = ("python", "torch", "deepspeed", "megatron-core")
_OURS = ("ds_linclip", "git_commit", "source")
_COMMIT = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28}\b")
_ALL = "all hosts"
_NAMED = 16  # hosts of one kind, in the table


class Judge:
    """Makes rows of the answers of all ranks, the same on all of them.

    Answers are in rank order; a rank that could not answer has :class:`Failed`, one that was not
    asked None.

    Args:
        table: Gets the rows.
        hosts: Name of every rank's host.
    """

    def __init__(self, table: Table, hosts: Sequence[str]) -> None:
        self._table, self._hosts = table, hosts

    def config(self, answers: Sequence[str | Failed], name: str) -> bool:
        """Whether all ranks have read the same resolved config, by its digest."""
        rule = "the config must be there, right, and the same on every host"
        remedy = "mend the config, or bring the same files to every host"
        digests, problems = self._sort(answers, rule, remedy)
        problems += self._unequal(digests, "resolved config", rule, remedy)
        self._table.add("config", name if problems else f"{name}, the same on all ranks", problems)
        return not problems

    def layout(self, config: Config) -> None:
        """Enough ranks for the axes and the batch."""
        parallel, batch = config.parallel, config.train.global_batch_size
        world_size, per_host = len(self._hosts), _counts(self._hosts)
        found = f"{_number(world_size, 'rank')} on {_number(len(per_host), 'host')}"
        if len(per_host) > 1:
            found += f", on each: {_grouped(per_host)}"
        try:
            dp_size = check_ranks(parallel, world_size)
            check_batch(config, dp_size)
        except ValueError as error:
            remedy = "start another number of ranks, or change these settings"
            self._table.fail("ranks", f"{world_size} ranks", str(error), remedy)
            return
        found += f"; tp {parallel.tp} x cp {parallel.cp} x pp {parallel.pp} x dp {dp_size}, "
        found += f"{batch // dp_size} pairs of {batch} each"
        self._table.add(
            "ranks", found, [], {"ranks": world_size, "dp": dp_size, "per_host": per_host}
        )

    def machines(self, answers: Sequence[Machine | Failed]) -> bool:
        """Rows of software and devices; whether the ranks can work together on them."""
        rule = "every rank must find its device and the versions of its software"
        machines, problems = self._sort(answers, rule, "start fewer ranks there, or repair it")
        if problems:
            self._table.add("devices", "", problems)
            return False
        for check, names in (
            *((name, (name,)) for name in _SEPARATE),
            ("ds_linclip", _OURS),
            ("other packages", tuple(self._other_packages(machines))),
            ("GPU software", ("cuda", "nccl", "driver")),
        ):
            self._software(check, names, machines)
        return self._devices(machines)

    def _other_packages(self, machines: Mapping[int, Machine]) -> list[str]:
        apart = (*_SEPARATE, *_OURS, "cuda", "nccl", "driver")
        return [name for name in machines[0].software if name not in apart]

    def _software(self, check: str, names: Sequence[str], found: Mapping[int, Machine]) -> None:
        texts, problems = [], []
        for name in names:
            versions = {rank: each.software[name] or "none" for rank, each in found.items()}
            if set(versions.values()) == {"none"} and len(names) > 1:
                continue
            by_host = self._by_host(versions).items()
            short = {host: _COMMIT.sub(r"\1", value) for host, value in by_host}
            texts.append(_grouped(short) if name == check else f"{name} {_grouped(short)}")
            remedy = "install the versions of constraints.txt, check the same commit out"
            if name in ("driver", "cuda", "nccl"):
                remedy = "bring the hosts to one image"
            problems += self._unequal(
                versions, name, f"{name} must be the same on all hosts", remedy, name == "driver"
            )
        if texts:
            self._table.add(check, ", ".join(texts), problems)

    def _devices(self, machines: Mapping[int, Machine]) -> bool:
        per_host = _counts(self._hosts)
        rule = "all ranks must be on one kind of device"
        kinds = {rank: machine.device.type for rank, machine in machines.items()}
        problems = self._unequal(kinds, "ranks on", rule, "see parallel.device, DS_ACCELERATOR")
        is_mixed = bool(problems)
        names = {rank: ", ".join(dict.fromkeys(m.devices)) for rank, m in machines.items()}
        rule = "devices of one kind: all ranks wait for the slowest, and the smallest is filled"
        problems += self._unequal(names, "devices", rule, "leave those hosts out", True)
        texts = {}
        for rank, machine in machines.items():
            host = self._hosts[rank]
            what = f"{len(machine.devices)} x {names[rank]}" if machine.devices else "CPU"
            memory = f"{machine.memory / 2**30:.0f} GiB"
            texts[host] = (
                f"{_number(per_host[host], 'rank')}, {what}, {machine.num_cores} cores, {memory}"
            )
        figures = {
            self._hosts[rank]: asdict(machine) | {"device": str(machine.device)}
            for rank, machine in machines.items()
        }
        self._table.add("devices", _grouped(texts), problems, figures)
        return not is_mixed

    def ports(self, answers: Sequence[float | Failed | None], master: str) -> bool:
        """Of the leaders, each to the host before its own, the first to the last; all have reached
        the master."""
        rule = "hosts must reach each other at any free port, as the process groups take them"
        remedy = "open the firewall between the hosts, or name the interface (NCCL_SOCKET_IFNAME, "
        remedy += "GLOO_SOCKET_IFNAME)"
        seconds, problems = self._sort(answers, rule, remedy)
        found = f"master {master} reached by all"
        if seconds:
            milliseconds = {self._hosts[rank]: 1e3 * each for rank, each in seconds.items()}
            found += f"; from host to host in {_range(milliseconds)} ms"
        self._table.add("ports", found, problems)
        return not problems

    def process_group(self, answers: Sequence[float | Failed], backend: str) -> bool:
        rule = f"all ranks must make a process group ({backend})"
        remedy = "see whether the host name resolves to an address that others reach (not 127.*), "
        remedy += "or name the interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        seconds, problems = self._sort(answers, rule, remedy)
        found = "" if problems else f"{backend}, made in {max(seconds.values()):.2f} s"
        self._table.add("process group", found, problems)
        return not problems

    def clocks(self, answers: Sequence[Mapping[int, Offset] | Failed], limit: float) -> None:
        """Of the leaders, against that of rank 0."""
        rule = f"clocks must agree to {limit:g} s: logs, leases and signed requests have times"
        remedy = "have NTP or PTP set the clocks (chronyc tracking, timedatectl)"
        found, problems = self._sort(answers[:1], rule, remedy)
        offsets = {self._hosts[rank]: each for rank, each in found.get(0, {}).items()}
        problems += [
            Problem(
                host=host,
                found=f"{each.seconds:+.3f} s (± {each.bound:.3f}) against {self._hosts[0]}",
                rule=rule,
                remedy=remedy,
                is_warning=True,
            )
            for host, each in offsets.items()
            if abs(each.seconds) - each.bound > limit
        ]
        text = "one host"
        if offsets:
            bound = 1e3 * max(each.bound for each in offsets.values())
            values = {self._hosts[0]: 0.0}
            values |= {host: 1e3 * each.seconds for host, each in offsets.items()}
            text = f"{_range(values)} ms ahead of {self._hosts[0]}, ± {bound:.2g} ms"
        figures = {host: asdict(each) for host, each in offsets.items()}
        self._table.add("clocks", text, problems, figures)

    def links(self, answers: Sequence[Links | Failed]) -> None:
        """All-reduce everywhere, within hosts, between neighbouring hosts."""
        rule = "all-reduce must end, on every link"
        links, problems = self._sort(answers, rule, "see NCCL_DEBUG=INFO, the cables, the firewall")
        if problems:
            self._table.add("all-reduce", "", problems)
            return
        names = list(dict.fromkeys(self._hosts))
        after = dict(pairwise(names))
        within, between, everywhere = {}, {}, {}
        for rank, found in links.items():
            host = self._hosts[rank]
            if found.within_host:
                within[host] = found.within_host
            if found.to_next_host:
                between[f"{host} to {after[host]}"] = found.to_next_host
            if found.everywhere:
                everywhere[_ALL] = found.everywhere
        if len(names) == 1:  # the same
            within = {}
        self._speeds("all-reduce, all ranks", everywhere)
        self._speeds("all-reduce, within hosts", within)
        self._speeds("all-reduce, host to host", between)

    def _speeds(self, check: str, speeds: Mapping[str, Sequence[Speed]]) -> None:
        if not speeds:
            return
        texts = []
        for index, size in enumerate(each.size for each in next(iter(speeds.values()))):
            at_size = {place: found[index] for place, found in speeds.items()}
            if index == 0:
                latencies = {place: 1e3 * each.seconds for place, each in at_size.items()}
                texts.append(f"latency {_range(latencies)} ms")
                continue
            bus = {place: each.bus_bandwidth / 1e9 for place, each in at_size.items()}
            unit = f"{size / 2**20:.0f} MiB"
            texts.append(f"{unit}: busbw {_range(bus)} GB/s")
            if len(at_size) == 1:
                (only,) = at_size.values()
                texts[-1] += f", algbw {_figure(only.algorithm_bandwidth / 1e9)}"
        # The largest message: smaller ones tell of latency.
        median = sorted(bus.values())[len(bus) // 2]
        problems = [
            Problem(
                host=place,
                found=f"{_figure(value)} GB/s with {unit} (busbw)",
                rule=f"at least {_SLOW_SHARE:g} of the median, {_figure(median)} GB/s",
                remedy="look at that link (ibstat, nvidia-smi topo -m), or leave the host out",
                is_warning=True,
            )
            for place, value in bus.items()
            if value < _SLOW_SHARE * median
        ]
        figures = {
            place: [
                asdict(each)
                | {
                    "algorithm_bandwidth": each.algorithm_bandwidth,
                    "bus_bandwidth": each.bus_bandwidth,
                }
                for each in found
            ]
            for place, found in speeds.items()
        }
        self._table.add(check, "; ".join(texts), problems, figures)

    def storage(
        self,
        made: Sequence[Any],
        written: Sequence[float | Failed],
        seen: Sequence[float | Failed | None],
        output_dir: str,
    ) -> None:
        """The folder that rank 0 made, written into and seen by all."""
        rule = f"output_dir ({output_dir}) must be writable"
        remedy = "give this user the right to write there, or choose another output_dir"
        _, problems = self._sort(made, rule, remedy)
        seconds: dict[int, float] = {}
        if not problems:
            rule = f"output_dir ({output_dir}) must be one folder, seen and written by all hosts"
            remedy = "put it on storage that all hosts mount at the same place"
            seconds, problems = self._sort(written, rule, remedy)
            problems += self._sort(seen, rule, remedy)[1]
        slow = {rank: each for rank, each in seconds.items() if each > _SLOW_SYNC}
        problems += [
            Problem(
                host=host,
                found=f"{value:.1f} s to sync 1 MiB",
                rule=f"at most {_SLOW_SYNC:g} s: a checkpoint is synced before it counts",
                remedy="look at that storage's load, or choose another output_dir",
                is_warning=True,
            )
            for host, value in self._slowest(slow).items()
        ]
        slowest = self._slowest(seconds)
        text = output_dir
        if slowest and all(each.is_warning for each in problems):
            milliseconds = {host: 1e3 * each for host, each in slowest.items()}
            text += f": written and seen by all; 1 MiB synced in {_range(milliseconds)} ms"
        self._table.add("output folder", text, problems, {"fsync_seconds": slowest})

    def spaces(
        self, answers: Sequence[Mapping[str, Space] | Failed | None], min_free: float
    ) -> None:
        """Free room, at least ``min_free`` bytes of it for checkpoints and the cache."""
        found, problems = self._sort(answers, "folders must be readable", "see their rights")
        if problems:
            self._table.add("disk", "", problems)
            return
        for purpose in dict.fromkeys(name for spaces in found.values() for name in spaces):
            spaces = {self._hosts[rank]: each[purpose] for rank, each in found.items()}
            limit = 0.0 if purpose == "/dev/shm" else min_free
            problems = [
                Problem(
                    host=host,
                    found=f"{_gib(space.free)} free in {space.path}",
                    rule=f"{_gib(max(space.needed, limit))} must be free for {purpose}: "
                    + (space.why if space.needed >= limit else "--min-free-gib"),
                    remedy=_ROOM[purpose],
                    is_warning=purpose != "checkpoints" and space.free >= limit,
                )
                for host, space in spaces.items()
                if space.free < max(space.needed, limit)
            ]
            free = _range({host: space.free / 2**30 for host, space in spaces.items()})
            needed = max(space.needed for space in spaces.values())
            text = f"{free} GiB free, {_gib(needed)} needed"
            figures = {host: asdict(space) for host, space in spaces.items()}
            self._table.add(f"disk: {purpose}", text, problems, figures)

    def data(
        self,
        counted: Sequence[Shards | Failed | None],
        opened: Sequence[float | Failed | None],
    ) -> None:
        rule = "all shards must be there, and the first of every source readable on every host"
        remedy = "mend data.train, or mount it, or give the host its credentials and network"
        shards, problems = self._sort(counted, rule, remedy)
        seconds, others = self._sort(opened, rule, remedy)
        problems += others
        text = ""
        if not problems:
            all_of = shards[0]
            slowest = {host: 1e3 * each for host, each in self._slowest(seconds).items()}
            text = (
                f"{_number(all_of.num_samples, 'sample')} in "
                f"{_number(all_of.num_shards, 'shard')} of "
                f"{_number(all_of.num_sources, 'source')}; first shards opened in "
                f"{_range(slowest)} ms"
            )
        self._table.add("training data", text, problems)

    def evaluation(self, answers: Sequence[float | Failed | None], folder: str) -> None:
        rule = f"eval.data ({folder}) must be readable on every host"
        remedy = "mend eval.data, or mount it there"
        seconds, problems = self._sort(answers, rule, remedy)
        text = f"{folder} opened in {_range(self._slowest(seconds))} s" if seconds else folder
        self._table.add("held-out data", text, problems)

    def _sort(
        self, answers: Sequence[T | Failed | None], rule: str, remedy: str
    ) -> tuple[dict[int, T], list[Problem]]:
        """Answers by rank, and a problem for every reason for having none."""
        good: dict[int, T] = {}
        hosts: dict[str, dict[str, None]] = {}
        for rank, answer in enumerate(answers):
            if isinstance(answer, Failed):
                hosts.setdefault(answer.reason, {})[self._hosts[rank]] = None
            elif answer is not None:
                good[rank] = answer
        problems = [
            Problem(host=_names(list(names)), found=reason, rule=rule, remedy=remedy)
            for reason, names in hosts.items()
        ]
        return good, problems

    def _unequal(
        self,
        values: Mapping[int, str],
        what: str,
        rule: str,
        remedy: str,
        is_warning: bool = False,
    ) -> list[Problem]:
        """A problem for every host whose value is not that of most hosts."""
        by_host = self._by_host(values)
        usual = max(by_host.values(), key=list(by_host.values()).count, default="")
        like = _names([host for host, value in by_host.items() if value == usual])
        return [
            Problem(
                host=host,
                found=f"{what} {value}, where {like} has {usual}",
                rule=rule,
                remedy=remedy,
                is_warning=is_warning,
            )
            for host, value in by_host.items()
            if value != usual
        ]

    def _by_host(self, values: Mapping[int, str]) -> dict[str, str]:
        """Of a host, the values of its ranks, several if they differ."""
        found: dict[str, dict[str, None]] = {}
        for rank, value in values.items():
            found.setdefault(self._hosts[rank], {})[value] = None
        return {host: " and ".join(each) for host, each in found.items()}

    def _slowest(self, values: Mapping[int, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for rank, value in values.items():
            host = self._hosts[rank]
            found[host] = max(value, found.get(host, -math.inf))
        return found


_ROOM = {
    "checkpoints": "free it, lower checkpoint.keep_last, or choose another output_dir",
    "cache": "free it, lower data.cache.max_gib, or choose another data.cache.dir",
    "/dev/shm": "start the container with --shm-size=1g or more",
}


def _counts(hosts: Sequence[str]) -> dict[str, int]:
    return {host: list(hosts).count(host) for host in dict.fromkeys(hosts)}


def _grouped(values: Mapping[str, object]) -> str:
    """The value if all have the same, else every value with who has it."""
    hosts: dict[str, list[str]] = {}
    for host, value in values.items():
        hosts.setdefault(str(value), []).append(host)
    if len(hosts) == 1:
        return next(iter(hosts))
    return "; ".join(f"{value} ({_names(names)})" for value, names in hosts.items())


def _names(hosts: Sequence[str]) -> str:
    more = len(hosts) - _NAMED
    return ", ".join(hosts[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _range(values: Mapping[str, float]) -> str:
    """Least and most, with who has them."""
    low = min(values, key=values.__getitem__)
    high = max(values, key=values.__getitem__)
    least, most = _figure(values[low]), _figure(values[high])
    return least if least == most else f"{least} ({low}) to {most} ({high})"


def _figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _gib(size: float) -> str:
    return f"{_figure(size / 2**30)} GiB"
