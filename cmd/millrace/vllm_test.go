//go:build vllm && linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"millrace/aggregator"
	"millrace/proto"
)

// A job on the real engine. Its text is random, so it is the counts that tie an answer to its line: a byte is a token,
// and no two lines have as many bytes; and each answer has exactly as many tokens as its line asked for.
const (
	realLines    = 520 // that the engine answers
	realFailing  = 12  // that it refuses
	shortest     = 64  // tokens of a prompt
	chatTemplate = 18  // tokens that the chat template adds to one user message
	mostTokens   = 120 // of an answer
)

// promptTokens and maxTokens are those of line i.
func promptTokens(i int) int { return shortest + i }
func maxTokens(i int) int    { return mostTokens - i*31%97 }

// refusals are bodies that a real engine refuses for good, and how their error lines look.
var refusals = []struct{ url, body, status, has string }{
	{"/v1/chat/completions", `{"model":"tiny","messages":[{"role":"user","content":"` + strings.Repeat("long ", 500) + `"}]}`, "400", `"param":"input_tokens"`},
	{"/v1/completions", `{"model":"tiny","prompt":"` + strings.Repeat("long ", 600) + `","max_tokens":4}`, "400", `maximum context length is 2048`},
	{"/v1/chat/completions", `{"model":"tiny","messages":[{"role":"user","content":"Hi"}],"temperature":9}`, "400", `temperature must be in [0, 2]`},
	{"/v1/completions", `{"model":"tiny","prompt":"Hi","max_tokens":5000}`, "400", `"param":"max_tokens"`},
	{"/v1/chat/completions", `{"model":"tiny","messages":[{"role":"user","content":"Hi"}],"tools":[{"type":"function","function":{"name":"f"}}]}`, "400", `tool choice requires`},
	{"/v1/embeddings", `{"model":"tiny","input":"Hi"}`, "404", `{"detail":"Not Found"}`},
}

