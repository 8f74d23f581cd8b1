#!/usr/bin/env bash
# Start the ranks of one node, without ssh. Run it once on every node, with the same arguments:
#   NODES=2 NODE_RANK=0 SLOTS=8 MASTER_ADDR=10.0.0.1 docker/node.sh launch/pretrain.py CONFIG [key=value ...]
#
# NODES        nodes of the run; under slurm its own number
# NODE_RANK    0 to NODES - 1; under slurm and in an Indexed Job of Kubernetes theirs
# SLOTS        ranks of each node: its GPUs
# MASTER_ADDR  name or address of node 0, MASTER_PORT a free port there (29500)
#
# A SIGTERM ends the launcher with all its ranks. Exit code: the launcher's, 2 for a user's error.
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

set -m # the launcher and all it starts become one process group, so that none outlives this script
deepspeed --no_ssh --hostfile "$hostfile" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@" < /dev/null &
group=$!
trap 'kill -TERM -- "-$group" 2> /dev/null || true' TERM INT
code=0
wait "$group" || code=$?

# `deepspeed` ends with 0, its ranks alive, where its only child (launch.py) is killed by a signal.
for ((tenths = 0; tenths < 50; tenths++)); do
    kill -0 -- "-$group" 2> /dev/null || exit "$code"
    sleep 0.1
done
kill -KILL -- "-$group" 2> /dev/null || true
exit "$((code ? code : 1))"
