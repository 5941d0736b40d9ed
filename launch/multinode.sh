#!/usr/bin/env bash
# Train on the hosts of a file: launch/multinode.sh HOSTFILE [option ...] CONFIG.yaml [key=value ...]
# HOSTFILE has lines "host slots=number", a slot for every GPU. The hosts find this folder, the data
# and the run folder at the same paths, and let this one in by ssh without a password; it need not be
# among them. A host that dies is left out of the next start.
#   --include node1@node2:0,1 or --exclude node3   some hosts, some slots
#   --node-rank N     no ssh: start ranks on this host alone, number N of the file; the same command
#                     runs on every other host with its own number
#   --help            the rest of the options, those of linclip_launch.supervise
# Network: launch/environment.sh. For ranks on the CPU: DS_ACCELERATOR=cpu before the command.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$here/../.venv/bin/python
[ -x "$python" ] || { echo "error: $python is missing: run make install" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR
. "$here/environment.sh"
exec "$python" -m linclip_launch.supervise --hostfile "$@"