// realJob writes the input of the main job.
func realJob(t *testing.T) (string, want) {
	t.Helper()
	var b bytes.Buffer
	w := want{hash: map[string]string{}}
	line := func(id, url, body string) {
		fmt.Fprintf(&b, `{"custom_id":%q,"method":"POST","url":%q,"body":%s}`+"\n", id, url, body)
		w.hash[id] = id
		w.lines++
	}
	for i := range realLines {
		id := fmt.Sprintf("line-%d", i)
		n := promptTokens(i)
		if i%2 == 0 {
			n -= chatTemplate
		}
		text := fmt.Sprintf("%04d", i) + strings.Repeat(" and the mill race runs", n/23+1)
		if i%2 == 0 {
			line(id, "/v1/chat/completions", fmt.Sprintf(`{"model":"tiny","messages":[{"role":"user","content":%q}],"max_tokens":%d,"ignore_eos":true}`, text[:n], maxTokens(i)))
		} else {
			line(id, "/v1/completions", fmt.Sprintf(`{"model":"tiny","prompt":%q,"max_tokens":%d,"ignore_eos":true}`, text[:n], maxTokens(i)))
		}
		if i%40 == 20 && i/40 < realFailing {
			r := refusals[i/40%len(refusals)]
			line(fmt.Sprintf("refused-%d", i/40), r.url, r.body)
		}
	}
	name := filepath.Join(t.TempDir(), "requests.jsonl")
	if err := os.WriteFile(name, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return name, w
}

// ownAnswer says whether an answer is the one to the line of that id.
func ownAnswer(id string, l *proto.OutputLine) bool {
	var i int
	if n, err := fmt.Sscanf(id, "line-%d", &i); n != 1 || err != nil {
		return false
	}
	var a struct {
		ID      string `json:"id"`
		Object  string `json:"object"`
		Model   string `json:"model"`
		Choices []struct {
			Finish string `json:"finish_reason"`
		} `json:"choices"`
	}
	if json.Unmarshal(l.Response.Body, &a, jsontext.AllowInvalidUTF8(true)) != nil {
		return false
	}
	object := "chat.completion"
	if i%2 == 1 {
		object = "text_completion"
	}
	u := proto.ReadUsage(l.Response.Body)
	return a.Object == object && a.Model == "tiny" && a.ID == l.Response.RequestID && len(a.Choices) == 1 && a.Choices[0].Finish == "length" &&
		u.Prompt == int64(promptTokens(i)) && u.Completion == int64(maxTokens(i))
}

// realRun is one job on the real engine.
type realRun struct {
	*fleet
	engine   *realVLLM
	input    string
	want     want
	metrics  string // base URL of the worker's metrics
	job      *proc
	files    aggregator.Files
	base     samples // of the engine, before the job
	answered tokens  // by engines that have died
	seen     samples // of an engine, before it died
	slack    tokens  // that the engine may have counted for requests that were broken off
}

type tokens struct{ prompt, completion int64 }

func engineTokens(s samples) tokens {
	return tokens{s.sum("vllm:prompt_tokens_total"), s.sum("vllm:generation_tokens_total")}
}

func (a tokens) plus(b tokens) tokens {
	return tokens{a.prompt + b.prompt, a.completion + b.completion}
}
func (a tokens) minus(b tokens) tokens {
	return tokens{a.prompt - b.prompt, a.completion - b.completion}
}

func newRealRun(t *testing.T, e *realVLLM) *realRun {
	t.Helper()
	e.start(t)
	r := &realRun{fleet: newFleet(t), engine: e, metrics: freePort(t)}
	r.input, r.want = realJob(t)
	if r.base = scrape(e.url()); r.base == "" {
		t.Fatal("the engine has no metrics")
	}
	return r
}

// spread starts the job over separate processes; queues starts broker and aggregator.
func (r *realRun) spread(queues func()) {
	queues()
	r.start("worker", "worker", "--engine", r.engine.url(), "--data", r.path("worker"), "--concurrency", "48", "--metrics-addr", r.metrics)
	r.job = r.start("producer", "produce", r.input, "--data", r.path("producer"))
}

func (r *realRun) serve() {
	r.start("serve", "serve", "--addr", r.addr, "--data", r.path("serve"), "--output", r.path("out")).says("broker ready")
}

// run starts the job in one process.
func (r *realRun) run() {
	base := r.path("results")
	r.files = aggregator.Files{Output: base + ".jsonl", Errors: base + ".errors.jsonl", Manifest: base + ".manifest.json"}
	r.job = r.start("run", "run", r.input, "--engine", r.engine.url(), "--data", r.path("data"), "-o", r.files.Output, "--metrics-addr", r.metrics)
}

func (r *realRun) worker() samples { return scrape("http://" + r.metrics) }

// midway waits until the engine works on lines and has answered others.
func (r *realRun) midway() {
	r.t.Helper()
	poll(r.t, "lines are answered and others are in flight", func() bool {
		r.seen = scrape(r.engine.url())
		w := r.worker()
		return r.seen.sum("vllm:num_requests_running") >= 16 && w.sum("millrace_inflight_requests") >= 16 &&
			w.sum("millrace_worker_requests_total", `outcome="ok"`) >= realLines/10
	})
}

// let waits until the worker has nothing in flight at the engine that died, and knows that it did.
func (r *realRun) let() {
	r.t.Helper()
	w := r.away("waiting", func(w samples) bool { return w.sum("millrace_inflight_requests") == 0 })
	r.answered = tokens{w.sum("millrace_worker_tokens_total", `kind="prompt"`), w.sum("millrace_worker_tokens_total", `kind="completion"`)}
	// What the engine had counted and was not answered is what was in flight, at most.
	limit := w.sum("millrace_inflight_limit")
	lost := engineTokens(r.seen).minus(engineTokens(r.base)).minus(r.answered)
	if lost.prompt > limit*int64(promptTokens(realLines)) || lost.completion > limit*mostTokens {
		r.t.Errorf("the dead engine had counted %+v tokens more than the worker, with at most %d lines in flight", lost, limit)
	}
	r.base = ""
}

// away waits until the worker has found its engine in a state and given lines back, and is says that it has let go.
func (r *realRun) away(state string, is func(samples) bool) (w samples) {
	r.t.Helper()
	poll(r.t, "the worker has let go of an engine that is "+state, func() bool {
		w = r.worker()
		return w.sum("millrace_engine_state", fmt.Sprintf("state=%q", state)) == 1 && w.sum("millrace_worker_given_back_total") > 0 && is(w)
	})
	ok := w.sum("millrace_worker_requests_total", `outcome="ok"`)
	if ok >= realLines {
		r.t.Errorf("%d lines were answered: that is not the middle", ok)
	}
	r.t.Logf("%d running and %d waiting at the engine before; %d lines answered when it was %s, given back: %s",
		r.seen.sum("vllm:num_requests_running"), r.seen.sum("vllm:num_requests_waiting"), ok, state, reasons(w))
	return w
}

// reasons lists why lines were given back.
func reasons(w samples) string {
	var out []string
	for line := range strings.Lines(string(w)) {
		if s, ok := strings.CutPrefix(line, "millrace_worker_given_back_total"); ok {
			out = append(out, strings.TrimSpace(s))
		}
	}
	return strings.Join(out, ", ")
}

// conserved waits for the end of the job and asks the oracle: every line once, with its own answer and uncharged, as verify says, too.
func (r *realRun) conserved() *aggregator.Manifest {
	r.t.Helper()
	if code := r.job.wait(); code != exitSomeFailed {
		r.t.Fatalf("the job ended with %d\n%s", code, r.job.err)
	}
	if r.files.Manifest == "" {
		dir := r.output()
		r.files = aggregator.Files{Output: filepath.Join(dir, "output.jsonl"), Errors: filepath.Join(dir, "errors.jsonl"), Manifest: filepath.Join(dir, "manifest.json")}
	}
	if c := audit(r.t, r.want, r.files.Output, r.files.Errors, r.files.Manifest, ownAnswer); c.ok != realLines || c.failed != realFailing {
		r.t.Errorf("%d ok and %d failed, want %d and %d", c.ok, c.failed, realLines, realFailing)
	}
	r.auditErrors()
	v := r.start("verify", "verify", r.files.Manifest)
	if code := v.wait(); code != exitOK || v.out.String() != "VALID\n" {
		r.t.Errorf("verify ended with %d and printed %s", code, v.out)
	}
	m, err := aggregator.ReadManifest(r.files.Manifest)
	if err != nil {
		r.t.Fatal(err)
	}
	if n := m.Statistics.Attempts; n != int64(r.want.lines) {
		r.t.Errorf("%d attempts were charged for %d lines; a death of the engine is nobody's fault", n, r.want.lines)
	}
	return m
}

// audit waits for the end of the job, asks the oracle, and holds what engines counted against the manifest.
func (r *realRun) audit() {
	r.t.Helper()
	m := r.conserved()
	s := m.Statistics
	if about, err := fetch(r.engine.url() + "/version"); err != nil || len(m.Engines) != 1 || m.Engines[0].Simulated ||
		!bytes.Contains(about, fmt.Appendf(nil, "%q", m.Engines[0].Version)) {
		r.t.Errorf("the manifest names the engines %+v, the engine says %s (%v)", m.Engines, about, err)
	}
	// All that engines counted and answered is in the manifest, to the token.
	counted := engineTokens(scrape(r.engine.url())).minus(engineTokens(r.base)).plus(r.answered)
	said := tokens{s.InputTokens + s.Dropped.WastedInputTokens, s.OutputTokens + s.Dropped.WastedOutputTokens}
	if d := counted.minus(said); d.prompt < 0 || d.completion < 0 || d.prompt > r.slack.prompt || d.completion > r.slack.completion {
		r.t.Errorf("the engines counted %+v tokens, the manifest says %+v", counted, said)
	}
	r.t.Logf("%d ok, %d failed, %d attempts, %d + %d tokens (%+v by engines that died), %d duplicates, %.1f s",
		s.Completed, s.Failed, s.Attempts, s.InputTokens, s.OutputTokens, r.answered, s.Dropped.Duplicates, s.Duration)
}

// auditErrors holds each error line against what the engine says to such a body.
func (r *realRun) auditErrors() {
	r.t.Helper()
	eachLine(r.t, r.files.Errors, func(b []byte) {
		l := parseOutput(r.t, b)
		var i int
		if _, err := fmt.Sscanf(*l.CustomID, "refused-%d", &i); err != nil {
			r.t.Errorf("a line failed that should not: %s", b)
			return
		}
		want := refusals[i%len(refusals)]
		if l.Response == nil || fmt.Sprint(l.Response.StatusCode) != want.status || !bytes.Contains(l.Response.Body, []byte(want.has)) ||
			bytes.Contains(b, []byte(`"attempts":`)) {
			r.t.Errorf("not what the engine refuses it with (%s, %s): %s", want.status, want.has, b)
		}
	})
}

// TestRealEngine runs the main job on a real vLLM, which dies in the middle of it in several ways and is started again
// at the same port.
func TestRealEngine(t *testing.T) {
	e := newVLLM(t)
	begun := time.Now()
	t.Run("Recordings", func(t *testing.T) { replay(t, e) })
	t.Run("Run", func(t *testing.T) {
		r := newRealRun(t, e)
		r.run()
		r.audit()
	})
	t.Run("CoreKilled", func(t *testing.T) {
		r := newRealRun(t, e)
		r.spread(r.serve)
		r.midway()
		send(t, e.core(t), syscall.SIGKILL)
		t.Logf("EngineCore was killed; the API server ended with %q", e.ended(t))
		r.let()
		e.end(t)
		e.start(t)
		r.audit()
	})
	t.Run("AllKilled", func(t *testing.T) {
		r := newRealRun(t, e)
		r.spread(func() { r.broker(); r.aggregate() })
		r.midway()
		send(t, -e.cmd.Process.Pid, syscall.SIGKILL)
		r.let()
		e.end(t)
		e.start(t)
		r.audit()
	})
	t.Run("Terminated", func(t *testing.T) { // vLLM may then keep its clients waiting for ever: the worker must let go
		r := newRealRun(t, e)
		r.run()
		r.midway()
		r.terminate()
		e.end(t)
		e.start(t, "--shutdown-timeout", "60")
		r.audit()
	})
	t.Run("Drained", func(t *testing.T) { // it finishes what it has, looks well, and takes nothing
		e.start(t, "--shutdown-timeout", "60")
		r := newRealRun(t, e)
		r.spread(r.serve)
		r.midway()
		r.terminate()
		e.end(t)
		e.start(t)
		r.audit()
	})
	t.Run("Hung", func(t *testing.T) { // and looks well all the time
		if os.Getenv("MILLRACE_VLLM_HUNG") == "" {
			t.Skip("a worker takes 2 minutes to notice; MILLRACE_VLLM_HUNG=1 runs it")
		}
		r := newRealRun(t, e)
		r.spread(r.serve)
		r.midway()
		send(t, e.core(t), syscall.SIGSTOP)
		w := r.away("hung", func(w samples) bool { return w.sum("millrace_worker_given_back_total", `reason="suspect"`) >= 16 })
		send(t, e.core(t), syscall.SIGCONT)
		limit := w.sum("millrace_inflight_limit")
		r.slack = tokens{limit * int64(promptTokens(realLines)), limit * mostTokens}
		r.audit()
	})
	t.Logf("%d starts of the engine took %.0f s of %.0f s", e.starts, e.took.Seconds(), time.Since(begun).Seconds())
}

// terminate is SIGTERM for the API server, as a service manager does it, until it has ended.
func (r *realRun) terminate() {
	r.t.Helper()
	begun := time.Now()
	send(r.t, r.engine.cmd.Process.Pid, syscall.SIGTERM)
	r.let()
	r.t.Logf("the API server was terminated and ended with %q after %.1f s", r.engine.ended(r.t), time.Since(begun).Seconds())
}
