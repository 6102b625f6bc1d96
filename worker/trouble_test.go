package worker_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
	"millrace/sim"
	"millrace/worker"
)

// What an engine can do to a worker, row by row: docs/measurements/trouble.md names the test of each row. Those that are
// not in other files are here, against the simulator.

// body makes a line ask for something.
func body(q *proto.Request, more string) *proto.Request {
	q.Body = []byte(strings.TrimSuffix(string(q.Body), "}") + more + "}")
	return q
}

// trouble starts an engine with a worker beside it, which has n lines.
func trouble(t *testing.T, change func(*sim.Config), lines []*proto.Request, more ...func(*worker.Worker)) (*worker.Rig, *engine) {
	t.Helper()
	r, e := worker.NewRig(t), newEngine(t, change)
	r.Send(lines...)
	r.Start(e.client(), more...)
	return r, e
}

// uncharged checks that every line is ok and that no attempt was charged.
func uncharged(t *testing.T, got []*proto.Result, n int) {
	t.Helper()
	allOK(t, got, n)
	for _, res := range got {
		if len(res.Attempts) > 0 {
			t.Errorf("index %d was charged: %+v", res.Index, res.Attempts)
		}
	}
}

// TestTroubleKilled: whatever way the frontend says it, what was in flight comes back uncharged.
func TestTroubleKilled(t *testing.T) {
	for _, frontend := range []sim.Frontend{sim.FrontendPython, sim.FrontendRust} {
		t.Run(string(frontend), func(t *testing.T) {
			const n = 120
			r, e := trouble(t, func(c *sim.Config) { c.Frontend, c.StepTime, c.DeathTime = frontend, 5*time.Millisecond, time.Second }, worker.Requests(n),
				func(w *worker.Worker) { w.Concurrency = 16 })
			r.Wait(10)
			e.sim.Kill()
			e.again()
			uncharged(t, r.Wait(n), n)
			r.Settled(0)
		})
	}
}

// TestTroubleAsleep: an engine that sleeps is seen by its metrics or, where these do not tell, by /is_sleeping. What it had
// when it was put to sleep and what it gets when it is awake is answered.
func TestTroubleAsleep(t *testing.T) {
	for _, frontend := range []sim.Frontend{sim.FrontendPython, sim.FrontendRust} {
		t.Run(string(frontend), func(t *testing.T) {
			const n = 60
			r, e := trouble(t, func(c *sim.Config) { c.Frontend, c.DevMode, c.StepTime = frontend, true, 2*time.Millisecond }, worker.Requests(n),
				func(w *worker.Worker) { w.Concurrency = 8 })
			r.Wait(5)
			faults(t, e, sim.Faults{Asleep: true})
			if said := r.State(proto.EngineWaiting).Reason; !strings.Contains(said, "asleep") {
				t.Errorf("it is said that %s", said)
			}
			faults(t, e, sim.Faults{})
			uncharged(t, r.Wait(n), n)
			r.Settled(0)
		})
	}
}

// TestTroubleContextCut: an answer that the engine cut at its context is used as it is, and marked.
func TestTroubleContextCut(t *testing.T) {
	for _, frontend := range []sim.Frontend{sim.FrontendPython, sim.FrontendRust} {
		t.Run(string(frontend), func(t *testing.T) {
			lines := worker.Requests(3)
			body(lines[0], `,"ignore_eos":true,"max_tokens":`+map[sim.Frontend]string{sim.FrontendPython: "64", sim.FrontendRust: "5000"}[frontend])
			body(lines[1], `,"ignore_eos":true,"max_tokens":16`)
			r, _ := trouble(t, func(c *sim.Config) { c.Frontend, c.MaxModelLen = frontend, 64 }, lines)
			for i, res := range worker.Exactly(t, r.Wait(3), 3) {
				if !res.OK || len(res.Attempts) > 0 || res.ContextCut != (i == 0) || i == 0 && (res.Finish != "length" || len(res.Body) == 0) {
					t.Errorf("index %d: %+v", i, res)
				}
			}
		})
	}
	// Python until 0.26 refuses it.
	r, _ := trouble(t, func(c *sim.Config) { c.Frontend, c.MaxModelLen = sim.FrontendPython26, 64 }, []*proto.Request{body(worker.Requests(1)[0], `,"max_tokens":64`)})
	if res := r.Wait(1)[0]; res.OK || res.Code != proto.CodeContextLength || len(res.Attempts) > 0 {
		t.Errorf("result %+v", res)
	}
}

// TestTroubleBadSchema: a 200 that holds nothing is no answer.
func TestTroubleBadSchema(t *testing.T) {
	const schema = `,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"wrong"}}}`
	for frontend, want := range map[sim.Frontend]string{sim.FrontendPython: proto.CodeInvalidRequest, sim.FrontendRust: proto.CodeBadResponse} {
		t.Run(string(frontend), func(t *testing.T) {
			lines := worker.Requests(9)
			body(lines[4], schema)
			r, _ := trouble(t, func(c *sim.Config) { c.Frontend = frontend }, lines, func(w *worker.Worker) { w.MaxAttempts = 2; w.SetRefusal(time.Millisecond) })
			for i, res := range worker.Exactly(t, r.Wait(9), 9) {
				if res.OK != (i != 4) || i == 4 && (res.Code != want || res.Message == "") {
					t.Errorf("index %d: %+v", i, res)
				}
			}
		})
	}
}

