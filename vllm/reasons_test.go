package vllm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"millrace/vllm"
)

// published are lines that could not be provoked on a CPU, and who published them. The files in testdata/reasons are what
// vLLM 0.32.0 said on one.
var published = []struct{ name, source, line string }{
	{"memory", "vllm-project/vllm issue 20581", `(VllmWorker rank=5 pid=50999) ERROR 07-07 15:19:48 [multiproc_executor.py:492] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 5 has a total capacity of 79.25 GiB of which 1.79 GiB is free.`},
	{"memory", "vllm-project/vllm issue 16343", `torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 350.00 MiB. GPU 0 has a total capacity of 23.68 GiB of which 212.81 MiB is free.`},
	{"memory in use", "vllm-project/vllm issue 25837", `(EngineCore_DP0 pid=17374) ERROR 09-28 15:47:24 [core.py:718] ValueError: Free memory on device (3.22/4.0 GiB) on startup is less than desired GPU memory utilization (0.9, 3.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.`},
	{"memory in use", "pytorch/pytorch issue 175666", `ValueError: Free memory on device cuda:0 (19.77/22.05 GiB) on startup is less than desired GPU memory utilization (0.9, 19.84 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.`},
	{"context", "vLLM 0.6, worker/worker.py", "ValueError: The model's max seq len (32768) is larger than the maximum number of tokens that can be stored in KV cache (22032). Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine."},
	{"context", "vllm-project/vllm issue 25350", "ValueError: To serve at least one request with the models's max seq len (221000), (10.12 GiB KV cache is needed, which is larger than the available KV cache memory (5.59 GiB). Based on the available memory, the estimated maximum model length is 122080. Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine."},
	{"gated", "huggingface_hub, as in hyperonym/basaran and kyegomez/NeoSapiens issue 3", `huggingface_hub.utils._errors.GatedRepoError: 401 Client Error. (Request ID: Root=1-661471eb)`},
	{"gated", "transformers, as in zylon-ai/private-gpt issue 1985", `OSError: You are trying to access a gated repo.`},
	{"model", "vast-ai/base-image issue 128", `huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-69aa2f29)`},
	{"model", "vllm-project/vllm-ascend issue 135", `huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/models/DeepSeek-V2-Lite'. Use 'repo_type' argument if needed.`},
	{"model", "transformers utils/hub.py", `OSError: nosuch/model is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'`},
	{"network", "transformers utils/hub.py", `OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.`},
	{"driver", "serend1p1ty/SeqNet issue 36", `RuntimeError: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver`},
	{"driver", "bentoml/OpenLLM issue 746", `RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from http://www.nvidia.com/Download/index.aspx`},
	{"driver", "vLLM 0.32.0, config/device.py", `RuntimeError: Failed to infer device type, please set the environment variable VLLM_LOGGING_LEVEL=DEBUG to turn on verbose logging to help debug the issue.`},
	{"type", "vllm-project/vllm issue 1157", `ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has compute capability 7.5.`},
	{"custom code", "vLLM 0.32.0, tokenizers/hf.py", "RuntimeError: Failed to load the tokenizer. If the tokenizer is a custom tokenizer not yet available in the HuggingFace transformers library, consider setting `trust_remote_code=True` in LLM or using the `--trust-remote-code` flag in the CLI."},
	{"port", "vllm-project/vllm issue 7514", `ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 8000): address already in use`},
	{"command", "Python", `/usr/bin/python3: No module named vllm`},
	{"core", "vLLM 0.32.0, EngineCore killed", `(APIServer pid=12817) ERROR 11-28 06:21:36 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.`},
	{"disk", "the system", `OSError: [Errno 28] No space left on device`},
}

// mended are reasons that another try may find gone.
var mended = []string{"network", "memory in use", "memory", "machine memory", "port", "disk", "core"}

func TestReasons(t *testing.T) {
	seen := map[string]bool{}
	check := func(want, source string, lines []string) {
		t.Helper()
		name, said, final := vllm.Recognise(lines)
		seen[name] = true
		again := false
		for _, m := range mended {
			again = again || m == name
		}
		if name != want || final == again || strings.Contains(said, "\n") || strings.Contains(said, "pid=") {
			t.Errorf("%s: %q, final %t, want %q: %s", source, name, final, want, said)
		}
	}
	for _, p := range published {
		check(p.name, p.source, []string{"Traceback (most recent call last):", p.line, "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"})
	}
	files, err := filepath.Glob("testdata/reasons/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		want, _, _ := strings.Cut(strings.TrimSuffix(filepath.Base(file), ".txt"), "-")
		if strings.HasSuffix(file, "context-above-the-model.txt") {
			want = "context above the model's"
		}
		if strings.HasSuffix(file, "custom-code.txt") {
			want = "custom code"
		}
		if strings.HasSuffix(file, "machine-memory.txt") {
			want = "machine memory"
		}
		check(want, file, strings.Split(string(b), "\n"))
	}
	for _, name := range vllm.Reasons() {
		if !seen[name] {
			t.Errorf("no text for %q", name)
		}
	}
}

// TestReasonNamesLength: where vLLM says how long a context the KV cache holds, that is the one to give.
func TestReasonNamesLength(t *testing.T) {
	hints := map[string]string{"(221000)": "; give -- --max-model-len 122080, or a larger --gpu", "(32768)": "; give -- --max-model-len 22032, or a larger --gpu"}
	for _, p := range published {
		for seq, want := range hints {
			if _, said, _ := vllm.Recognise([]string{p.line}); strings.Contains(p.line, "max seq len "+seq) && !strings.Contains(said, want) {
				t.Errorf("%s: %s", p.source, said)
			} else if strings.Contains(said, want) {
				delete(hints, seq)
			}
		}
	}
	if len(hints) > 0 {
		t.Errorf("not said: %v", hints)
	}
}

// TestNoReason: what an engine says while it is well, its flags among it, gives no reason.
func TestNoReason(t *testing.T) {
	for _, line := range []string{
		`(APIServer pid=101) INFO 11-28 05:53:21 [api_utils.py:286] non-default args: {'model': 'm', 'trust_remote_code': True, 'tensor_parallel_size': 2}`,
		`(APIServer pid=101) WARNING 11-28 05:53:21 [system_utils.py:255] Found ulimit of 20000 and failed to automatically increase with error current limit exceeds maximum limit. This can cause fd limit errors like 'OSError: [Errno 24] Too many open files'. Consider increasing with ulimit -n`,
		`(EngineCore pid=101) WARNING 11-28 05:55:00 [parallel.py:746] Address already in use. Retrying with a new port.`,
		`(EngineCore pid=101) INFO 11-28 05:55:17 [gpu_worker.py:1013] Free memory on device (78.6/79.2 GiB) on startup. Desired GPU memory utilization is (0.92, 72.9 GiB).`,
		`RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}`,
	} {
		if name, said, _ := vllm.Recognise([]string{line}); name != "" {
			t.Errorf("%s: %s", name, said)
		}
	}
}
