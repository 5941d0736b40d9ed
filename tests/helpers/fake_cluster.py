"""Clusters that only exist as the results of their ranks."""

from collections.abc import Callable, Sequence
from typing import Any

from ds_linclip.preflight.rendezvous import Rendezvous
from ds_linclip.preflight.verdicts import RankResults


class FakeCluster(Rendezvous):
    """A rendezvous of ranks whose results are given, of which this process is rank 0.

    Args:
        hosts: The host of every rank.
        results: The return value of every rank, by the name of the gathering; an exception stands
            for an error, None for a rank that did not take part.
    """

    def __init__(self, hosts: Sequence[str], **results: Sequence[Any]) -> None:
        super().__init__(None, 0, len(hosts), timeout=1.0)
        self.hosts = list(hosts)
        self._results = results

    def gather(
        self, name: str, fn: Callable[[], Any], ranks: Sequence[int] | None = None
    ) -> RankResults:
        results = dict(enumerate(self._results[name.replace("-", "_").replace(" ", "_")]))
        return RankResults(
            self.hosts,
            {r: x for r, x in results.items() if x is not None and not isinstance(x, Exception)},
            {r: str(x) for r, x in results.items() if isinstance(x, Exception)},
        )
