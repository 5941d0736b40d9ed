"""Responses to hangs, loss spikes, preemption signals and failed launches."""
