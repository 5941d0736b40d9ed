"""The commands of ``linclip`` and their arguments; imports nothing that takes long to load."""

from linclip_launch.arguments.command import Command
from linclip_launch.arguments.data import DATA_COMMANDS
from linclip_launch.arguments.evaluation import EVALUATION_COMMANDS
from linclip_launch.arguments.training import MACHINE_COMMANDS, TRAINING_COMMANDS

__all__ = ["COMMANDS", "GROUPS", "Command"]

#: First word of commands of two words -> what they have in common.
GROUPS = {
    ("eval",): "score models of ds_linclip and open_clip, and measure them",
    ("shards",): "write training shards, and report what they hold",
    ("shards", "make"): "write images and captions as training shards",
}
#: Words -> command, in the order of the help.
COMMANDS = TRAINING_COMMANDS | EVALUATION_COMMANDS | DATA_COMMANDS | MACHINE_COMMANDS
