#!/bin/bash -l
#SBATCH --job-name=mixers-profile
#SBATCH --array=0-1%8
#SBATCH --nodes=2
#SBATCH --ntasks=8
#SBATCH --ntasks-per-node=4
#SBATCH --time=1-02:30:00
#SBATCH --partition=gpu
#SBATCH --account=ab12
#SBATCH --qos=normal
#SBATCH --constraint=a100&nvlink
#SBATCH --cpus-per-task=16
#SBATCH --mem=0
#SBATCH --gres=gpu:a100:4
#SBATCH --exclusive
#SBATCH --chdir=/scratch/ab12/mixers
#SBATCH --output=/scratch/ab12/mixers/logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --export=NONE
#SBATCH --mail-type=END
#
# Written by `observatory submit`; may be read, changed and submitted again by hand.
# mixers-profile: 2 points of 8 rank(s) on 2 node(s)

say() { printf '%s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*"; }
# First of all, since a signal may come at any line; the ranks run in the background, or no trap would run.
step=
stop=
trap 'stop=out-of-time; say "the wall time ends soon"; [ -z "$step" ] || interrupt "$step"' USR1
trap 'stop=${stop:-terminated}; say "ended from outside"; [ -z "$step" ] || interrupt "$step"' TERM
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
points=(
  tiny-gqa--prose--ep8--prefill--0a1b2c3d4e
  tiny-mla--prose--ep8--prefill--5f6a7b8c9d
)
point=${points[$index]:-}
[ -n "$point" ] || { say "this job has no element $index"; exit 1; }
folder=$campaign/points/$point
more_to_do=75

last_attempt() {
  local number=0
  while [ -d "$folder/try-$((number + 1))" ]; do number=$((number + 1)); done
  echo "$number"
}

# Attempts are claims. One appears with its job in it, by renaming, and a folder that is not empty cannot be replaced.
claim() {
  local own=$folder/claim-$job
  rm -rf "$own"
  mkdir "$own" && echo "$job" > "$own/job" && mv -T "$own" "$1" 2>/dev/null && return
  rm -rf "$own"
  return 1
}

# A claim whose job has ended is void, and one without a job, once no file system would still hide it.
number=$(last_attempt)
while true; do
  [ -z "$stop" ] || exit $more_to_do
  [ -d "$folder/result" ] && { say "$point has its result already"; exit 0; }
  last=$folder/try-$number
  if [ "$number" -gt 0 ] && [ ! -f "$last/ended" ]; then
    for _ in {1..60}; do
      [ -f "$last/job" ] && break
      [ -n "$(find "$last" -maxdepth 0 -mmin -2 2>/dev/null)" ] || break
      [ -z "$stop" ] || exit $more_to_do
      sleep 2
    done
    holder=$(cat "$last/job" 2>/dev/null)
    if [ -n "$holder" ] && [ "$holder" != "$job" ]; then
      is_alive "$holder"
      case $? in
        0) say "$point is run by job $holder"; exit 0 ;;
        2) say "$point may still be run by job $holder: the scheduler does not answer"; exit $more_to_do ;;
      esac
    fi
  fi
  claim "$folder/try-$((number + 1))" && break
  [ -d "$folder" ] || { say "$folder is missing; submit the campaign again"; exit 1; }
  before=$number
  number=$(last_attempt)
  if [ "$number" -le "$before" ] && [ ! -d "$folder/result" ]; then
    say "nothing can be written in $folder"
    exit $more_to_do
  fi
done
number=$((number + 1))
attempt=$folder/try-$number
[ -d "$folder/result" ] && { rm -r "$attempt"; say "$point has its result already"; exit 0; }
say "$point, attempt $number, job $job on ${HOSTNAME:-?}"

end() {
  echo "$1 $2" > "$attempt/ended.part" && mv "$attempt/ended.part" "$attempt/ended"
  if [ "$1" = done ]; then mv -T "$attempt" "$folder/result" || exit 1; fi
  say "$point: $1 (exit code $2)"
}
mkdir -p "$attempt/out" || exit 1
prepare || { say "the environment cannot be set up, see above"; end failed 1; exit 1; }
[ -z "$stop" ] || { end "$stop" 1; exit $more_to_do; }

srun --nodes=2 --ntasks=8 --export=ALL --kill-on-bad-exit=0 --cpus-per-task=16 bash -uc 'scratch="$TMPDIR"/observatory-$1; mkdir -p "$scratch" && exec bash "$2" "$scratch"' \
  - "$job.$restarted" "$folder/command" &
step=$!
[ -z "$stop" ] || interrupt "$step"
wait "$step"
code=$?
while [ -n "$stop" ] && kill -0 "$step" 2>/dev/null; do
  wait "$step"
  code=$?
done
# What ends after a signal is no result, whatever its exit code: srun has 0 for a step that it gave up.
interrupted=$stop
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 bash -uc \
  'scratch="$TMPDIR"/observatory-$1; cp -R "$scratch/." "$2/" && rm -r "$scratch"' \
  - "$job.$restarted" "$attempt/out" || { say "what was captured cannot be copied back"; [ "$code" -ne 0 ] || code=1; }

if [ "$code" -eq 0 ] && [ -z "$interrupted" ]; then
  end done 0
elif [ -n "$stop" ]; then
  end "$stop" "$code"
  exit $more_to_do
else
  end failed "$code"
  exit "$code"
fi
