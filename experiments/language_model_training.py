"""One run of the language-model study: training on text, associative recall, or speed and memory.

The optimizer, its groups and its schedule are the trainer's.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peak_memory import PeakMemory
from ds_linclip.config import OptimConfig, ParallelConfig
from ds_linclip.engine.optim import build_optimizer, learning_rate
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.process.progress import progress
from experiments.associative_recall import IGNORED, RecallTask
from experiments.causal_model import KINDS, CausalModel, ModelShape
from experiments.text_data import VOCABULARY, Corpus

__all__ = [
    "RECALL_TASKS",
    "Device",
    "TextSettings",
    "document_bits",
    "measure_speed",
    "train_recall",
    "train_text",
]

Device = Literal["cpu", "cuda"]
Batch = Callable[[torch.Generator], tuple[Tensor, Tensor]]

#: The recall tasks by their length, their model and their training; softmax solves both in a third
#: of the steps.
RECALL_TASKS = {task.length: task for task in (RecallTask(4, 16), RecallTask(8, 32))}
_RECALL_SIZES = {"width": 64, "layers": 2, "heads": 1}
_RECALL_TOKENS = 2048  # of a step
_RECALL_LR = 2e-3
_RECALL_HELD_OUT = 1000
#: Passes that are timed, after one whose memory is measured; the fastest counts.
_TIMED_PASSES = 2


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Sizes of the language model and of its training.

    Attributes:
        batch: Sequences of a step.
        steps: Steps of training on text.
        recall_steps: Steps of training on associative recall.
        lr: Peak learning rate on text.
        contexts: Lengths whose speed and memory are measured; each divides the longest.
    """

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    recall_steps: int
    lr: float
    contexts: tuple[int, ...]

    def shape(self, context: int | None = None) -> ModelShape:
        """Return the sizes of the model on text, for another context if given."""
        return ModelShape(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            context=context or self.context,
            vocabulary=VOCABULARY,
        )


def train_text(
    kind: str, seed: int, settings: TextSettings, corpus: Corpus, device: Device
) -> dict[str, Any]:
    """Train on the training documents; return the bits of every held-out document."""
    mesh = _mesh(device)
    model = CausalModel(settings.shape(), KINDS[kind], mesh, seed=seed)
    stream, context = corpus.stream, settings.context
    if len(stream) <= context:
        raise ValueError(
            f"context ({context}) must be less than the training text: take at most "
            f"{len(stream) - 1}"
        )

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(stream) - context, (settings.batch, 1), generator=generator)
        rows = stream[starts + torch.arange(context + 1)]
        return rows[:, :-1], rows[:, 1:]

    loss, seconds = _train(model, batch, settings.steps, settings.lr, seed, f"text, {kind}", mesh)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_loss": loss,
        "seconds": seconds,
        "document_bits": document_bits(model, corpus, context, mesh.device),
    }


def train_recall(
    kind: str, length: int, seed: int, settings: TextSettings, device: Device
) -> dict[str, Any]:
    """Train on the recall task of this length; return the right answers to every held-out
    sequence."""
    task = RECALL_TASKS[length]
    mesh = _mesh(device)
    shape = ModelShape(context=length, vocabulary=task.vocabulary, **_RECALL_SIZES)
    model = CausalModel(shape, KINDS[kind], mesh, seed=seed)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return task.sample(_RECALL_TOKENS // length, generator)

    steps = settings.recall_steps
    loss, seconds = _train(model, batch, steps, _RECALL_LR, seed, f"recall {length}, {kind}", mesh)
    # A seed that no run trains with, so that all runs answer the same questions.
    tokens, targets = task.sample(_RECALL_HELD_OUT, torch.Generator().manual_seed(2**31))
    with torch.no_grad():
        answers = model(tokens.to(mesh.device)).argmax(dim=-1).cpu()
    right = ((answers == targets) & (targets != IGNORED)).sum(dim=1)  # [B]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_loss": loss,
        "seconds": seconds,
        "right_answers": right.tolist(),
    }


def measure_speed(kind: str, length: int, settings: TextSettings, device: Device) -> dict[str, Any]:
    """Measure forward and backward over as many tokens as the longest of ``settings.contexts`` has,
    in sequences of ``length``.

    Returns:
        Tokens per second of the fastest pass, on the CPU (one thread) per second of its own time,
        so that other programs count little; and the peak memory of a pass beyond the weights:
        activations and gradients, in bytes.
    """
    mesh = _mesh(device)
    model = CausalModel(settings.shape(length), KINDS[kind], mesh, seed=0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        VOCABULARY - 1, (max(settings.contexts) // length, length + 1), generator=generator
    )
    tokens = tokens.to(mesh.device)
    clock = time.process_time if mesh.device.type == "cpu" else time.perf_counter

    def run(tokens: Tensor) -> float:
        model.zero_grad(set_to_none=True)
        _wait(mesh)
        start = clock()
        _loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        _wait(mesh)
        return clock() - start

    run(tokens[:1, :17])  # what libraries allocate once is no part of the peak
    model.zero_grad(set_to_none=True)
    peak = PeakMemory(mesh.device.type)
    run(tokens)
    memory = peak.growth()
    seconds = min(run(tokens) for _ in range(_TIMED_PASSES))
    return {"tokens_per_second": tokens[:, 1:].numel() / seconds, "peak_bytes": memory}


def document_bits(
    model: CausalModel, corpus: Corpus, context: int, device: torch.device
) -> list[float]:
    """Return the code length in bits of every held-out document, its separator included."""
    rows, owners = corpus.windows(context)
    bits = torch.zeros(len(corpus.held_out), dtype=torch.float64)
    with torch.no_grad():
        for tokens, owner in zip(rows.split(16), owners.split(16), strict=True):
            inputs = tokens[:, :-1].clamp(min=0).to(device)
            targets = torch.where(tokens < 0, IGNORED, tokens)[:, 1:].to(device)
            logits = model(inputs).flatten(0, 1)
            nats = F.cross_entropy(logits, targets.flatten(), reduction="none")
            sums = nats.view(targets.shape).double().sum(dim=1).cpu()
            bits.index_add_(0, owner, sums / math.log(2))
    return bits.tolist()


def _train(
    model: CausalModel, batch: Batch, steps: int, lr: float, seed: int, name: str, mesh: Mesh
) -> tuple[float, float]:
    """Train; return the mean loss of the last tenth of the steps in nats per token, and the
    seconds."""
    warmup = max(1, steps // 20)
    config = OptimConfig(lr=lr, beta2=0.95, weight_decay=0.1, warmup_steps=warmup)
    optimizer = build_optimizer(model, config)
    generator = torch.Generator().manual_seed(seed)
    losses = torch.zeros(steps, device=mesh.device)
    start = time.perf_counter()
    for step in progress(range(steps), desc=name, unit="step"):
        tokens, targets = (each.to(mesh.device) for each in batch(generator))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        loss = _loss(model(tokens), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[step] = loss.detach()
    last = losses[-max(1, steps // 10) :].mean().item()
    return last, time.perf_counter() - start


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _mesh(device: Device) -> Mesh:
    if device == "cpu":
        torch.set_num_threads(1)
    return Mesh.create(ParallelConfig(device=device))


def _wait(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
