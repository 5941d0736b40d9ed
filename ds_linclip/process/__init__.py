"""Conventions between processes: exit codes, phases, agreement over ranks, parent death."""
