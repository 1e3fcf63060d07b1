#!/bin/bash -l
#BSUB -J "mixers-profile[1-2]%8"
#BSUB -n 8
#BSUB -R "span[ptile=4]"
#BSUB -R "affinity[core(8)]"
#BSUB -W 26:30
#BSUB -q normal
#BSUB -P ab12
#BSUB -gpu "num=4"
#BSUB -x
#BSUB -o /scratch/ab12/mixers/logs/%J_%I.log
#BSUB -r
#BSUB -wa USR1 -wt 3
#BSUB -env "none"
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

# Not run here: no LSF was at our disposal.
index=$((${LSB_JOBINDEX:-1} - 1))
job=$LSB_JOBID
[ "$index" -lt 0 ] || job=${job}_$LSB_JOBINDEX  # the index is 0 outside of arrays
restarted=0
# 0: the job is in the queue or runs; 1: it has ended; 2: the scheduler does not answer.
is_alive() {
  local answer id=$1
  case $id in *_*) id="${id%_*}[${id#*_}]" ;; esac
  if answer=$(bjobs -noheader -o stat "$id" 2>&1); then
    case $answer in *PEND* | *RUN* | *SUSP*) return 0 ;; *) return 1 ;; esac
  else
    case $answer in *"is not found"*) return 1 ;; *) return 2 ;; esac
  fi
}
# LSF does not count restarts; attempts do.
requeue() { [ "$number" -gt 2 ] || brequeue "$LSB_JOBID[$LSB_JOBINDEX]"; }
interrupt() { kill -TERM "$1"; }

prepare() {
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

mpiexec -n 8 bash "$folder/command" "$attempt/out" &
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

if [ "$code" -eq 0 ] && [ -z "$interrupted" ]; then
  end done 0
elif [ -n "$stop" ]; then
  end "$stop" "$code"
  exit $more_to_do
else
  end failed "$code"
  exit "$code"
fi
