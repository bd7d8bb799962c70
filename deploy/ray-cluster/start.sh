#!/usr/bin/env bash
# Ray on one machine of a hostler cluster, in the foreground (for a service manager, or a terminal).
#
#   start.sh head ADDRESS [RAY OPTION…]              the machine that will run `hostler serve`
#   start.sh join HEAD:PORT ADDRESS NAME [RAY OPTION…]   every other machine
#
# ADDRESS is the machine's own IP address within the cluster, NAME what hostler calls it (`box2` in `box2/cuda:0`).
# Every machine needs the same token: in RAY_AUTH_TOKEN, or in the file RAY_AUTH_TOKEN_PATH (~/.ray/auth_token).
set -euo pipefail
case "${1:-}" in
  head) address=${2:?"say this machine's address"}; shift 2
    where=(--head --port "${HOSTLER_RAY_PORT:-6399}" --include-dashboard=false --include-log-monitor=false) ;;
  join) where=(--address "${2:?"say where the head is, HOST:PORT"}" --node-name "${4:?"say this machine's name"}")
    address=${3:?"say this machine's address"}; shift 4 ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "$token_file" ]; then
  echo "No token: set RAY_AUTH_TOKEN, or put 64 hexadecimal digits into $token_file (openssl rand -hex 32)." >&2
  exit 2
fi
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_enable_metrics_collection=false
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1
export RAY_worker_niceness=0 GOMP_SPINCOUNT=10000
# One worker process ahead, with torch and transformers imported.
export RAY_enable_worker_prestart=true RAY_preload_python_modules="${RAY_preload_python_modules:-workers.preload}"
# hostler places models by itself: Ray must neither count nor hide devices, and its object store holds next to nothing.
exec ray start --block --disable-usage-stats --node-ip-address "$address" --num-cpus 1 --num-gpus 0 \
  --object-store-memory 80000000 "${where[@]}" "$@"
