"""How a training process ends, for launchers, supervisors and schedulers to read."""

from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """Exit codes of ``linclip_launch.train``, the same on all ranks.

    ``linclip_launch.preflight`` ends with 0, ready to train, or 2."""

    FINISHED = 0
    #: A crash; starting again goes on from the newest checkpoint.
    FAILED = 1
    #: Something in the config, the data or the run folder that the user can mend, told in one line.
    USER_ERROR = 2
    #: The loss or its gradient was not finite for too many steps in a row.
    DIVERGED = 3
    #: Asked to leave (SIGTERM); the last step is saved. EX_TEMPFAIL of sysexits.h.
    PREEMPTED = 75
    #: A rank made no step for too long; the stacks of all ranks are in the run folder.
    HUNG = 76
