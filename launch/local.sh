#!/usr/bin/env bash
# The whole run on this machine, or as the driver of a Ray cluster that this machine belongs to (ray.address=auto).
#
#   launch/local.sh CONFIG [section.key=value ...]
#
# What is finished is skipped, what was interrupted goes on: after a failure give the same command again.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$root/.venv/bin:$PATH"

if [ $# -lt 1 ]; then
    echo "usage: launch/local.sh CONFIG [section.key=value ...]" >&2
    exit 2
fi

exec gkd run "$@"
