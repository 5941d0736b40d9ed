"""Calls ``launch/linclip_launch/train.py`` with every list of arguments that standard input holds as JSON, in one
process; prints [exit code, what it printed, its errors] of each as JSON."""

import contextlib
import io
import json
import sys

from linclip_launch import train


def call(arguments: list[str]) -> tuple[int, str, str]:
    sys.argv = ["train.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main()
    return int(code), out.getvalue(), err.getvalue()


print(json.dumps([call(arguments) for arguments in json.load(sys.stdin)]))
