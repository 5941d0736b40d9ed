"""Times that the model of the kernels predicts for the measured points of our operator."""

import torch

from benchmarks.attention.operators import FORMS, HEAD_DIM, batch_and_heads
from linclip_eval.runtime.fit import RuntimePoint
from linclip_kernels.linear_attention.compiled.resources import DTYPES, Case
from linclip_kernels.linear_attention.compiled.time_model import CHIPS, Speed, predict_case
from linclip_kernels.linear_attention.variant import Variant

__all__ = ["predicted_seconds", "speed_of"]


def speed_of(device: str, copy_bandwidth: float) -> Speed | None:
    """Return the speed of the CUDA device; None for a CPU or a chip that the model does not know.

    Args:
        device: "cuda" or "cpu".
        copy_bandwidth: Bytes that a copy on it reads and writes per second, as measured.
    """
    if device != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    known = next((chip for name, chip in CHIPS.items() if name in found.name), None)
    if known is None:
        return None
    speed = known._replace(num_sms=found.multi_processor_count)
    return speed._replace(peak_bytes=speed.peak_bytes * copy_bandwidth / speed.copy_bytes)


def predicted_seconds(
    points: list[RuntimePoint], dtype: torch.dtype, speed: Speed | None
) -> dict[RuntimePoint, float]:
    """Predict the measured points of our operator, on a GPU.

    Args:
        points: Points of :class:`benchmarks.attention.operators.Operators`.
        dtype: The type of the inputs.
        speed: The GPU's; None: nothing is predicted.

    Returns:
        The predicted seconds by point.
    """
    if speed is None:
        return {}
    (name,) = (name for name, known in DTYPES.items() if known == dtype)
    found = {}
    for point in points:
        form = FORMS.get(point.attention)
        # The quadratic map is composed of several calls and of torch's own kernels.
        if point.measured is None or form is None or form.get("feature_map") == "quadratic":
            continue
        batch, heads = batch_and_heads("cuda", point.num_tokens)
        variant = Variant(**form)
        case = Case(variant, point.num_tokens, name, HEAD_DIM, batch * heads)
        forward, backward = predict_case(case, speed)
        kernels = forward if point.direction == "forward" else forward + backward
        found[point] = sum(kernel.seconds for kernel in kernels)
    return found
