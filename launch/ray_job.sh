#!/usr/bin/env bash
# Submits the whole run to a Ray cluster and follows its log until it ends.
#
#   RAY_API_SERVER_ADDRESS=http://head:8265 launch/ray_job.sh CONFIG [section.key=value ...]
#
# The folder of CONFIG travels with the job, and nothing else: the package comes from the image of the cluster, so
# that driver and workers cannot differ. Put a model of your own (module:attr) beside the config.
# The cluster's token is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token (RAY_AUTH_MODE=token).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$root/.venv/bin:$PATH"

if [ $# -lt 1 ]; then
    echo "usage: RAY_API_SERVER_ADDRESS=http://head:8265 launch/ray_job.sh CONFIG [section.key=value ...]" >&2
    exit 2
fi
if [ -z "${RAY_API_SERVER_ADDRESS:-}" ]; then
    echo "launch/ray_job.sh: RAY_API_SERVER_ADDRESS is not set; set it to the cluster's dashboard, e.g. http://head:8265" >&2
    exit 2
fi

config=$1
shift
if [ ! -f "$config" ]; then
    echo "launch/ray_job.sh: $config is not a file here; name a config that does exist" >&2
    exit 2
fi

exec ray job submit \
    --address "$RAY_API_SERVER_ADDRESS" \
    --working-dir "$(dirname "$config")" \
    -- gkd run "$(basename "$config")" ray.address=auto "$@"
