"""Scalars of a run, and where they go: TensorBoard, Prometheus, Weights & Biases, Trackio."""

from ds_linclip.monitoring.scalars import SCALARS, Scalar, ScalarSink
from ds_linclip.monitoring.sinks import open_sinks
from ds_linclip.monitoring.tensorboard import begin_session, end_session

__all__ = ["SCALARS", "Scalar", "ScalarSink", "begin_session", "end_session", "open_sinks"]
