#!/bin/sh
# Stands for vLLM: vllm serve MODEL FLAGS --host H --port P. The API server is a simulated engine in this process, and
# EngineCore another process of its group, which outlives it, as a real one does. $LIFE is a folder: what each start is to
# do lies in its files 1, 2, …, by their words, or in file 0 for all others; what was started is in its log.
set -u
model=$2 name=$2 port=0 graphs=512 shares=0 sequences=256
while [ $# -gt 0 ]; do
	case $1 in
	--port) port=$2 ;;
	--served-model-name) name=$2 ;;
	--compilation-config) graphs=$(expr "$2" : '.*,\([0-9]*\)]}') ;;
	--enforce-eager) graphs=0 ;;
	--kv-cache-memory-bytes) shares=1 ;;
	--max-num-seqs) sequences=$2 ;;
	esac
	shift
done
n=$(($(wc -l <"$LIFE/log" 2>/dev/null || echo 0) + 1))
sleep 100000 >/dev/null 2>&1 &
core=$!
echo "$$ $core ${CUDA_VISIBLE_DEVICES:-none} $port" >>"$LIFE/log"
do=$(cat "$LIFE/$n" 2>/dev/null || cat "$LIFE/0" 2>/dev/null)
spec=None
case $do in speculates*) spec="SpeculativeConfig(method='ngram')" ;; esac # though no flag here says so
printf "(EngineCore pid=%s) INFO 11-28 05:55:16 [core.py:116] Initializing a V1 LLM engine (v0.26.0) with config: model='m', speculative_config=%s, %2100s 'max_cudagraph_capture_size': %s, 'x': 1}\n" $core "$spec" '' "$graphs"
echo "(EngineCore pid=$core) INFO 11-28 05:55:17 [gpu_model_runner.py:5040] Starting to load model $model..."
echo "(EngineCore pid=$core) INFO 11-28 05:55:18 [kv_cache_utils.py:1301] GPU KV cache size: 473,807 tokens"
case $do in
[a-z]*-with-our-graphs*) # one that does not start with large ones, nor with larger steps, nor beside another
	[ "$graphs" -le 512 ] && [ "$sequences" -le 1024 ] && [ "$shares" = 0 ] || { kill $core; cat "${do#* }"; exit 1; }
	;;
not-beside*) # one that does not start with a part of its card
	[ "$shares" = 0 ] || { kill $core; cat "${do#* }"; exit 1; }
	;;
says\ *) # a log, and the end of it all
	kill $core
	cat "${do#says }"
	exit 1
	;;
fails*) exit 0 ;; # as vLLM does, and EngineCore stays
killed*) kill -9 $$ ;;
quiet*) exec sleep 100000 ;;
mute*) # until somebody has looked at what answers at the port
	until [ -e "$LIFE/seen" ]; do sleep 0.02; done
	;;
stubborn*) # SIGTERM does not end it
	export STUBBORN=1
	;;
strays*) # one leaves the group
	setsid sleep 100000 >/dev/null 2>&1 &
	echo $! >"$LIFE/stray"
	;;
full*) # one whose card is full when the test says so
	$SIM "$port" "$name" {} &
	sim=$!
	until [ -e "$LIFE/full$n" ]; do sleep 0.02; done
	kill $core $sim
	cat "${do#full }"
	exit 1
	;;
orphans*) # one leaves the group, and its parent ends when it was seen
	sh -c 'setsid sleep 100000 >/dev/null 2>&1 & echo $! >"$LIFE/stray"; until grep -q "\"$!\":" "$RECORD"; do sleep 0.02; done'
	;;
esac
faults={}
case $do in *{*) faults="{${do#*\{}" ;; esac
echo "(APIServer pid=$$) INFO 11-28 05:55:19 [api_server.py:580] Starting vLLM server on http://127.0.0.1:$port"
exec $SIM "$port" "$name" "$faults"
