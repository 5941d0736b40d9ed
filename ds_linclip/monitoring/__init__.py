"""Who is told how a run goes: TensorBoard's dashboards, Prometheus, Weights & Biases, Trackio."""

from ds_linclip.monitoring.scalars import SCALARS, Listener, Scalar
from ds_linclip.monitoring.sinks import open_listeners
from ds_linclip.monitoring.tensorboard import begin_session, end_session

__all__ = ["SCALARS", "Listener", "Scalar", "begin_session", "end_session", "open_listeners"]
