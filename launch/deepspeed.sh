#!/usr/bin/env bash
# Fine-tunes with DeepSpeed's launcher. On many hosts it is run once, and starts the others by ssh:
#   HOSTFILE=hosts.txt HEAD=10.0.0.1 launch/deepspeed.sh train.learning_rate=1e-5
# A line of the host file: node1 slots=8
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

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

whole_number PORT NODE_RANK
matches RANKS '[0-9]{0,6}' 'write a whole number, e.g. 2'
matches HEAD '[A-Za-z0-9._:-]*' 'write the address or the name of a host'
matches LAUNCHER 'pdsh|openmpi|mpich|impi|slurm|mvapich|no_ssh' 'use pdsh, openmpi, mpich, impi, slurm or no_ssh'
if [ -n "$INTERFACE" ]; then export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE; fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# DeepSpeed's pdsh runner writes values and arguments into one line for a remote shell: within double quotes where they
# have odd characters, and without regard to $ and `. These two write them so that the remote shell finds what is here.
in_double_quotes() {  # pdsh itself reads %h, %n, %u and %%
  local text=$1
  text=${text//\\/\\\\}; text=${text//\$/\\\$}; text=${text//\`/\\\`}
  if [ "${2:-}" != argument ]; then text=${text//\"/\\\"}; fi  # of an argument it escapes them itself
  printf '%s' "${text//%/%%}"
}
as_argument() {
  local safe='^[A-Za-z0-9_@+=:,./-]+$' quote="'\\''" LC_ALL=C
  if [[ $1 =~ $safe ]]; then
    printf '%s' "$1"
  elif [[ $1 == *' '* ]]; then
    in_double_quotes "$1" argument
  else
    printf "'%s'" "${1//\'/$quote}" | sed 's/%/%%/g'
  fi
}

ARGUMENTS=(--config "$CONFIG" ${RESUME:+--resume "$RESUME"} "$@")
LISTED=$(passed_names)                 # see common.sh
WHERE=()
if [ -n "$HOSTFILE" ]; then
  WHERE=(--hostfile "$HOSTFILE" --master_port "$PORT")
  if [ -n "$HEAD" ]; then WHERE+=(--master_addr "$HEAD"); fi
  if [ "$LAUNCHER" = no_ssh ]; then
    WHERE+=(--no_ssh --node_rank "$NODE_RANK")
  else
    # The others pass the whole environment on by themselves, and not on a command line.
    if [[ $LAUNCHER == pdsh || $LAUNCHER == openmpi ]]; then say_tokens; fi
    WHERE+=(--launcher "$LAUNCHER" --force_multi)
    # DeepSpeed passes on all variables that begin with one of these: only those of the list stay.
    for name in $(compgen -e | grep -E '^(NCCL|MLFLOW|PYTHON|MV2|UCX)' || true); do
      if [ "$name" != PYTHONPATH ] && ! grep -qxF "$name" <<< "$LISTED"; then unset "$name"; fi
    done
    for name in $LISTED PYTHONPATH; do
      if [[ ${!name-} == *[[:cntrl:]]* || ${!name-} == [[:space:]]* || ${!name-} == *[[:space:]] ]]; then
        refuse "$name has a line break or spaces at an end, and cannot be passed to other hosts as it is; change it."
      fi
    done
    export DS_ENV_FILE
    DS_ENV_FILE=$(umask 077; mktemp)
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    if [ "$LAUNCHER" = pdsh ]; then
      [[ $PWD =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] || refuse "this folder is $PWD: pdsh needs a path of plain characters."
      for name in $LISTED; do printf '%s=%s\n' "$name" "$(in_double_quotes "${!name}")"; done > "$DS_ENV_FILE"
      printf 'PYTHONPATH=%s\n' "$(in_double_quotes "$PWD${PYTHONPATH:+:$PYTHONPATH}")" >> "$DS_ENV_FILE"
      for at in "${!ARGUMENTS[@]}"; do
        if [[ ${ARGUMENTS[at]} == *[[:cntrl:]]* ]]; then
          refuse "an argument has a line break or another control character, and pdsh cannot pass it; write it into CONFIG."
        fi
        ARGUMENTS[at]=$(as_argument "${ARGUMENTS[at]}")
      done
    elif [ "$LAUNCHER" != slurm ]; then   # srun passes the whole environment itself
      for name in $LISTED; do
        if [ "$LAUNCHER" = openmpi ] && ! [[ $name =~ ^(NCCL|UCX) ]]; then
          LAUNCHER_ARGS+=" -x $name"     # by name, so that the value is on no command line
          continue
        fi
        [[ ${!name} =~ ^[A-Za-z0-9_@%+=:,./-]*$ ]] \
          || refuse "$name=$(printf '%q' "${!name}"): $LAUNCHER would get it with quotes; change it, or use pdsh."
        printf '%s=%s\n' "$name" "${!name}" >> "$DS_ENV_FILE"
      done
    fi
    if [ -n "$LAUNCHER_ARGS" ]; then WHERE+=("--launcher_args=$LAUNCHER_ARGS"); fi
  fi
elif [ -n "$RANKS" ]; then
  WHERE=(--num_gpus "$((10#$RANKS))" --master_port "$PORT")
fi
"$DEEPSPEED" --log_level warning "${WHERE[@]}" launch/finetune.py "${ARGUMENTS[@]}"
