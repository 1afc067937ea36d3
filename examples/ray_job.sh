#!/usr/bin/env bash
# Runs asynchronous GRPO as a job on a Ray cluster: starts a one-machine cluster, submits the job, follows it, and
# stops what it started. On a cluster that is already there, only the part from `ray job submit` on is needed.
#
#   examples/ray_job.sh configs/async-grpo/quickstart.yaml output_dir=$PWD/runs/job
#
# * `--working-dir .` ships this folder, less what .gitignore and .rayignore name, to the cluster, so that the job runs
#   the code of this checkout. The job runs in a copy: give paths of models and of output_dir in full.
# * Ray 2.60 asks for a token. All that talk to the cluster need RAY_AUTH_MODE=token and the same token: here from a
#   file that this script makes; `ray get-auth-token --generate` makes one for everyday use in ~/.ray/auth_token.
# * Every port is free when it is chosen and the temporary folder is its own, so that it meets no other cluster.
#   (`ray stop` would stop every Ray of this machine: this script ends only the process it started.)
#
# Environment: PYTHON (default .venv/bin/python), RAY_JOB_CPUS (default 2), RAY_JOB_TIMEOUT_S (default 3600).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 1 ]; then
    echo "usage: examples/ray_job.sh CONFIG [a.b=c ...]" >&2
    exit 2
fi
python=${PYTHON:-.venv/bin/python}
bin=$(cd "$(dirname "$python")" && pwd)
export PATH="$bin:$PATH"

# A cluster of somebody else's must not be joined by accident.
unset RAY_ADDRESS RAY_JOB_ID RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0

# Ray's sockets lie below this folder, and their paths may have 107 characters: keep it short.
folder=$(mktemp -d "${RAY_JOB_TMP:-/tmp}/rj-XXXXXX")
export RAY_TMPDIR="$folder" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")

read -r gcs dashboard agent agent_grpc runtime_env metrics client <<< "$(python - <<'PYTHON'
import socket

# All are held until all are chosen, so that no two are the same.
held = [socket.socket() for _ in range(7)]
for each in held:
    each.bind(("127.0.0.1", 0))
print(*(each.getsockname()[1] for each in held))
PYTHON
)"

# --block keeps the cluster a child of this script: when that process ends, it takes the whole cluster with it.
ray start --head --block --node-ip-address=127.0.0.1 --num-cpus="${RAY_JOB_CPUS:-2}" --num-gpus="${RAY_JOB_GPUS:-0}" \
    --temp-dir="$folder" --port="$gcs" --ray-client-server-port="$client" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --dashboard-agent-listen-port="$agent" --dashboard-agent-grpc-port="$agent_grpc" \
    --runtime-env-agent-port="$runtime_env" --metrics-export-port="$metrics" > "$folder/head.log" 2>&1 &
head=$!

finish() {
    code=$?
    trap - EXIT INT TERM
    kill -TERM "$head" 2> /dev/null || true
    wait "$head" 2> /dev/null || true
    [ "$code" -eq 0 ] || { echo "the cluster said:"; tail -n 20 "$folder/head.log"; } >&2
    rm -rf "$folder"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

export RAY_API_SERVER_ADDRESS="http://127.0.0.1:$dashboard"
for _ in $(seq 120); do
    ray job list > /dev/null 2>&1 && break
    kill -0 "$head" 2> /dev/null || { echo "the cluster did not start" >&2; exit 3; }
    sleep 1
done

echo "dashboard: $RAY_API_SERVER_ADDRESS (token in $RAY_AUTH_TOKEN_PATH)"
# The job's environment is the cluster's: PATH finds the same trl-ray, and Ray hands the job the cluster's address.
timeout "${RAY_JOB_TIMEOUT_S:-3600}" ray job submit --working-dir . -- trl-ray async-grpo --config "$@"
