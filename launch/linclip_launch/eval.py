"""Run an evaluation over several processes: ``deepspeed --module linclip_launch.eval COMMAND ...``,
where ``COMMAND ...`` is that of ``linclip eval``."""

import os
import sys

from ds_linclip.process.parent_death import end_with_launcher
from linclip_launch.cli import main

if __name__ == "__main__":
    if "RANK" in os.environ:  # started by a launcher, which may be killed before it ends its ranks
        end_with_launcher()
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    sys.exit(main(["eval", *words]))
