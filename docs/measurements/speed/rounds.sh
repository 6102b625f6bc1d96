#!/usr/bin/env bash
# rounds.sh DIR ROUNDS MODEL "LINES PROMPT LEAST MOST" [flags of vllm]: millrace, run-batch and LLM.generate in turn on one card, ROUNDS
# times, after two starts of each that compile what they need: the second finds the model compiled and compiles its Triton kernels
# once more. Records go to DIR/rounds.jsonl, those of the starts before to DIR/first.jsonl, and looks at the machine to DIR/looks.csv.
# The shape is as lines.py takes it. $GPU is the number of the card (0), $SIZES the server's sizes for run-batch, $WAYS what to run
# (mr rb gen), $VLLM, $MILLRACE and $CARD as for millrace.sh. With --load-format dummy millrace knows the size of a model by a file
# in its folder: truncate -s 2471645608 MODEL/model.safetensors for Llama 3.2 1B.
set -u
dir=$1 rounds=$2 model=$3 shape=$4; shift 4
here=$(cd "$(dirname "$0")" && pwd)
sizes=${SIZES:---max-num-seqs 1024 --max-num-batched-tokens 8192} gpu=${GPU:-0}
mkdir -p "$dir"
read -r lines rest <<< "$shape"
python3 -S "$here/lines.py" "$dir/job.jsonl" "$lines" $rest 1
python3 -S "$here/lines.py" "$dir/warm.jsonl" 2000 $rest 2 # as many as two servers on a card are started for
python3 -S "$here/lines.py" "$dir/few.jsonl" 300 $rest 3
python3 -S "$here/busy.py" "$dir/looks.csv" & looks=$!
trap 'kill $looks' EXIT
once() { # WAY JOB RECORD
	case $1 in
	mr) LABEL=millrace KEEP=$dir/vllm.log MORE="--gpus $gpu" bash "$here/millrace.sh" "$2" "$dir/out.jsonl" "$3" "$model" "${flags[@]}" ;;
	rb) LABEL="run-batch, the server's sizes" CUDA_VISIBLE_DEVICES=$gpu bash "$here/run_batch.sh" "$2" "$dir/out.jsonl" "$3" "$model" "${flags[@]}" $sizes ;;
	gen) LABEL=LLM.generate CUDA_VISIBLE_DEVICES=$gpu python3 "$here/generate.py" "$2" "$dir/few.jsonl" "$dir/out.jsonl" "$3" "$model" > "$dir/generate.log" 2>&1 ;;
	esac
	rm -f "$dir"/out.*
}
flags=("$@")
for way in ${WAYS:-mr rb gen}; do
	once "$way" "$dir/warm.jsonl" "$dir/first.jsonl"
	once "$way" "$dir/warm.jsonl" "$dir/first.jsonl"
done
for ((i = 0; i < rounds; i++)); do
	for way in ${WAYS:-mr rb gen}; do
		once "$way" "$dir/job.jsonl" "$dir/rounds.jsonl"
	done
done
