"""Run an evaluation over several processes: ``deepspeed launch/eval.py COMMAND ...``.

The commands are those of ``linclip-eval``. Exit codes as in train.py.
"""

import sys

from linclip_eval.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
