"""Estimates of layout, memory, traffic and time for devices that need not be present."""
