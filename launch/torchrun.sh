#!/usr/bin/env bash
# Trains the students under torchrun instead of Ray Train.
#
#   launch/torchrun.sh CONFIG [section.key=value ...]
#
# NPROC   processes on this machine, one per GPU; default: its GPUs, or 2 where it has none
# NNODES  machines (default 1). With more than one, start this script on each, after the stages up to `infer` are
#         done (gkd partition, teach, infer), and run what follows (gkd evaluate, export, report) afterwards; set
# NODE_RANK, MASTER_ADDR, MASTER_PORT   this machine's number from 0, and where machine 0 listens
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$root/.venv/bin:$PATH"
# shellcheck disable=SC1091 # lies beside this file
source "$root/launch/signals.bash"

if [ $# -lt 1 ]; then
    echo "usage: [NPROC=2] [NNODES=1 NODE_RANK=0 MASTER_ADDR=host MASTER_PORT=29500] launch/torchrun.sh CONFIG [section.key=value ...]" >&2
    exit 2
fi

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$((gpus > 0 ? gpus : 2))}
NNODES=${NNODES:-1}
if [ "$NNODES" -gt 1 ] && { [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; }; then
    echo "launch/torchrun.sh: NNODES=$NNODES needs NODE_RANK and MASTER_ADDR on every machine; set both" >&2
    exit 2
fi

if [ "$NNODES" -eq 1 ]; then
    step gkd partition "$@"
    step gkd teach "$@"
    step gkd infer "$@"
fi

# torchrun ends with 1 whatever its ranks end with: theirs says whether the same command can help (see README.md). The
# root cause is the last one in its report.
report=$(mktemp)
trap 'rm -f "$report"' EXIT
exec 3> >(trap '' INT TERM HUP && exec tee "$report" >&2)
reporter=$! failed=0
launch 1 torchrun \
    --nnodes "$NNODES" --nproc-per-node "$NPROC" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    -m gkd_dist distill "$@" distill.launcher=torchrun "distill.num_workers=$((NNODES * NPROC))" \
    2>&3 3>&- || failed=$?
exec 3>&-
if [ "$failed" -ne 0 ]; then
    for ((tries = 0; tries < 50; tries++)); do # until tee has written the end; a rank that is left may keep it open
        kill -0 "$reporter" 2>/dev/null || break
        sleep 0.1
    done
    cause=$(sed -n 's/^ *exitcode *: *\(-\{0,1\}[0-9]*\).*/\1/p' "$report" | tail -n 1)
    if grep -q 'SignalException.* got signal: 15' "$report"; then
        cause=143
    fi
    exit "$(exit_code "${cause:-$failed}")"
fi

if [ "$NNODES" -eq 1 ]; then
    step gkd evaluate "$@"
    step gkd export "$@"
    step gkd report "$@"
fi
