"""Scalars of a run, and where they go: TensorBoard, Prometheus, Weights & Biases, Trackio."""
