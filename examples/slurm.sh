#!/bin/bash
# softcl.train on several nodes under SLURM: sbatch examples/slurm.sh
#
# One torchrun per node starts a process per GPU; the nodes meet at the first one's port 29500, which
# must be open between them, as must be the ports that NCCL picks. The run folder and the images have
# to be on a file system that all nodes see. SLURM's SIGTERM before the time limit saves the run;
# requeued, the same script goes on with it.

#SBATCH --job-name=softcl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))

srun torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
  -m softcl.train --data "${DATA:?name the images}" --arch resnet50 --batch-size 4096 \
  --queue-sharding --out "${RUN:-runs/slurm}" --resume auto "$@"
