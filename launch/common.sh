# Sourced by the scripts of this folder: what they take from the environment, checked before any of it is used.

# Variables that reach the other hosts, by their whole names: what torch, NCCL, gloo, DeepSpeed and Hugging Face are set
# up with. There is no token, key or password among them, since the value of a variable that a launcher passes on can be
# read in the list of processes of every host. PASS="NAME NAME" adds names of your own.
NAMES="NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_DEBUG_FILE NCCL_SOCKET_IFNAME NCCL_SOCKET_FAMILY NCCL_SOCKET_NTHREADS
  NCCL_NSOCKS_PERTHREAD NCCL_IB_DISABLE NCCL_IB_HCA NCCL_IB_GID_INDEX NCCL_IB_TC NCCL_IB_SL NCCL_IB_TIMEOUT
  NCCL_IB_RETRY_CNT NCCL_IB_QPS_PER_CONNECTION NCCL_IB_PCI_RELAXED_ORDERING NCCL_P2P_DISABLE NCCL_P2P_LEVEL
  NCCL_SHM_DISABLE NCCL_NET NCCL_NET_PLUGIN NCCL_NET_GDR_LEVEL NCCL_CROSS_NIC NCCL_ALGO NCCL_PROTO NCCL_MIN_NCHANNELS
  NCCL_MAX_NCHANNELS NCCL_BUFFSIZE NCCL_TOPO_FILE NCCL_NVLS_ENABLE NCCL_CUMEM_ENABLE NCCL_LAUNCH_MODE
  TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT TORCH_DISTRIBUTED_DEBUG TORCH_EXTENSIONS_DIR
  PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF GLOO_SOCKET_IFNAME OMP_NUM_THREADS CUDA_HOME CUDA_DEVICE_ORDER
  CUDA_LAUNCH_BLOCKING CUDA_DEVICE_MAX_CONNECTIONS DS_ACCELERATOR DS_SKIP_CUDA_CHECK UCX_TLS UCX_NET_DEVICES
  FI_PROVIDER FI_EFA_USE_DEVICE_RDMA HF_HOME HF_HUB_CACHE HF_DATASETS_CACHE HF_ENDPOINT HF_HUB_OFFLINE
  HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE HF_TOKEN_PATH TOKENIZERS_PARALLELISM GRASS_DIST_CACHE"

refuse() { printf 'error: %s\n' "$1" >&2; exit 2; }

# matches NAME PATTERN FIX: ends the script unless the variable's value is of the extended pattern. A number must not be
# tested by arithmetic, which would run a command that is written into it.
matches() {
  local LC_ALL=C
  [[ ${!1} =~ ^($2)$ ]] || refuse "$1=$(printf '%q' "${!1}"): it is not of the form that it must have; $3."
}

whole_number() { local name; for name; do matches "$name" '[0-9]{1,6}' 'write a whole number, e.g. 2'; done; }

# Prints the names that are passed on and set, one a line.
passed_names() {
  local name
  if [[ ${HF_ENDPOINT-} == *@* ]]; then
    refuse "HF_ENDPOINT has a user or a password in it, which would be read in the list of processes; leave them out."
  fi
  for name in ${PASS:-}; do
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || refuse "PASS=$(printf '%q' "$PASS"): write names of variables."
    if [[ ${name^^} =~ TOKEN|KEY|SECRET|PASSW|CREDENTIAL ]]; then
      refuse "PASS names $name, which would be read in the list of processes; write it into a file on every host."
    fi
  done
  for name in $NAMES ${PASS:-}; do
    if [ -n "${!name+set}" ]; then printf '%s\n' "$name"; fi
  done | sort -u
}

# A token stays on this host.
say_tokens() {
  local name
  for name in HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY; do
    if [ -n "${!name:-}" ]; then
      printf '%s is not passed to the other hosts, where the list of processes would show it; ' "$name" >&2
      printf 'write it into a file of mode 600 on each (for HF_TOKEN, the one that HF_TOKEN_PATH names).\n' >&2
    fi
  done
}
