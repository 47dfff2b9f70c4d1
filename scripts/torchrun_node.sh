#!/usr/bin/env bash
# Start one machine's share of a run on several machines, without a scheduler.
#
#   scripts/torchrun_node.sh NODE_RANK NUM_NODES FIRST_NODE PROCESSES VERB [SETTINGS]
#
# On the first of two machines with eight GPUs each, and on the second the same with 1 for 0:
#
#   scripts/torchrun_node.sh 0 2 10.0.0.1:29500 8 \
#       fit --config text/paper_830m --name two_nodes --resume auto --vars.devices 8
#
# NODE_RANK   of this machine, from 0; the others may be started earlier or later.
# FIRST_NODE  address of machine 0 and a free port on it, which all machines can reach.
# PROCESSES   on this machine: one for each GPU, the recipe's trainer.devices.
#
# The run's directory must be one that all machines see. A run has a name here, since each process
# would make up another time. The same lines go on with a run that was stopped.
set -euo pipefail

if (($# < 5)); then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
node_rank=$1 num_nodes=$2 first_node=$3 processes=$4
shift 4

exec python -m torch.distributed.run \
    --nnodes "$num_nodes" --node-rank "$node_rank" --nproc-per-node "$processes" \
    --master-addr "${first_node%:*}" --master-port "${first_node##*:}" \
    -m diffmm.cli "$@" --trainer.num_nodes "$num_nodes"