// TestTroubleRefused: what a line asks for and cannot have is an error line at once, with the engine's words; an engine that
// trips over a body (500) gets it again, and the line ends with its history.
func TestTroubleRefused(t *testing.T) {
	long := strings.Repeat("long ", 200)
	for _, c := range []struct {
		name, body, code, says string
		status, attempts       int
	}{
		{"over-long", `{"model":"m","messages":[{"role":"user","content":"` + long + `"}]}`, proto.CodeContextLength, "maximum context length", 400, 0},
		{"max_tokens", `{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":500}`, proto.CodeInvalidRequest, "max_tokens=500", 400, 0},
		{"pydantic", `{"model":"m","messages":"x"}`, proto.CodeInvalidRequest, "validation error", 400, 0},
		{"list", `[]`, proto.CodeEngineError, "'list' object", 500, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			lines := worker.Requests(5)
			lines[2].Body = []byte(c.body)
			r, _ := trouble(t, func(cfg *sim.Config) { cfg.Frontend, cfg.MaxModelLen = sim.FrontendPython26, 128 }, lines,
				func(w *worker.Worker) { w.MaxAttempts = 2; w.SetRefusal(time.Millisecond) })
			for i, res := range worker.Exactly(t, r.Wait(5), 5) {
				switch {
				case res.OK == (i == 2):
					t.Errorf("index %d: %+v", i, res)
				case i == 2 && (res.Code != c.code || !strings.Contains(res.Message, c.says) || res.Status != int64(c.status) || len(res.Attempts) != c.attempts):
					t.Errorf("result %+v, attempts %+v", res, res.Attempts)
				}
			}
		})
	}
}

// TestTroubleOtherModel: another model is started at the engine's address. Even where that one answers whatever is asked,
// no line of the first model gets an answer from it.
func TestTroubleOtherModel(t *testing.T) {
	for _, any := range []bool{false, true} {
		t.Run(fmt.Sprintf("any=%v", any), func(t *testing.T) {
			const n = 200
			r, e := trouble(t, func(c *sim.Config) {
				c.AnyModel, c.Shutdown = any, sim.ShutdownAbort
				c.StepTime = 2 * time.Millisecond
			}, worker.Requests(n),
				func(w *worker.Worker) { w.Concurrency = 16 })
			r.Wait(20)
			e.end()
			<-e.done
			e.cfg.Models = []string{"other"}
			e.start()
			r.Until("it is seen what is served now", func() bool {
				got := r.Workers()
				return len(got) == 1 && slices.Equal(got[0].Models, []string{"other"}) && got[0].InFlight == 0
			})
			e.end()
			<-e.done
			e.cfg.Models = []string{"m"}
			e.start()
			got := r.Wait(n)
			uncharged(t, got, n)
			for _, res := range got {
				if !strings.Contains(string(res.Body), `"model":"m"`) {
					t.Fatalf("index %d was answered by another model: %s", res.Index, res.Body)
				}
			}
			r.Settled(0)
		})
	}
}

// TestTroubleAlias: an engine that answers by the first of its names, or by one that it does not list, is believed.
func TestTroubleAlias(t *testing.T) {
	const n = 40
	r, _ := trouble(t, func(c *sim.Config) { c.Models = []string{"whole/name", "m"} }, worker.Requests(n), func(w *worker.Worker) { w.Concurrency = 8 })
	uncharged(t, r.Wait(n), n)
}

// TestTroubleKeepAlive: connections that the engine closes as idle, at any instant, cost no attempt. MILLRACE_KEEPALIVE=1 runs
// 100,000 lines.
func TestTroubleKeepAlive(t *testing.T) {
	if os.Getenv("MILLRACE_KEEPALIVE") != "" {
		keepAlive(t, 1000, 100)
		return
	}
	keepAlive(t, 40, 32)
}

// keepAlive sends lines in bursts, with pauses around the time after which the engine closes what is idle.
func keepAlive(t *testing.T, rounds, burst int) {
	const idle = 4 * time.Millisecond
	reg := prometheus.NewRegistry()
	r := worker.NewRig(t)
	e := newEngine(t, func(c *sim.Config) { c.KeepAlive, c.StepTime, c.OutputTokens = idle, 0, sim.Range{Min: 1, Max: 1} })
	r.Start(e.client(), func(w *worker.Worker) { w.Concurrency, w.Registry = burst, reg; w.SetGrace(10 * time.Millisecond) })
	lines := worker.Requests(rounds * burst)
	for i := range rounds {
		r.Send(lines[i*burst : (i+1)*burst]...)
		r.WaitFor(time.Minute, (i+1)*burst)
		pause := time.NewTimer(idle - time.Millisecond + time.Duration(i%20)*100*time.Microsecond)
		<-pause.C
	}
	uncharged(t, r.Wait(rounds*burst), rounds*burst)
	t.Logf("%d lines; connections that were closed in the moment of their use: %.0f", rounds*burst, worker.Labelled(t, reg, "millrace_worker_given_back_total", "reason", "connection"))
}
