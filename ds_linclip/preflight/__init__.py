"""Checks of every node before a run starts; each returns its rows of one table."""

from ds_linclip.preflight.network_probe import check_network
from ds_linclip.preflight.node_checks import (
    check_config,
    check_disk_space,
    check_layout,
    check_nodes,
)
from ds_linclip.preflight.rendezvous import Rendezvous, RendezvousError
from ds_linclip.preflight.storage_checks import (
    check_held_out_data,
    check_output_folder,
    check_training_data,
)
from ds_linclip.preflight.table import (
    CheckResult,
    Problem,
    exit_code_of,
    format_json,
    format_table,
    problems_if,
    skipped,
)

__all__ = [
    "CheckResult",
    "Problem",
    "Rendezvous",
    "RendezvousError",
    "check_config",
    "check_disk_space",
    "check_held_out_data",
    "check_layout",
    "check_network",
    "check_nodes",
    "check_output_folder",
    "check_training_data",
    "exit_code_of",
    "format_json",
    "format_table",
    "problems_if",
    "skipped",
]
