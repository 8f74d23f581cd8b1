#!/usr/bin/env bash
# Start the ranks of one node, without ssh. Run it once on every node, with the same arguments:
#   NODES=2 NODE_RANK=0 SLOTS=8 MASTER_ADDR=10.0.0.1 docker/node.sh launch/pretrain.py CONFIG [key=value ...]
#
# NODES        nodes of the run; under slurm its own number
# NODE_RANK    0 to NODES - 1; under slurm and in an Indexed Job of Kubernetes theirs
# SLOTS        ranks of each node: its GPUs
# MASTER_ADDR  name or address of node 0, MASTER_PORT a free port there (29500)
# RESTARTS     starts after failures, at most so many an hour (0)
#
# SIGTERM, SIGINT, SIGUSR1 and SIGHUP end the run after its step, with a checkpoint and exit code 75; a
# file STOP in the run folder, or a deadline that is an ISO time, with 76. Exit code otherwise: the launcher's, 2 for a user's error.
set -euo pipefail

: "${NODES:=${SLURM_NNODES:?NODES: how many nodes?}}"
: "${NODE_RANK:=${SLURM_NODEID:-${JOB_COMPLETION_INDEX:?NODE_RANK: which node is this?}}}"
: "${SLOTS:?SLOTS: how many ranks a node?}" "${MASTER_ADDR:?MASTER_ADDR: where is node 0?}"

# The launcher needs a list of nodes; without ssh it only counts them.
hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
for ((node = 0; node < NODES; node++)); do
    echo "node$node slots=$SLOTS"
done > "$hostfile"

# The supervisor passes signals on to the ranks alone, and ends what outlives the launcher.
python "$(dirname "$0")/../launch/supervise.py" --restarts "${RESTARTS:-0}" -- \
    deepspeed --no_ssh --hostfile "$hostfile" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@" < /dev/null &
supervisor=$!
for name in TERM INT USR1 HUP; do
    trap "kill -$name $supervisor 2> /dev/null || true" "$name"
done
while true; do
    code=0
    wait "$supervisor" || code=$?
    kill -0 "$supervisor" 2> /dev/null || exit "$code" # else a signal came, and it goes on
done
