#!/bin/sh
# Everything that a GPU is needed for, in at most 8 minutes: one table, gpu.json and gpu.log. From the project's root: make gpu, or
#     [PYTHON=python3] [OUT=runs/gpu] [WORK=FOLDER] [SECONDS_IN_ALL=480] [WARM=""] sh docs/gpu.sh [SECTION...]
# Each section has its own time limit; one that fails or takes too long is reported and ends nothing. WORK takes 3 GB. What finds no
# time is named, and can be run by its name: dmd-16-whole one-step-blocks dmd-16-blocks-last dmd-8 recipe network pipeline compile.
# While the sections before the first timed one run, those of WARM run beside them, so that torch's cache has their kernels: the seconds
# of their first calls are the figures "cold". WARM="" does without. DEVICE=cpu WARM="" tries the timed sections with a tiny model.
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
WORK=${WORK:-$(mktemp -d)}
WARM=${WARM-dmd-16-blocks one-step-whole}
SECTIONS="facts checks fsdp same resume equal dmd-16 dmd-16-blocks one-step one-step-whole dmd-16-checkpointing dmd-16-whole one-step-blocks"
SECTIONS="$SECTIONS recipe network pipeline dmd-8 compile"
case $OUT in /*) ;; *) OUT=$PWD/$OUT ;; esac
export OUT WORK PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$WORK/inductor}" TORCHINDUCTOR_FX_GRAPH_CACHE=1
mkdir -p "$OUT" "$WORK/warm"
rm -f "$OUT/figures.jsonl" "$OUT/gpu.log"
begun=$(date +%s)
timeout 150 "$PYTHON" docs/gpu.py make >>"$OUT/gpu.log" 2>&1 &
making=$!
warming=""
limit_of() {
    case $1 in
    facts) echo 40 ;; checks) echo 90 ;; fsdp) echo 60 ;; same) echo 100 ;; resume | equal) echo 60 ;;
    dmd-*-* | one-step-*) echo 200 ;; dmd-* | recipe) echo 110 ;; compile) echo 120 ;; *) echo 80 ;;
    esac
}
warm_up() { # the sections of WARM, one after another, at most 220 s; their first calls become figures
    wait_for "$making"
    end=$(($(date +%s) + 220))
    for section in $WARM; do
        left=$((end - $(date +%s)))
        [ "$left" -gt 10 ] && OUT="$WORK/warm" timeout -k 5 "$left" "$PYTHON" docs/gpu.py "$section" >>"$WORK/warm/log" 2>&1
    done
    [ -f "$WORK/warm/figures.jsonl" ] && grep 'first call' "$WORK/warm/figures.jsonl" | sed 's/{"figure": "/&cold: /' >>"$OUT/figures.jsonl"
}
wait_for() { while kill -0 "$1" 2>/dev/null; do sleep 1; done; }
for section in ${*:-$SECTIONS}; do
    case $section in
    facts) ;;
    dmd-* | one-step* | network | pipeline | compile | recipe)
        wait "$making"
        [ -n "$warming" ] && wait "$warming"
        ;;
    *)
        [ -z "$warming" ] && [ -n "$WARM" ] && { warm_up & warming=$!; }
        ;;
    esac
    left=$((${SECONDS_IN_ALL:-480} - $(date +%s) + begun - 5))
    limit=$(limit_of "$section")
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 10 ]; then
        "$PYTHON" docs/gpu.py failed "$section" "no time was left"
        continue
    fi
    start=$(date +%s)
    echo "== $section" >>"$OUT/gpu.log"
    timeout -k 5 "$limit" "$PYTHON" docs/gpu.py "$section" >"$WORK/section.log" 2>&1
    code=$?
    cat "$WORK/section.log" >>"$OUT/gpu.log"
    [ $code -eq 0 ] || { tail -n 15 "$WORK/section.log"; "$PYTHON" docs/gpu.py failed "$section" "exit code $code (124: over $limit s)"; }
    echo "[$section: $(($(date +%s) - start)) s]"
done
kill "$making" 2>/dev/null
[ -f "$WORK/warm/log" ] && { echo "== warm" && cat "$WORK/warm/log"; } >>"$OUT/gpu.log"
"$PYTHON" docs/gpu.py table
echo "[all: $(($(date +%s) - begun)) s]"
