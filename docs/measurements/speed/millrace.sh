#!/usr/bin/env bash
# millrace.sh JOB OUT RECORD MODEL [flags of vllm]: one run of `millrace run --vllm`; appends to RECORD.
# $VLLM is the command of vLLM (default vllm), $MILLRACE that of millrace, $LABEL the name in the record, $MORE flags of millrace.
# $KEEP is a file for the log of vLLM, $CARD the name of the card for the record. With $ENGINE, that engine is used, and MODEL and the flags are for the record alone: cold_s is then without a start.
set -u
job=$1 out=$2 record=$3 model=$4; shift 4
state=$(mktemp -d)
trap '[ -z "${KEEP:-}" ] || find "$state" -name "*.log" -exec cp {} "$KEEP" \;; rm -rf "$state"' EXIT
if [ -n "${ENGINE:-}" ]; then engine=(--engine "$ENGINE"); else engine=(--vllm "$model" --vllm-command "${VLLM:-vllm}" -- --served-model-name m "$@"); fi
begin=$(date +%s.%N)
MILLRACE_DATA=$state timeout "${LIMIT:-500}" "${MILLRACE:-millrace}" run "$job" -o "$out" --again --json ${MORE:-} "${engine[@]}" > "$out.summary.json" 2> "$out.log" || tail -5 "$out.log"
end=$(date +%s.%N)
python3 -S - "$job" "${out%.jsonl}.manifest.json" "$record" "$begin" "$end" "${LABEL:-millrace}" "${CARD:-}" "$*" <<'P'
import datetime, json, os, sys
job, manifest, record, begin, end, label, card, flags = sys.argv[1:]
m = json.load(open(manifest))
s, e = m["statistics"], (m.get("engines") or [{}])[0]
last = datetime.datetime.fromisoformat(m["last_result"][:19] + "+00:00").timestamp()
with open(record, "a") as f:
    f.write(json.dumps({"card": card, "how": "millrace", "label": label, "job": os.path.basename(job), "lines": s["completed"], "in": s["total_input_tokens"], "out": s["total_output_tokens"],
                        "warm_s": round(s["duration"], 2), "cold_s": round(float(end) - float(begin), 2), "begin": round(last - s["duration"]),
                        **{k: e.get(k) for k in ("kv_tokens", "in_flight_limit", "full_share", "preemptions")},
                        "windows": s["windows"], "args": flags}) + "\n")
P
tail -1 "$record"
