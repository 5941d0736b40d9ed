"""Peak memory of a training step against the planner's estimate."""
