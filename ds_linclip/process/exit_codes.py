"""Exit codes of a training process, for launchers, supervisors and schedulers."""

from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """Exit codes of ``linclip_launch.train``, the same on all ranks.

    ``linclip_launch.preflight`` ends with 0 (ready to train) or 2.
    """

    FINISHED = 0
    #: A crash; a restart resumes from the newest checkpoint.
    FAILED = 1
    #: An error in the config, the data or the run folder that the user can fix; one line names it.
    USER_ERROR = 2
    #: The loss or its gradient was not finite in too many consecutive steps.
    DIVERGED = 3
    #: Preempted (SIGTERM); the last step is saved. EX_TEMPFAIL of sysexits.h.
    PREEMPTED = 75
    #: A rank made no progress for too long; the stacks of all ranks are in the run folder.
    HUNG = 76
