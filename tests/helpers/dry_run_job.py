"""Calls ``linclip_launch.train`` in one process with each list of arguments in the JSON on standard
input; prints [exit code, what it printed, its errors] of each as JSON."""

import contextlib
import io
import json
import sys

from linclip_launch import train


def call(arguments: list[str]) -> tuple[int, str, str]:
    sys.argv = ["train", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.main()
    return int(code), out.getvalue(), err.getvalue()


print(json.dumps([call(arguments) for arguments in json.load(sys.stdin)]))
