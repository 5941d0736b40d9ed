"""Every parallel layout against a single process, and its traffic against the plan."""
