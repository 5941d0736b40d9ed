"""The learning rate of every schedule over a run, in one picture.

``python -m experiments.schedules [OUTPUT_FOLDER]`` writes figure.png into OUTPUT_FOLDER
(docs/results/schedules). Seconds; nothing is trained.
"""

import argparse
import sys
from pathlib import Path

from ds_linclip.config import (
    ConstantSchedule,
    CooldownSchedule,
    CosineSchedule,
    LinearSchedule,
    OptimConfig,
    Schedule,
)
from ds_linclip.engine.optim import learning_rate
from linclip_eval.plotting import COLOURS, add_legend, dress, new_figure

STEPS, WARMUP, COOLDOWN = 1000, 100, 200
SCHEDULES: dict[str, Schedule] = {
    "cosine": CosineSchedule(),
    "cosine, floor 0.1": CosineSchedule(floor=0.1),
    "linear": LinearSchedule(),
    "constant": ConstantSchedule(),
    "cooldown, power 1": CooldownSchedule(cooldown_steps=COOLDOWN),
    "cooldown, power 2": CooldownSchedule(cooldown_steps=COOLDOWN, power=2),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/results/schedules"))
    folder = parser.parse_args().folder
    figure = new_figure(8, 4)
    axes = figure.add_subplot()
    for (name, schedule), colour in zip(SCHEDULES.items(), COLOURS, strict=False):
        config = OptimConfig(lr=1.0, warmup_steps=WARMUP, schedule=schedule)
        rates = [learning_rate(step, STEPS, config) for step in range(STEPS)]
        axes.plot(rates, label=name, color=colour, linewidth=1.6)
    title = f"Learning rate: warm-up of {WARMUP} steps, cooldown of {COOLDOWN}"
    dress(axes, title, xlabel="step", ylabel="fraction of optim.lr")
    add_legend(axes)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "figure.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
