"""Command lines of the evaluations."""
