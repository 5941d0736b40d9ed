"""Programs that launchers start: training, evaluation, preflight, supervision."""
