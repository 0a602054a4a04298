#!/usr/bin/env bash
# Trains the students under the deepspeed launcher instead of Ray Train.
#
#   launch/deepspeed.sh CONFIG [section.key=value ...]
#
# NPROC     processes on this machine, one per GPU; default: its GPUs, or 2 where it has none
# HOSTFILE  machines and their slots, as DeepSpeed reads them ("host slots=8"). With more than one, start this script on
#           each, after the stages up to `infer` are done (gkd partition, teach, infer), and run what follows (gkd
#           evaluate, export, report) afterwards; set
# NODE_RANK, MASTER_ADDR, MASTER_PORT   this machine's line in the file from 0, and where the first one listens
#
# No machine reaches another by ssh: each starts its own processes.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$root/.venv/bin:$PATH"
# shellcheck disable=SC1091 # lies beside this file
source "$root/launch/signals.bash"

if [ $# -lt 1 ]; then
    echo "usage: [NPROC=2] [HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=host MASTER_PORT=29500] launch/deepspeed.sh CONFIG [section.key=value ...]" >&2
    exit 2
fi

if [ -n "${HOSTFILE:-}" ]; then
    if [ ! -f "$HOSTFILE" ]; then
        echo "launch/deepspeed.sh: HOSTFILE=$HOSTFILE is not a file; write a line \"host slots=8\" for each machine" >&2
        exit 2
    fi
    if [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; then
        echo "launch/deepspeed.sh: HOSTFILE needs NODE_RANK and MASTER_ADDR on every machine; set both" >&2
        exit 2
    fi
    workers=$(sed -nE 's/^[^#]*slots=([0-9]+).*/\1/p' "$HOSTFILE" | awk '{ sum += $1 } END { print sum + 0 }')
    where=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
else
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    workers=${NPROC:-$((gpus > 0 ? gpus : 2))}
    where=(--hostfile /dev/null --num_gpus "$workers")
    step gkd partition "$@"
    step gkd teach "$@"
    step gkd infer "$@"
fi

failed=0
# The ranks are below deepspeed and the launcher that it starts on this machine.
launch 2 deepspeed "${where[@]}" --master_port "${MASTER_PORT:-29500}" --no_local_rank --quiet \
    --module gkd_dist distill "$@" distill.launcher=deepspeed "distill.num_workers=$workers" || failed=$?
if [ "$failed" -ne 0 ]; then
    exit "$(exit_code "$failed")"
fi

if [ -z "${HOSTFILE:-}" ]; then
    step gkd evaluate "$@"
    step gkd export "$@"
    step gkd report "$@"
fi
