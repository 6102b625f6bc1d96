package vllm

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"regexp"
	"strings"

	"millrace/proto"
)

// reason is something that a dead server's log can say.
type reason struct {
	name   string
	line   *regexp.Regexp
	what   string         // for people
	hint   string         // what to do
	number *regexp.Regexp // finds a number to do it with, which takes the place of "N with fewer tokens" in hint; nil: there is none
	final  bool           // where the server never came up, a restart would not mend it
	passes bool           // it may mend itself
	cause  string         // of the restart; empty: by how it ended
}

// reasons is searched from the top: a line that says more comes before one that follows from it. In brackets, who says
// so: files are vLLM's, as of 0.32.0 where nothing else is named. testdata/reasons has the texts.
var reasons = []reason{
	{name: "command", // Python's -m, shells
		line: rx(`No module named '?vllm|exec: .*vllm.*not found|vllm: (command )?not found`),
		what: "vLLM is not installed where --vllm-command looks", hint: notInstalled, final: true},
	{name: "flag", // argparse: utils/argparse_utils.py, entrypoints/cli/serve.py
		line: rx(`(?:^|\s)vllm[^:]*: error: (?:unrecognized arguments|argument|ambiguous option|the following arguments)`),
		what: "vLLM does not take its flags", hint: "correct what stands behind --; `vllm serve --help=all` lists what this version takes", final: true},
	{name: "gated", // huggingface_hub 0.2x to 1.x, errors.py: GatedRepoError; transformers utils/hub.py
		line: rx(`[Cc]annot access gated repo|GatedRepoError|access a gated repo`),
		what: "the model is gated", hint: "ask for access on its page at huggingface.co, and give HF_TOKEN in the environment", final: true},
	{name: "custom code", // transformers dynamic_module_utils.py; transformers_utils/config.py, tokenizers/hf.py
		line: rx(`contains custom code which must be executed|requires you to execute the (?:configuration|tokenizer|model) file|using the\s+.?--trust-remote-code`),
		what: "the model brings code of its own", hint: "read that code, and if you trust it give -- --trust-remote-code", final: true},
	{name: "architecture", // model_executor/models/registry.py; transformers models/auto/configuration_auto.py
		line: rx(`[Mm]odel architectures? .* (?:is|are) not supported|does not recognize this architecture|[Nn]o supported (?:config|architecture)`),
		what: "this version of vLLM does not know the model's architecture", hint: "upgrade vLLM and transformers, or take another model", final: true},
	{name: "tokenizer", // transformers tokenization_utils_tokenizers.py, tokenization_auto.py; tokenizers/hf.py
		line: rx(`Couldn't instantiate the backend tokenizer|Can't load tokenizer for|Failed to load the tokenizer|Tokenizer class \S+ does not exist|Unable to load tokenizer|[Ee]rror.*while deserializing.*tokenizer`),
		what: "the model's tokenizer cannot be loaded", hint: "see that the model's folder has its tokenizer files whole, or name another one with -- --tokenizer", final: true},
	{name: "offline", // huggingface_hub _snapshot_download.py: LocalEntryNotFoundError under HF_HUB_OFFLINE
		line: rx(`outgoing traffic has been disabled`),
		what: "the model is not on this machine, and downloads are switched off", hint: "check the name or folder of --vllm; unset HF_HUB_OFFLINE to have it downloaded", final: true},
	{name: "network", // transformers utils/hub.py; huggingface_hub file_download.py
		line: rx(`[Cc]ouldn't connect to '?https?://\S*huggingface|cannot find the requested files in the (?:local|disk) cache|Failed to resolve 'huggingface`),
		what: "the model cannot be downloaded", hint: "see that this machine reaches huggingface.co, or name a folder; it is tried again", passes: true},
	{name: "model", // transformers_utils/config.py; transformers utils/hub.py; huggingface_hub utils/_validators.py, errors.py
		line: rx(`Invalid repository ID or local directory specified|is not a local folder and is not a valid model identifier|HFValidationError|Repo id must|RepositoryNotFoundError|Repository Not Found|[Ee]ntry ?[Nn]ot ?[Ff]ound.*config\.json|Cannot find any model weights`),
		what: "there is no such model", hint: "check the name or folder of --vllm: a folder has config.json and the weights in it, a private model needs HF_TOKEN in the environment", final: true},
	{name: "context above the model's", // config/model.py
		line: rx(`max_model_len .*is greater than the derived max_model_len`),
		what: "--max-model-len is more than the model has", hint: "give less behind --", final: true},
	{name: "context", // v1/core/kv_cache_utils.py; in 0.6 and 0.7 worker/worker.py: "larger than the maximum number of tokens that can be stored in KV cache"
		line: rx(`max seq len.*(?:larger than the (?:maximum|available))`),
		what: "the KV cache does not hold one request of the model's whole context", hint: "give -- --max-model-len N with fewer tokens, or a larger --gpu-memory-utilization", final: true,
		number: rx(`(?:estimated maximum model length is |that can be stored in KV cache \()([1-9]\d*)`)},
	{name: "cache", // v1/core/kv_cache_utils.py
		line: rx(`No available memory for the cache blocks`),
		what: "the model leaves no GPU memory for the KV cache", hint: "give a larger -- --gpu-memory-utilization, a quantized model, or more GPUs with --tensor-parallel-size", final: true},
	{name: "memory in use", // v1/worker/utils.py, request_memory
		line: rx(`Free memory on device .* less than (?:desired GPU memory utilization|the engine's budget)`),
		what: "other programs have the GPU's memory", hint: "end them (nvidia-smi lists them), or give a smaller -- --gpu-memory-utilization", cause: CauseOOM},
	{name: "memory", // torch c10/cuda/CUDACachingAllocator.cpp: vllm issues 16343, 11560; v1/worker/gpu_model_runner.py
		line: rx(`(?:CUDA|HIP|XPU) out of memory|OutOfMemoryError|CUDA error: out of memory`),
		what: "the GPU's memory is full", hint: "give a smaller -- --gpu-memory-utilization, --max-num-seqs or --max-model-len", cause: CauseOOM},
	{name: "machine memory", // v1/worker/cpu_worker.py
		line: rx(`Available memory on node .* less than desired CPU memory utilization`),
		what: "other programs have the machine's memory", hint: "end them, or give a smaller -- --gpu-memory-utilization, which is of the machine's memory for vLLM on a CPU", cause: CauseOOM},
	{name: "driver", // torch aten/src/ATen/cuda, c10/cuda; config/device.py
		line: rx(`Found no NVIDIA driver|NVIDIA driver on your system is too old|CUDA driver version is insufficient|No CUDA GPUs are available|no CUDA-capable device|Failed to infer device type|invalid device ordinal`),
		what: "vLLM finds no GPU that it can use", hint: "see what nvidia-smi says, that --gpus names GPUs that are there, and that the driver is new enough for this vLLM", final: true},
	{name: "parallel", // config/model.py; config/parallel.py, executor
		line: rx(`must be divisible by tensor parallel size|World size .* is larger than the number of available GPUs|not enough GPUs|World size .* (?:number of available|exceeds)`),
		what: "the model cannot be spread over that many GPUs", hint: "give another -- --tensor-parallel-size, or more --gpus", final: true},
	{name: "type", // platforms/cuda.py
		line: rx(`is only supported on GPUs with compute capability|not supported on GPUs? with compute capability|Minimum capability`),
		what: "the GPU does not have this number format", hint: "give -- --dtype half, or another model", final: true},
	{name: "port", // asyncio, uvicorn: vllm issues 7514, 9737
		line: rx(`\[Errno (?:98|48)\]|error while attempting to bind on address`),
		what: "its port is taken", hint: "another program listens there; it is tried again", passes: true},
	{name: "disk", // the system
		line: rx(`No space left on device|Errno 28\b`),
		what: "a disk is full", hint: "make room where models are kept (HF_HOME) and in /tmp and /dev/shm"},
	{name: "core", // v1/engine/exceptions.py, v1/engine/core_client.py, v1/executor/multiproc_executor.py; it says no more
		line: rx(`EngineDeadError: |Engine core proc \S+ died unexpectedly|Worker proc \S+ died unexpectedly`),
		what: "its EngineCore or a worker of it ended", hint: "its log may say why; the system kills processes when the machine's memory is short (see dmesg)"},
}

