"""Calls ``linclip plan`` in one process with each list of arguments in the JSON on standard
input; prints [exit code, what it printed, its errors] of each as JSON."""

import contextlib
import io
import json
import sys

from linclip_launch.cli import main


def call(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(["plan", *arguments])
        except SystemExit as end:  # the parser's way
            code = int(end.code or 0)
    return int(code), out.getvalue(), err.getvalue()


print(json.dumps([call(arguments) for arguments in json.load(sys.stdin)]))
