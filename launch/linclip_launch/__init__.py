"""Programs that launchers start: training, evaluation, preflight, supervisor, health check."""
