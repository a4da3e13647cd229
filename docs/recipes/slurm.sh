#!/bin/bash
#SBATCH --job-name=kld
#SBATCH --array=1-4
#SBATCH --gpus=8
#SBATCH --time=08:00:00
#SBATCH --output=kld-%A-%a.log
set -euo pipefail

shard="${SLURM_ARRAY_TASK_ID:?start this with sbatch}/${SLURM_ARRAY_TASK_COUNT:?}"

pytest "${SUITE:-release.kld.toml}" \
    --kld-shard="$shard" \
    --kld-cache-url="${KLD_CACHE_URL:-s3://team-bucket/kld}" --kld-cache-push \
    --kld-json="shard-$SLURM_ARRAY_TASK_ID.json"
