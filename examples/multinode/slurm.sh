#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Submit with: sbatch examples/multinode/slurm.sh --config my_config.yaml --config examples/multinode/hybrid_fsdp.yaml
#
# Lightning reads ranks and addresses from SLURM. Ninety seconds before the time limit SLURM sends SIGUSR1; Lightning then
# writes a checkpoint and asks SLURM to queue the job again, which goes on from there.
#SBATCH --job-name=lightning-cl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

# All ranks end soon after one of them dies, so that the job fails instead of holding its machines.
srun --kill-on-bad-exit=1 python -m lightning_cl fit "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --ckpt_path last
