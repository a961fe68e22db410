#!/bin/bash
# Two machines with four GPUs each: sbatch slurm.sh
#SBATCH --job-name=spam
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300        # five minutes before the time is over: a checkpoint is written
#SBATCH --requeue

OUTPUT=${OUTPUT:-runs/spam}      # a folder that all machines see
RECIPE=${RECIPE:-recipe.yaml}

# after a requeue the run goes on from its last checkpoint
if [ -d "$OUTPUT/checkpoints" ]; then RESUME=--resume; fi

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export AFINA_CACHE=${AFINA_CACHE:-$PWD/.cache/afina}

# one torchrun a machine, which starts one process a GPU
srun bash -c "exec torchrun --nnodes $SLURM_NNODES --nproc-per-node 4 --node-rank \$SLURM_NODEID \
  --master-addr $MASTER_ADDR --master-port 29500 \
  -m afina train $RECIPE --output $OUTPUT --engine fsdp2 $RESUME"
