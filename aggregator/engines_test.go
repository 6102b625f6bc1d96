package aggregator

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"millrace/proto"
)

// paced is a result of a line that w0 started at a second.
func paced(index, second int64, p proto.Pace) *proto.Result {
	r := good("j", index, 0)
	r.Worker, r.StartUS, r.Pace = "w0", second*1e6, p
	return r
}

// TestPace: how full an engine was comes from the results, in whatever order they come.
func TestPace(t *testing.T) {
	results := []*proto.Result{
		paced(0, 20, proto.Pace{Limit: 100, FullUS: 12e6, Metered: true, Before: 30, After: 41}),
		paced(1, 10, proto.Pace{Limit: 90, FullUS: 4e6, Metered: true, Before: 5, After: 38}),
		paced(2, 15, proto.Pace{FullUS: 4e6, Metered: true}), // it tried the engine
		paced(3, 50, proto.Pace{Limit: 110, FullUS: 36e6}),   // the metrics are gone
	}
	older := good("j", 5, 0) // w1 does not tell
	for _, order := range [][]int{{0, 1, 2, 3}, {3, 2, 1, 0}, {1, 3, 0, 2}} {
		var r Report
		for _, i := range order {
			r.Add(results[i], time.Unix(1000, 0))
		}
		r.Add(older, time.Unix(1000, 0))
		got, err := json.Marshal(r.engines([]*proto.Worker{{ID: "w1", Version: "1"}, {ID: "w2"}}))
		if err != nil {
			t.Fatal(err)
		}
		want := `[{"worker":"w0","simulated":false,"lines":4,"in_flight_limit":110,"full_share":0.8,"preemptions":36,"preemptions_per_line":9},` +
			`{"worker":"w1","engine_version":"1","simulated":false,"lines":1,"in_flight_limit":null,"full_share":null,"preemptions":null,"preemptions_per_line":null},` +
			`{"worker":"w2","simulated":false,"lines":0,"in_flight_limit":null,"full_share":null,"preemptions":null,"preemptions_per_line":null}]`
		if string(got) != want {
			t.Errorf("%v:\n%s\nwant\n%s", order, got, want)
		}
	}
}

// TestFullShareOfTimeWithWork: a pause of 30 s and more is in no share, nor is what other jobs did meanwhile; a shorter one is.
func TestFullShareOfTimeWithWork(t *testing.T) {
	full := func(us int64) proto.Pace { return proto.Pace{Limit: 100, FullUS: us} }
	for _, c := range []struct {
		name    string
		results []*proto.Result
		want    float64
	}{
		{"an hour", []*proto.Result{paced(0, 10, full(0)), paced(1, 20, full(8e6)), paced(2, 3610, full(1008e6)), paced(3, 3620, full(1014e6))}, 0.7},
		{"half a minute, less what the line before took", []*proto.Result{paced(0, 10, full(0)), paced(1, 20, full(10e6)), paced(2, 50, full(10e6))}, 0.25},
		{"lines in between that tried the engine", []*proto.Result{paced(0, 10, full(0)), paced(1, 20, full(10e6)), paced(2, 45, proto.Pace{}), paced(3, 70, full(12e6))}, 0.2},
	} {
		for _, back := range []bool{false, true} {
			var r Report
			for i := range c.results {
				if back {
					i = len(c.results) - 1 - i
				}
				r.Add(c.results[i], time.Unix(1000, 0))
			}
			if e := r.engines(nil); len(e) != 1 || e[0].FullShare == nil || *e[0].FullShare != c.want || *e[0].InFlight != 100 {
				t.Errorf("%s, backwards %v: %+v, want %v", c.name, back, e, c.want)
			}
		}
	}
}

// TestPaceIsBounded: a job in very many pieces keeps so many of them, and its share.
func TestPaceIsBounded(t *testing.T) {
	var r Report
	for i := range int64(5000) {
		r.Add(paced(2*i, i*60, proto.Pace{Limit: 1, FullUS: i * 30e6}), time.Unix(1000, 0))
		r.Add(paced(2*i+1, i*60+5, proto.Pace{Limit: 1, FullUS: i * 30e6}), time.Unix(1000, 0))
	}
	e := r.engines(nil)
	if n := len(r.paces["w0"].work); n > maxSpans || e[0].FullShare == nil || *e[0].FullShare != 0.5 { // all in one, by then
		t.Errorf("%d pieces, %+v", n, e)
	}
}

