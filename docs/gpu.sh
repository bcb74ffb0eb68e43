#!/bin/sh
# Everything that a GPU is needed for, in at most 8 minutes: one table, gpu.json and gpu.log. From the project's root: make gpu, or
#     [PYTHON=python3] [OUT=runs/gpu] [WORK=FOLDER] [SECONDS_IN_ALL=480] [WARM=""] sh docs/gpu.sh [SECTION...]
# Each section has a time limit; one that fails or takes too long is reported and ends nothing. WORK takes 3 GB. What finds no time is
# named, and can be run by its name: first what does not compile, the most wanted first, then what does, the shortest first.
# Seconds (estimated; by the fourth run dmd-16 takes at most 95): facts 20; checks to equal 80, beside one another, since none is timed;
# dmd-16 80, dmd-8 50, one-step 50, dmd-16-checkpointing 60, recipe 60, network 30, pipeline 35. That is 465 in all. Compiling takes
# minutes a section: a second run by name has time for it, sh docs/gpu.sh one-step-whole compile dmd-16-blocks, and for pairs.
# Beside checks to equal run the sections of WARM too, so that torch's cache has some of their kernels; what they print is dropped. They
# are ended where the first timed section begins. WARM="" does without. DEVICE=cpu WARM="" tries the timed sections with a tiny model, but
# recipe, which is of full size.
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
WORK=${WORK:-$(mktemp -d)}
WARM=${WARM-one-step-whole}
SECTIONS="facts checks fsdp ddp same resume equal dmd-16 dmd-8 one-step dmd-16-checkpointing recipe network pipeline"
SECTIONS="$SECTIONS one-step-whole compile dmd-16-blocks dmd-16-whole one-step-blocks dmd-16-blocks-last"
SECTIONS="$SECTIONS pairs pairs-last pairs-whole pairs-whole-last"
case $OUT in /*) ;; *) OUT=$PWD/$OUT ;; esac
export OUT WORK PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$WORK/inductor}" TORCHINDUCTOR_FX_GRAPH_CACHE=1
mkdir -p "$OUT" "$WORK/warm"
rm -f "$OUT/figures.jsonl" "$OUT/gpu.log"
begun=$(date +%s)
timeout 150 "$PYTHON" docs/gpu.py make >"$WORK/make.log" 2>&1 &
making=$!
warming=""
beside=""
limit_of() {
    case $1 in
    facts) echo 40 ;; checks | fsdp | ddp | same | resume | equal) echo 120 ;;
    dmd-*-checkpointing | dmd-8) echo 90 ;; dmd-*-* | one-step-* | pairs-whole*) echo 200 ;; dmd-* | recipe) echo 110 ;; compile) echo 120 ;; *) echo 80 ;;
    esac
}
warm_up() { # the sections of WARM, one after another, until this shell is told to end
    child=""
    trap '[ -n "$child" ] && kill "$child" && wait "$child"; exit' TERM
    while kill -0 "$making" 2>/dev/null; do sleep 1; done
    for section in $WARM; do
        OUT="$WORK/warm" timeout -k 5 220 "$PYTHON" docs/gpu.py "$section" >>"$WORK/warm/log" 2>&1 &
        child=$!
        wait "$child"
    done
}
settle() { # all that runs beside: waited for, but for the warming, which is ended
    for process in $making $beside; do wait "$process" 2>/dev/null; done
    [ -n "$warming" ] && { kill "$warming" && wait "$warming"; } 2>/dev/null
    making="" beside="" warming=""
}
run_section() {
    left=$((${SECONDS_IN_ALL:-480} - $(date +%s) + begun - 5))
    limit=$(limit_of "$1")
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 10 ]; then
        "$PYTHON" docs/gpu.py failed "$1" "no time was left"
        return
    fi
    start=$(date +%s)
    timeout -k 5 "$limit" "$PYTHON" docs/gpu.py "$1" >"$WORK/$1.log" 2>&1
    code=$?
    { echo "== $1" && cat "$WORK/$1.log"; } >>"$OUT/gpu.log"
    [ $code -eq 0 ] || { tail -n 15 "$WORK/$1.log"; "$PYTHON" docs/gpu.py failed "$1" "exit code $code (124: over $limit s)"; }
    echo "[$1: $(($(date +%s) - start)) s]"
}
for section in ${*:-$SECTIONS}; do
    case $section in
    facts) run_section facts ;;
    checks | fsdp | ddp | same | resume | equal)
        [ -z "$warming" ] && [ -n "$WARM" ] && { warm_up & warming=$!; }
        run_section "$section" &
        beside="$beside $!"
        ;;
    *)
        settle
        run_section "$section"
        ;;
    esac
done
[ -n "$making" ] && kill "$making" 2>/dev/null # no timed section was asked for
settle
for log in make.log warm/log; do
    [ -f "$WORK/$log" ] && { echo "== $log" && cat "$WORK/$log"; } >>"$OUT/gpu.log"
done
"$PYTHON" docs/gpu.py table
echo "[all: $(($(date +%s) - begun)) s]"
