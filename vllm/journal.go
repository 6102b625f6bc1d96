package vllm

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// journal keeps what a server says: in a file of limited size with one older file beside it, and the last lines here. The
// file has one user at a time: who opened it until copy, which closes it, or close.
type journal struct {
	name    string
	f       *os.File
	size    int64
	written chan struct{} // closed when copy has written all

	mu    sync.Mutex
	lines []string // the last ones that are no access log
	at    time.Time
	stage string
	kv    int64 // tokens of the KV cache; 0: it did not say

	graphs int64 // as Server.Graphs; 0: it did not say
}

const (
	journalSize = 16 << 20
	tailLines   = 600
	lineSize    = 2000 // of a line that is kept here
	pagesAhead  = 64   // of 32 KiB, that a slow disk may be behind
)

func openJournal(name string) (*journal, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open vLLM's log: %w; choose another --data", err)
	}
	j := &journal{name: name, f: f, at: time.Now(), written: make(chan struct{})}
	if st, err := f.Stat(); err == nil {
		j.size = st.Size()
	}
	return j, nil
}

// close is for a journal that nothing is copied to.
func (j *journal) close() { j.f.Close() }

// note writes a line of ours into the file.
func (j *journal) note(s string) {
	j.write(fmt.Appendf(nil, "--- millrace %s: %s\n", time.Now().UTC().Format(time.RFC3339), s))
}

// copy takes in what the server says until it can say no more. The file may end later, see written: neither the server
// nor who looks at what it said last waits for a disk. What that does not take in time is not in the file.
func (j *journal) copy(r io.Reader) {
	pages := make(chan []byte, pagesAhead)
	defer close(pages)
	go func() {
		defer close(j.written)
		defer j.f.Close()
		for b := range pages {
			j.write(b)
		}
	}()
	var part []byte
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		select {
		case pages <- slices.Clone(buf[:n]):
		default:
		}
		part = append(part, buf[:n]...)
		for {
			i := bytes.IndexAny(part, "\r\n") // progress bars end their lines so
			if i < 0 {
				break
			}
			j.take(part[:i])
			part = part[i+1:]
		}
		if len(part) > 1<<20 {
			part = part[:0]
		}
		if err != nil {
			j.take(part)
			return
		}
	}
}

// write appends to the file. What the disk does not take is lost.
func (j *journal) write(b []byte) {
	if j.size+int64(len(b)) > journalSize && j.size > 0 {
		j.turn()
	}
	n, _ := j.f.Write(b) // see above
	j.size += int64(n)
}

// turn begins a new file.
func (j *journal) turn() {
	if os.Rename(j.name, j.name+".1") != nil {
		return
	}
	f, err := os.OpenFile(j.name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return // the old file goes on, under its new name
	}
	j.f.Close()
	j.f, j.size = f, 0
}

// access is a line of uvicorn's access log: it says who asked, which may be we, and nothing of the server.
var access = regexp.MustCompile(`"[A-Z]+ \S+ HTTP/\d(?:\.\d)?" \d{3}\b`)

// take looks at one line.
func (j *journal) take(b []byte) {
	line := strings.TrimRight(string(b[:min(len(b), lineSize)]), " \t\r\n")
	if line == "" || access.MatchString(line) {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if n := len(j.lines); n == 0 || j.lines[n-1] != line {
		j.at = time.Now()
	}
	j.lines = append(j.lines, line)
	if len(j.lines) > 2*tailLines {
		j.lines = slices.Delete(j.lines, 0, tailLines)
	}
	for _, s := range stages {
		if strings.Contains(line, s.has) {
			j.stage = s.is
		}
	}
	if m := kvSize.FindStringSubmatch(line); m != nil {
		j.kv, _ = strconv.ParseInt(strings.ReplaceAll(m[1], ",", ""), 10, 64) // digits, as the pattern says
	}
	if m := graphSize.FindSubmatch(b); m != nil { // far back in a long line
		j.graphs = -1
		if n, _ := strconv.ParseInt(string(m[1]), 10, 64); n > 0 && !speculates.Match(b) {
			j.graphs = n
		}
	}
}

// kvSize is how vLLM says the capacity of its KV cache (v1/core/kv_cache_utils.py); on a CPU, too.
var kvSize = regexp.MustCompile(`KV cache size: ([\d,]+) tokens`)

// graphSize is how vLLM says the tokens of its largest CUDA graph, among all of its settings (v1/engine/core.py).
var graphSize = regexp.MustCompile(`'max_cudagraph_capture_size': (\d+)`)

// speculates is what the same line says where a sequence has more than one token in a step (config/vllm.py).
var speculates = regexp.MustCompile(`speculative_config=(?:[^N]|N[^o])`)

// stages are what vLLM 0.26 to 0.32 says while it loads: v1/worker/gpu_model_runner.py, model_executor/model_loader,
// compilation/backends.py, entrypoints/launchers.
var stages = []struct{ has, is string }{
	{"Fetching ", "fetching the model"},
	{"Starting to load model", "loading weights"},
	{"Loading safetensors checkpoint shards", "loading weights"},
	{"Model loading took", "weights are loaded"},
	{"Dynamo bytecode transform", "compiling"},
	{"Compiling a graph", "compiling"},
	{"KV cache size", "KV cache is there"},
	{"Capturing CUDA graphs", "capturing CUDA graphs"},
	{"Starting vLLM", answers},
}

const answers = "about to answer"

// last is when something new was said.
func (j *journal) last() time.Time {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.at
}

func (j *journal) phase() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.stage
}

// told returns the capacity of the KV cache and the size of the largest CUDA graph in tokens, see Server.
func (j *journal) told() (kv, graphs int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.kv, j.graphs
}

// tail returns the last lines.
func (j *journal) tail() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(lastOf(j.lines, tailLines))
}

// telling are the last few lines that are more than information: what a traceback says, not where, if there is any such line.
func telling(lines []string) []string {
	lines = slices.DeleteFunc(lines, func(s string) bool { return strings.Contains(s, "INFO") || strings.Contains(s, "WARNING") })
	where := func(s string) bool { return frame.MatchString(prefix.ReplaceAllString(s, "")) }
	if said := slices.DeleteFunc(slices.Clone(lines), where); len(said) > 0 {
		lines = said
	}
	return lastOf(lines, 10)
}

// frame is a line of a traceback that says where, without what vLLM puts before it.
var frame = regexp.MustCompile(`^(?:\s|$|Traceback \(most recent call last\)|During handling of the above|The above exception was|Process \S+:$)`)

func lastOf(lines []string, n int) []string { return lines[max(0, len(lines)-n):] }

// loading says how far a server is that starts, and why it does so again; cause is empty the first time. The time comes in
// steps: who reads it sees a new line for each.
func loading(took time.Duration, phase, cause string) string {
	step := 10 * time.Second
	if took >= time.Minute {
		step = 30 * time.Second
	}
	s := "vLLM is starting"
	if cause != "" {
		s += " again after " + ended[cause]
	}
	if took = took.Truncate(step); took > 0 {
		s += " (" + short(took) + ")"
	}
	if phase != "" {
		s += ": " + phase
	}
	return s
}

func short(d time.Duration) string {
	d = d.Round(time.Second)
	if d >= time.Minute && d%time.Minute == 0 {
		return fmt.Sprintf("%d min", int(d.Minutes()))
	}
	if d >= time.Minute {
		return fmt.Sprintf("%d min %d s", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%d s", int(d.Seconds()))
}
