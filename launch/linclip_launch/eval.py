"""Run an evaluation over several processes: ``deepspeed --module linclip_launch.eval COMMAND ...``.

The commands are those of ``linclip-eval``. Exit codes as of linclip_launch.train.
"""

import os
import sys

from ds_linclip.process.parent_death import end_with_parent
from linclip_eval.__main__ import main

if __name__ == "__main__":
    if "RANK" in os.environ:  # started by a launcher, which is to end its ranks and may be killed
        end_with_parent()
    sys.exit(main())
