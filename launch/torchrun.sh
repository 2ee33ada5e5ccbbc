#!/usr/bin/env bash
# Fine-tunes with torchrun, on one host or on many. Run the same command on every host:
#   NODES=2 HEAD=node1 launch/torchrun.sh train.learning_rate=1e-5
# Settings of the run follow as section.field=value; each host needs this folder at the same place.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

CONFIG=${CONFIG:-configs/fsdp2_grass.yaml}
NODES=${NODES:-1}                      # hosts; 1:2 goes on with one when the other is lost
RANKS=${RANKS:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}  # processes on each host: one a GPU
HEAD=${HEAD:-localhost}                # the host where the others meet, by a name that all reach
PORT=${PORT:-29400}
RENDEZVOUS=${RENDEZVOUS:-c10d}         # c10d: hosts may come in any order; static: NODE_RANK numbers them
NODE_RANK=${NODE_RANK:-0}
RESTARTS=${RESTARTS:-0}                # how often the ranks are started again after one has died
RDZV_CONF=${RDZV_CONF:-}               # of the rendezvous, e.g. join_timeout=900,last_call_timeout=30
INTERFACE=${INTERFACE:-}               # network interface, e.g. eth0 or ib0; empty: NCCL and gloo choose
PYTHON=${PYTHON:-python}

whole_number RANKS PORT NODE_RANK RESTARTS
matches NODES '[0-9]{1,6}(:[0-9]{1,6})?' 'write a number of hosts, e.g. 2, or 1:2'
RANKS=$((10#$RANKS))
if [ "$RANKS" = 0 ]; then RANKS=1; fi
if [ -n "$INTERFACE" ]; then export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE; fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) > RANKS ? $(nproc) / RANKS : 1 ))}

if [ "$RENDEZVOUS" = static ]; then
  MEET=(--rdzv-backend static --node-rank "$NODE_RANK" --master-addr "$HEAD" --master-port "$PORT")
else
  MEET=(--rdzv-backend "$RENDEZVOUS" --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "${JOB:-grass}")
fi
if [ -n "$RDZV_CONF" ]; then MEET+=(--rdzv-conf "$RDZV_CONF"); fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$RANKS" --max-restarts "$RESTARTS" \
  "${MEET[@]}" launch/finetune.py --config "$CONFIG" ${RESUME:+--resume "$RESUME"} "$@"
