#!/usr/bin/env bash
# Fine-tunes with mpirun of Open MPI. It is run once, and starts the others by ssh:
#   HOSTS=node1,node2 RANKS=8 launch/mpirun.sh train.learning_rate=1e-5
# Needs pip install 'grass-dist[mpi]', or an Open MPI and mpi4py of the cluster's own, on every host.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

CONFIG=${CONFIG:-configs/fsdp2_grass.yaml}
HOSTS=${HOSTS:-}                       # names, with commas between them; empty: this host alone
RANKS=${RANKS:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}  # processes on each host: one a GPU
INTERFACE=${INTERFACE:-}               # network interface, e.g. eth0 or ib0; empty: each library chooses
MPI_ARGS=${MPI_ARGS:-}                 # passed on to mpirun, e.g. --allow-run-as-root
MPIRUN=${MPIRUN:-mpirun}
PYTHON=${PYTHON:-python}

whole_number RANKS
matches HOSTS '[A-Za-z0-9._:,-]*' 'write names with commas between them, e.g. node1,node2'
RANKS=$((10#$RANKS))
if [ "$RANKS" = 0 ]; then RANKS=1; fi
if [ -n "$INTERFACE" ]; then
  export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
  export OMPI_MCA_btl_tcp_if_include=$INTERFACE PRTE_MCA_prte_if_include=$INTERFACE
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# mpirun hands on what it is told to, by name: values are on no command line.
export GRASS_DIST_SIGNAL=SIGUSR1       # what a signal to this script becomes; without it the ranks warn of mpirun
EXPORTS=(-x GRASS_DIST_SIGNAL)
NAMES_HERE=$(passed_names)             # see common.sh
for name in $NAMES_HERE; do EXPORTS+=(-x "$name"); done
nodes=1
WHERE=()
if [ -n "$HOSTS" ]; then
  say_tokens
  WHERE=(--host "$HOSTS")
  nodes=$(tr ',' '\n' <<< "$HOSTS" | grep -c .)
fi
# Open MPI kills its ranks a second or two after a Ctrl-C, SIGTERM or SIGHUP, but it hands SIGUSR1 on: the first of them
# becomes that, and the ranks save; one that comes two seconds later or more ends them. So that a terminal's signals
# come here alone, mpirun gets a session of its own.
asked=
pass_on() {
  woken=1
  if [ -z "$asked" ]; then
    asked=$SECONDS
    kill -USR1 "$started"
  elif (( SECONDS - asked >= 2 )); then
    kill -TERM "$started"
  fi
}
# ppr: so many on each host, rank by rank; MPI itself carries only the address where the ranks meet.
# shellcheck disable=SC2086
setsid "$MPIRUN" -n $(( nodes * RANKS )) "${WHERE[@]}" --map-by "ppr:$RANKS:node:OVERSUBSCRIBE" --bind-to none $MPI_ARGS \
  "${EXPORTS[@]}" "$PYTHON" launch/finetune.py --config "$CONFIG" ${RESUME:+--resume "$RESUME"} "$@" < /dev/null &
started=$!
trap pass_on INT TERM HUP USR1
until woken=; code=0; wait "$started" || code=$?; [ -z "$woken" ]; do :; done  # a signal ends the wait
exit "$code"
