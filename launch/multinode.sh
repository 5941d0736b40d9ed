#!/usr/bin/env bash
# Train on the hosts of a file: launch/multinode.sh HOSTFILE [option ...] CONFIG.yaml [key=value ...]
# HOSTFILE has lines "host slots=number", a slot for every GPU. All hosts have this folder, the data
# and the run folder at the same paths, and allow ssh from this one without a password; it need not be
# among them. A host that dies is left out of the next restart.
#   --include node1@node2:0,1 or --exclude node3   some hosts, some slots
#   --node-rank N     no ssh: start ranks on this host only, number N of the file; run the same
#                     command on every other host with its own number
#   --help            all options, those of linclip train
# Network settings: launch/environment.sh. For ranks on the CPU: DS_ACCELERATOR=cpu before the command.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
command -v linclip > /dev/null \
    || { echo "error: linclip is not on the PATH: activate its environment" >&2; exit 2; }
# shellcheck source-path=SCRIPTDIR
. "$here/environment.sh"
exec linclip train --supervise --hostfile "$@"
