"""``python -m linclip_launch`` is ``linclip``."""

import sys

from linclip_launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
