#!/bin/sh
# Everything that a GPU is needed for, in at most 8 minutes: one table, gpu.json and gpu.log. From the project's root: make gpu, or
#     [PYTHON=python3] [OUT=runs/gpu] [WORK=FOLDER] [SECONDS_IN_ALL=480] sh docs/gpu.sh [SECTION...]
# Each section has its own time limit; one that fails or takes too long is reported and ends nothing. WORK takes 3 GB.
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
WORK=${WORK:-$(mktemp -d)}
export OUT WORK PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT" "$WORK"
rm -f "$OUT/figures.jsonl" "$OUT/gpu.log"
begun=$(date +%s)
timeout 150 "$PYTHON" docs/gpu.py make >>"$OUT/gpu.log" 2>&1 &
making=$!
limit_of() {
    case $1 in facts) echo 40 ;; checks) echo 90 ;; same) echo 100 ;; resume | equal) echo 60 ;; dmd-8 | dmd-16) echo 110 ;; compile) echo 120 ;; *) echo 80 ;; esac
}
for section in ${*:-facts checks same resume equal dmd-16 one-step network pipeline dmd-8 compile}; do
    case $section in dmd-* | one-step | network | pipeline) wait "$making" ;; esac
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
"$PYTHON" docs/gpu.py table
echo "[all: $(($(date +%s) - begun)) s]"