const notInstalled = "install it (pip install vllm), put it into PATH, or say with --vllm-command how it is called"

func rx(s string) *regexp.Regexp { return regexp.MustCompile(s) }

// recognise finds the first reason of the table that the last lines of a log give, and the line that does; nil: none.
func recognise(lines []string) (*reason, string) {
	for i := range reasons {
		for n := len(lines) - 1; n >= 0; n-- {
			if reasons[i].line.MatchString(lines[n]) {
				return &reasons[i], lines[n]
			}
		}
	}
	return nil, ""
}

// prefix is what vLLM puts before its lines: process, level, time, place in the source. What follows keeps its indentation.
var prefix = regexp.MustCompile(`^(?:\([^()]*pid=\d+[^)]*\) ?)?(?:\s*(?:ERROR|WARNING|INFO|CRITICAL) \S+ \S+ \[\S+\] ?)?`)

// say says the reason in one line, with vLLM's own words and what to do.
func (r *reason) say(line string) string {
	hint := r.hint
	if r.number != nil {
		if m := r.number.FindStringSubmatch(line); m != nil {
			hint = strings.Replace(hint, "N with fewer tokens", m[1], 1)
		}
	}
	return r.words(line) + "; " + hint
}

// words are the reason and vLLM's own words.
func (r *reason) words(line string) string {
	line = strings.TrimSpace(prefix.ReplaceAllString(line, ""))
	return fmt.Sprintf("%s (%s)", r.what, proto.Truncate(line, 200))
}

// portTaken is the error of a server whose port somebody else has.
type portTaken int

func (p portTaken) Error() string {
	return fmt.Sprintf("its port %d is taken: another program listens there; give another -- --port, or none", int(p))
}

// notRun is the error of a command that could not be run.
type notRun struct{ error }

func (n notRun) Unwrap() error { return n.error }

// notStarted is the end of a server whose process could not be started.
func notStarted(command string, err error) ending {
	e := ending{cause: CauseStartFailed, final: true, why: fmt.Sprintf("engine does not start: %v", err)}
	if taken := portTaken(0); errors.As(err, &taken) {
		e.final, e.passes = false, true
	}
	if errors.As(err, new(notRun)) && (errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist)) {
		e.why = fmt.Sprintf("engine does not start: there is no command %s; %s", cmp.Or(command, `""`), notInstalled)
	}
	return e
}
