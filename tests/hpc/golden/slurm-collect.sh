#!/bin/bash -l
#SBATCH --job-name=mixers-collect
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:30:00
#SBATCH --partition=gpu
#SBATCH --account=ab12
#SBATCH --qos=normal
#SBATCH --constraint=a100&nvlink
#SBATCH --cpus-per-task=16
#SBATCH --mem=0
#SBATCH --gres=gpu:a100:4
#SBATCH --chdir=/scratch/ab12/mixers
#SBATCH --output=/scratch/ab12/mixers/logs/%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --export=NONE
#SBATCH --mail-type=END
#
# Written by `observatory submit`; may be read, changed and submitted again by hand.
# mixers-collect

say() { printf '%s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*"; }
campaign=/scratch/ab12/mixers

# The submission passes no environment on; what a job sets reaches its steps.
unset SLURM_EXPORT_ENV
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
index=${SLURM_ARRAY_TASK_ID:-0}
restarted=${SLURM_RESTART_COUNT:-0}
# 0: the job is in the queue or runs; 1: it has ended; 2: the scheduler does not answer.
is_alive() {
  local answer
  if answer=$(squeue --noheader --format=%T --jobs="$1" 2>&1); then
    [ -n "$answer" ]
  else
    case $answer in *"Invalid job id"*) return 1 ;; *) return 2 ;; esac
  fi
}
requeue() { scontrol requeue "$SLURM_JOB_ID"; }
# Without --batch the signal reaches the ranks, not this script.
interrupt() { scancel --signal=TERM "$SLURM_JOB_ID" || kill -TERM "$1"; } 2> /dev/null

prepare() {
  module load python/3.11 || { say "the module python/3.11 cannot be loaded"; return 1; }
  module load cuda/12.8 || { say "the module cuda/12.8 cannot be loaded"; return 1; }
  source /home/ab12/venv/bin/activate
  [ "$?" -eq 0 ] || return 1
  export NCCL_DEBUG=WARN
  export LABEL='it'"'"'s mine'
  return 0
}
say "job $job on ${HOSTNAME:-?}"
prepare || { say "the environment cannot be set up, see above"; exit 1; }
observatory collect /scratch/ab12/mixers
