package vllm

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Flags are those of `vllm serve` that the user gives, as words of a command line.
type Flags []string

// owned are flags that are not the user's to give, and what to do instead.
var owned = map[string]string{
	"--config":       "what it sets would not be seen here; give its flags behind -- themselves",
	"--host":         "the engine listens at 127.0.0.1 alone; leave it out",
	"--uds":          "the engine listens at a port of 127.0.0.1; leave it out",
	"--model":        "the model is what --vllm names",
	"--model-tag":    "the model is what --vllm names",
	"--api-key":      "give the key with --engine-api-key or --engine-api-key-file: everybody may read arguments",
	"--ssl-keyfile":  "the engine is spoken to without TLS, on this machine alone; leave it out",
	"--ssl-certfile": "the engine is spoken to without TLS, on this machine alone; leave it out",
	"--root-path":    "the engine is asked at its root; leave it out",
	"--headless":     "the engine must answer requests here; leave it out",
}

// Check refuses flags that are not the user's to give. The others go to vLLM as they are.
func (f Flags) Check() error {
	for _, word := range f {
		name, _, _ := strings.Cut(word, "=")
		if why, is := owned[spelt(name)]; is {
			return fmt.Errorf("%s behind -- cannot be used: %s", name, why)
		}
	}
	if _, ok := f.last("--port"); ok {
		if _, err := f.Port(); err != nil {
			return err
		}
	}
	if len(f) > 0 && !strings.HasPrefix(f[0], "-") {
		return fmt.Errorf("%q behind -- is no flag of vLLM; the model is what --vllm names", f[0])
	}
	return nil
}

// spelt is a flag as it is listed: vLLM takes _ for -.
func spelt(name string) string {
	if strings.HasPrefix(name, "--") {
		return strings.ReplaceAll(name, "_", "-")
	}
	return name
}

// values returns the words that follow the last use of a flag up to the next one, or what stands behind its =. The names
// are other spellings of it.
func (f Flags) values(names ...string) (vs []string, ok bool) {
	for i, word := range f {
		name, v, has := strings.Cut(word, "=")
		if !slices.Contains(names, spelt(name)) {
			continue
		}
		vs, ok = nil, true
		if has {
			vs = []string{v}
			continue
		}
		for _, next := range f[i+1:] {
			if strings.HasPrefix(next, "-") {
				break
			}
			vs = append(vs, next)
		}
	}
	return vs, ok
}

func (f Flags) last(names ...string) (string, bool) {
	vs, ok := f.values(names...)
	if len(vs) == 0 {
		return "", ok
	}
	return vs[0], ok
}

// Port is the one that the user wants; 0: any.
func (f Flags) Port() (int, error) {
	v, ok := f.last("--port")
	if !ok {
		return 0, nil
	}
	port, err := strconv.Atoi(v)
	if err != nil || port < 1 || port > 65535 {
		return 0, fmt.Errorf("--port behind -- is %q, must be a number from 1 to 65535", v)
	}
	return port, nil
}

// given are the user's flags without --port, which is given by Server.Port.
func (f Flags) given() []string {
	var out []string
	skip := false
	for _, word := range f {
		if skip {
			skip = false
			continue
		}
		if name, _, has := strings.Cut(word, "="); spelt(name) == "--port" {
			skip = !has
			continue
		}
		out = append(out, word)
	}
	return out
}

// Shown are the flags as others may see them: without a token for the hub of models.
func (f Flags) Shown() []string {
	out := f.given()
	for i, word := range out {
		if name, _, has := strings.Cut(word, "="); spelt(name) != "--hf-token" {
			continue
		} else if has {
			out[i] = name + "=xxxxx"
		} else if i+1 < len(out) && !strings.HasPrefix(out[i+1], "-") {
			out[i+1] = "xxxxx"
		}
	}
	return out
}

// brief is a list of them for people, without values that are long.
func (f Flags) brief() string {
	var out []string
	for _, word := range f {
		if strings.HasPrefix(word, "--") {
			out = append(out, word)
		} else if len(word) < 20 {
			out[len(out)-1] += " " + word
		}
	}
	return strings.Join(out, ", ")
}

// GPUs is how many GPUs one engine takes: those over which its layers and its copies are spread.
func (f Flags) GPUs() (int, error) {
	n := 1
	for _, names := range [][]string{{"--tensor-parallel-size", "-tp"}, {"--pipeline-parallel-size", "-pp"}, {"--data-parallel-size", "-dp"},
		{"--prefill-context-parallel-size", "-pcp"}} {
		v, ok := f.last(names...)
		if !ok {
			continue
		}
		k, err := strconv.Atoi(v)
		if err != nil || k < 1 {
			return 0, fmt.Errorf("%s behind -- is %q, must be a positive number", names[0], v)
		}
		n *= k
	}
	return n, nil
}

// Sequences is how many a server runs at once, where the flags say so; 0: they do not. Each copy of the model runs as many.
func (f Flags) Sequences() int64 {
	v, _ := f.last("--max-num-seqs")
	copies, ok := f.last("--data-parallel-size", "-dp")
	if !ok {
		copies = "1"
	}
	n, err1 := strconv.ParseInt(v, 10, 32)
	k, err2 := strconv.ParseInt(copies, 10, 32)
	if err1 != nil || err2 != nil || n < 1 || k < 1 {
		return 0
	}
	return n * k
}

// has says whether any of some flags is there.
func (f Flags) has(names ...string) bool {
	_, ok := f.values(names...)
	return ok
}

// Names are the names under which a model will be served; none where that cannot be told before.
func (f Flags) Names(model string) []string {
	if f.has("--lora-modules") {
		return nil
	}
	return f.names(model)
}

// names are those of which a server that is up lists one.
func (f Flags) names(model string) []string {
	if vs, ok := f.values("--served-model-name"); ok {
		return vs
	}
	return []string{model}
}
