"""The scalars that a run writes: their meanings, charts and Prometheus names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["SCALARS", "Scalar", "ScalarSink"]

#: A function that receives a step and the values measured after it, by tag.
ScalarSink = Callable[[int, Mapping[str, float]], None]

_LOSS, _SPEED = "Loss", "Throughput and MFU"
_DATA, _PARALLEL, _EVALUATION = "Data health", "Parallel efficiency", "Evaluation"


@dataclass(frozen=True)
class Scalar:
    """One scalar, or a family of them."""

    tag: str  #: The tag in TensorBoard; of a family, the part before the cause: "data/skipped/".
    meaning: str  #: One line, with the unit.
    dashboard: str  #: The TensorBoard dashboard that shows it.
    chart: str  #: The chart on that dashboard; several scalars may share one.
    metric: str  #: The name in Prometheus, in base units; that of a counter ends in "_total".
    factor: float = 1.0  #: Converts the tag's unit to the base unit.

    @property
    def is_family(self) -> bool:
        return self.tag.endswith("/")

    def cause(self, tag: str) -> str | None:
        """Return the cause that a tag of the family names, "" for the scalar's own tag, or None for
        any other tag."""
        if self.is_family and tag.startswith(self.tag):
            return tag.removeprefix(self.tag)
        return "" if tag == self.tag else None


SCALARS = (
    Scalar("train/loss", "mean loss of the step over the ranks", _LOSS, "loss", "linclip_loss"),
    Scalar(
        *("train/grad_norm", "norm of the gradient before clipping"),
        *(_LOSS, "gradient norm", "linclip_gradient_norm"),
    ),
    Scalar(
        *("train/lr", "learning rate of the step"),
        *(_LOSS, "learning rate", "linclip_learning_rate"),
    ),
    Scalar(
        *("train/logit_scale", "factor on the cosine similarities"),
        *(_LOSS, "logit scale", "linclip_logit_scale"),
    ),
    Scalar(
        *("train/skipped_steps", "steps not taken: the gradient was not finite"),
        *(_LOSS, "steps skipped, batches left out", "linclip_skipped_steps_total"),
    ),
    Scalar(
        *("train/rewinds", "returns to a checkpoint after a jump of the loss"),
        *(_LOSS, "steps skipped, batches left out", "linclip_rewinds_total"),
    ),
    Scalar(
        *("train/skipped_batches", "global batches left out by rewinds"),
        *(_LOSS, "steps skipped, batches left out", "linclip_skipped_batches_total"),
    ),
    Scalar(
        *("perf/samples_per_second", "image-text pairs per second, all ranks"),
        *(_SPEED, "samples per second", "linclip_samples_per_second"),
    ),
    Scalar(
        *("perf/tokens_per_second", "image and text tokens per second, all ranks"),
        *(_SPEED, "tokens per second", "linclip_tokens_per_second"),
    ),
    Scalar(
        *("perf/seconds_per_step", "wall time of a step"),
        *(_SPEED, "seconds per step", "linclip_step_seconds"),
    ),
    Scalar(
        *("perf/mfu", "model FLOP/s over the device's peak; where the peak is known"),
        *(_SPEED, "MFU", "linclip_mfu_ratio"),
    ),
    Scalar(
        *("perf/peak_memory_gib", "peak memory of rank 0: the GPU's allocator, or resident on CPU"),
        *(_SPEED, "peak memory, GiB", "linclip_peak_memory_bytes"),
        factor=2.0**30,
    ),
    Scalar(
        *("data/skipped_samples", "bad samples replaced since the run began"),
        *(_DATA, "bad samples", "linclip_skipped_samples_total"),
    ),
    Scalar(
        *("data/skipped/", "bad samples by cause"),
        *(_DATA, "bad samples by cause", "linclip_skipped_samples_by_cause_total"),
    ),
    Scalar(
        *("data/bad_shards", "shards with something wrong"),
        *(_DATA, "bad shards", "linclip_bad_shards_total"),
    ),
    Scalar(
        *("data/shards/", "shards with something wrong by cause"),
        *(_DATA, "bad shards by cause", "linclip_bad_shards_by_cause_total"),
    ),
    Scalar(
        *("perf/data_seconds_per_step", "wait for data of the rank that waits longest"),
        *(_DATA, "wait for data, seconds per step", "linclip_step_data_seconds"),
    ),
    Scalar(
        *("perf/model_tflops_per_device", "model TFLOP/s per device"),
        *(_PARALLEL, "model TFLOP/s per device", "linclip_device_model_flops_per_second"),
        factor=1e12,
    ),
    Scalar(
        *("perf/load_balance", "mean over largest own time per step of the ranks"),
        *(_PARALLEL, "load balance", "linclip_load_balance_ratio"),
    ),
    Scalar(
        *("perf/slowest_rank_ratio", "own time of the slowest rank over the median rank's"),
        *(_PARALLEL, "slowest rank over median", "linclip_slowest_rank_ratio"),
    ),
    Scalar(
        *("perf/slowest_rank", "which rank is slowest"),
        *(_PARALLEL, "slowest rank", "linclip_slowest_rank"),
    ),
    Scalar(
        *("eval/zeroshot_top1", "share of held-out images classified right"),
        *(_EVALUATION, "zero-shot accuracy", "linclip_zeroshot_top1_ratio"),
    ),
    Scalar(
        *("eval/zeroshot_top5", "share with the class among the first five"),
        *(_EVALUATION, "zero-shot accuracy", "linclip_zeroshot_top5_ratio"),
    ),
    Scalar(
        *("eval/bad_samples", "held-out images that cannot be read, which count as wrong"),
        *(_EVALUATION, "unreadable images", "linclip_held_out_bad_samples"),
    ),
)
