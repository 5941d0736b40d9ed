"""Checks of every node before a run starts; each returns its rows of one table."""
