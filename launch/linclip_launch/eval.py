"""Run an evaluation over several processes: ``deepspeed --module linclip_launch.eval COMMAND ...``.

The commands and exit codes are those of ``linclip-eval``.
"""

import os
import sys

from ds_linclip.process.parent_death import end_with_parent
from linclip_eval.__main__ import main

if __name__ == "__main__":
    if "RANK" in os.environ:  # started by a launcher, which may be killed before it ends its ranks
        end_with_parent()
    sys.exit(main())
