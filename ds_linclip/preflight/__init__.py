"""What must be in order on every node before a run starts: looked at by ranks, judged together."""

from ds_linclip.preflight.node_checks import (
    Machine,
    Shards,
    Space,
    WriteTest,
    count_shards,
    free_space,
    look_at_machine,
    open_first_shards,
)
from ds_linclip.preflight.table import Table
from ds_linclip.preflight.verdicts import Judge

__all__ = [
    "Judge",
    "Machine",
    "Shards",
    "Space",
    "Table",
    "WriteTest",
    "count_shards",
    "free_space",
    "look_at_machine",
    "open_first_shards",
]