// TestLearn: the last that an engine said of itself counts, and what it does not say any more stays known.
func TestLearn(t *testing.T) {
	gpu := proto.GPU{Index: "0", UUID: "GPU-1", Name: "H100", MemoryUsed: 5, MemoryTotal: 80, Power: 600, Utilization: 1}
	first := learn(nil, &proto.Worker{ID: "w", State: proto.EngineReady, Version: "1", KVTokens: 7, Limit: 3, Models: []string{"m"}, Flags: []string{"a=1"}, GPUs: []proto.GPU{gpu}, OwnGPUs: true})
	still := gpu
	still.MemoryUsed, still.Power, still.Utilization = 0, 0, 0
	want := &proto.Worker{ID: "w", Version: "1", KVTokens: 7, Models: []string{"m"}, Flags: []string{"a=1"}, GPUs: []proto.GPU{still}, OwnGPUs: true}
	if !reflect.DeepEqual(first, want) {
		t.Errorf("%+v", first)
	}
	if got := learn(first, &proto.Worker{ID: "w", State: proto.EngineWaiting}); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	want.Hosted, want.Restarts, want.LastRestart = true, 2, "oom"
	if got := learn(first, &proto.Worker{ID: "w", State: proto.EngineWaiting, Hosted: true, Restarts: 2, LastRestart: "oom"}); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	if e := engineOf(want); e.Restarts == nil || *e.Restarts != 2 || e.LastRestart != "oom" || engineOf(first).Restarts != nil {
		t.Errorf("%+v", e)
	}
	want.Hosted, want.Restarts, want.LastRestart = false, 0, ""
	want.Version, want.KVTokens, want.Flags = "2", 9, []string{"a=2"}
	if got := learn(first, &proto.Worker{ID: "w", Version: "2", KVTokens: 9, Flags: []string{"a=2"}}); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

// TestEnginesOutliveEverybody: what was said last is in the manifest though worker and aggregator have gone since.
func TestEnginesOutliveEverybody(t *testing.T) {
	r := newRig(t)
	first := r.start()
	r.job("j", 3)
	r.send(paced(0, 1, proto.Pace{Limit: 10, FullUS: 1}))
	r.say(&proto.Worker{ID: "w0", State: proto.EngineReady, KVTokens: 7}) // it tells no version
	r.heard("j", `"KVTokens":7`)
	r.say(&proto.Worker{ID: "w0", State: proto.EngineReady, KVTokens: 7, Flags: []string{"--seed 1"}, GPUs: []proto.GPU{{UUID: "GPU-1", Name: "H100"}}})
	r.heard("j", "--seed 1")
	first.stop()
	if err := r.workers().Delete(t.Context(), "w0"); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.send(paced(1, 3, proto.Pace{Limit: 12, FullUS: 1e6 + 1}), good("j", 2, 0))
	r.await("j", done)
	e := r.verify("j").Engines
	if len(e) != 1 || e[0].KVTokens != 7 || len(e[0].Flags) != 1 || len(e[0].GPUs) != 1 || e[0].GPUs[0].Name != "H100" ||
		e[0].InFlight == nil || *e[0].InFlight != 12 || e[0].FullShare == nil || *e[0].FullShare != 0.5 || e[0].Preemptions != nil {
		t.Errorf("%+v", e)
	}
}

// TestEngineGivenUp: an engine for a model of the job that was given up is in the manifest though it answered nothing.
func TestEngineGivenUp(t *testing.T) {
	r := newRig(t)
	r.start()
	r.job("j", 3)
	r.send(good("j", 0, 0))
	r.await("j", func(p *proto.Progress) bool { return p.OK == 1 })
	r.say(&proto.Worker{ID: "other", State: proto.EngineDegraded, Hosted: true, Models: []string{"other"}, GivenUp: "no memory"})
	r.say(&proto.Worker{ID: "w9", State: proto.EngineDegraded, Hosted: true, Restarts: 2, LastRestart: "oom", Models: []string{testModel}, GivenUp: "no memory",
		GPUs: []proto.GPU{{Name: "H100"}}, OwnGPUs: true})
	r.heard("j", "w9")
	r.send(good("j", 1, 0), good("j", 2, 0))
	r.await("j", done)
	e := r.verify("j").Engines
	if len(e) != 1 || e[0].Worker != "w9" || e[0].GivenUp != "no memory" || e[0].Lines != 0 || *e[0].Restarts != 2 || len(e[0].GPUs) != 1 {
		t.Errorf("%+v", e)
	}
}

// say puts what a worker says of itself.
func (r *rig) say(w *proto.Worker) {
	r.t.Helper()
	b, err := w.Encode()
	if err == nil {
		_, err = r.workers().Put(r.t.Context(), w.ID, b)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// heard waits until the aggregator remembers a text of what workers of a job said.
func (r *rig) heard(job, text string) {
	r.t.Helper()
	for n := int64(0); ; n++ {
		if b, err := os.ReadFile(filepath.Join(r.dir, "jobs", job, fileAbout)); err == nil && strings.Contains(string(b), text) {
			return
		}
		if n > 30 { // each takes a second
			r.t.Fatalf("%s is not remembered", text)
		}
		r.send(good(job, 0, n)) // a duplicate: something to wait for
		r.await(job, func(p *proto.Progress) bool { return p.Duplicates > n })
	}
}
