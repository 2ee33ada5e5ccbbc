#!/usr/bin/env bash
# Fine-tunes with DeepSpeed's launcher. On many hosts it is run once, and starts the others by ssh:
#   HOSTFILE=hosts.txt HEAD=10.0.0.1 launch/deepspeed.sh train.learning_rate=1e-5
# A line of the host file: node1 slots=8
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=${CONFIG:-configs/zero3_grass.yaml}
HOSTFILE=${HOSTFILE:-}                 # empty: this host alone
RANKS=${RANKS:-}                       # processes on this host, if it is alone; empty: one a GPU
HEAD=${HEAD:-}                         # address of the first host, as the others reach it
PORT=${PORT:-29500}
LAUNCHER=${LAUNCHER:-pdsh}             # pdsh, openmpi, mpich, impi, slurm; or no_ssh: run it on every host yourself,
NODE_RANK=${NODE_RANK:-0}              # with NODE_RANK from 0
INTERFACE=${INTERFACE:-}               # network interface, e.g. eth0 or ib0; empty: NCCL and gloo choose
LAUNCHER_ARGS=${LAUNCHER_ARGS:-}       # passed on to mpirun or pdsh, e.g. --allow-run-as-root
DEEPSPEED=${DEEPSPEED:-deepspeed}

if [ -n "$INTERFACE" ]; then export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE; fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Of the environment only what stands in this file reaches the other hosts.
export DS_ENV_FILE
DS_ENV_FILE=$(mktemp)
trap 'rm -f "$DS_ENV_FILE"' EXIT
env | grep -E '^(NCCL|GLOO|OMP|HF|DS|CUDA|UCX|FI)_[A-Z_0-9]*=' | grep -v ^DS_ENV_FILE= > "$DS_ENV_FILE" || true

WHERE=()
if [ -n "$HOSTFILE" ]; then
  WHERE=(--hostfile "$HOSTFILE" --master_port "$PORT")
  if [ -n "$HEAD" ]; then WHERE+=(--master_addr "$HEAD"); fi
  if [ "$LAUNCHER" = no_ssh ]; then
    WHERE+=(--no_ssh --node_rank "$NODE_RANK")
  else
    WHERE+=(--launcher "$LAUNCHER" --force_multi)
    if [ -n "$LAUNCHER_ARGS" ]; then WHERE+=("--launcher_args=$LAUNCHER_ARGS"); fi
  fi
elif [ -n "$RANKS" ]; then
  WHERE=(--num_gpus "$RANKS" --master_port "$PORT")
fi
"$DEEPSPEED" --log_level warning "${WHERE[@]}" launch/finetune.py --config "$CONFIG" ${RESUME:+--resume "$RESUME"} "$@"
