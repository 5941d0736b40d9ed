import json
import threading
from datetime import timedelta

import torch.distributed as dist

from ds_linclip.preflight.rendezvous import Rendezvous


def test_what_ranks_exchange_is_json():
    """This test plays the other rank, on the same store."""
    limit = timedelta(seconds=30)
    server = dist.TCPStore("127.0.0.1", 0, 2, True, limit, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", server.port, 2, False, limit, wait_for_workers=False)
    rendezvous, results = Rendezvous(server, rank=0, world_size=2, timeout=20), []
    rendezvous.hosts = ["node1", "node2"]
    rank = threading.Thread(
        target=lambda: results.append(rendezvous.gather("greet", lambda: {"a": [1, None]}))
    )
    rank.start()
    sent = {"value": {"a": [1, None]}}
    assert json.loads(other.get("greet/0")) == sent
    other.set("greet/1", json.dumps({"error": "unwilling"}))
    rank.join()
    (result,) = results
    assert result.values == {0: {"a": [1, None]}}
    assert result.errors == {1: "unwilling"}
    assert result.failures() == [("node2", "unwilling")]
    assert json.loads(other.get("greet")) == [sent, {"error": "unwilling"}]
