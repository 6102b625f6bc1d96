package broker_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// TestShared: which workers run lines on one engine, as far as that is sure.
func TestShared(t *testing.T) {
	beat := func(id, host, engine string, change ...func(*broker.Beat)) broker.Beat {
		b := broker.Beat{Worker: proto.Worker{ID: id, Host: host, PID: int64(id[0]), Engine: engine, State: proto.EngineReady, UptimeUS: 60e6}, Silent: time.Second}
		for _, f := range change {
			f(&b)
		}
		return b
	}
	const here = "http://127.0.0.1:8000"
	silent := func(s, up float64) func(*broker.Beat) {
		return func(b *broker.Beat) { b.Silent, b.UptimeUS = time.Duration(s*1e9), int64(up*1e6) }
	}
	state := func(s string) func(*broker.Beat) { return func(b *broker.Beat) { b.State = s } }
	gpus := func(ids ...string) func(*broker.Beat) {
		return func(b *broker.Beat) {
			for _, id := range ids {
				b.GPUs = append(b.GPUs, proto.GPU{UUID: id})
			}
		}
	}
	net := func(s string) func(*broker.Beat) { return func(b *broker.Beat) { b.PID, b.Network = 1, s } }
	hosted := func(b *broker.Beat) { b.Hosted = true }
	for name, c := range map[string]struct {
		beats []broker.Beat
		want  string
	}{
		"one machine":               {[]broker.Beat{beat("a", "h", here), beat("b", "h", here), beat("c", "h", "http://127.0.0.1:8001")}, here + " a b"},
		"three, in other words":     {[]broker.Beat{beat("a", "h", here), beat("b", "h", "http://localhost:8000"), beat("c", "h", here)}, here + " a b c"},
		"that wait":                 {[]broker.Beat{beat("a", "h", here, state(proto.EngineWaiting)), beat("b", "h", here, state(proto.EngineDegraded))}, here + " a b"},
		"another machine":           {[]broker.Beat{beat("a", "h", here), beat("b", "i", here)}, ""},
		"an address inside a net":   {[]broker.Beat{beat("a", "h", "http://172.17.0.2:8000"), beat("b", "i", "http://172.17.0.2:8000")}, ""},
		"a provider's net":          {[]broker.Beat{beat("a", "h", "http://100.64.0.2:8000"), beat("b", "i", "http://100.64.0.2:8000")}, ""},
		"a name":                    {[]broker.Beat{beat("a", "h", "http://vllm:8000"), beat("b", "i", "http://vllm:8000")}, ""},
		"a name, from one machine":  {[]broker.Beat{beat("a", "h", "http://vllm:8000"), beat("b", "h", "http://vllm:8000")}, "http://vllm:8000 a b"},
		"a public address":          {[]broker.Beat{beat("a", "h", "http://192.0.2.1:8000"), beat("b", "i", "http://192.0.2.1:8000")}, "http://192.0.2.1:8000 a b"},
		"inside the process":        {[]broker.Beat{beat("a", "h", "null:"), beat("b", "h", "null:")}, ""},
		"no heartbeat that is read": {[]broker.Beat{{Worker: proto.Worker{ID: "a"}}, {Worker: proto.Worker{ID: "b"}}}, ""},
		"started anew":              {[]broker.Beat{beat("a", "h", here, silent(5, 60)), beat("b", "h", here, silent(0.5, 4))}, ""},
		"started anew, and late":    {[]broker.Beat{beat("a", "h", here, silent(3, 60)), beat("b", "h", here, silent(0.5, 4))}, ""},
		"started beside it":         {[]broker.Beat{beat("a", "h", here, silent(1, 60)), beat("b", "h", here, silent(0.5, 4))}, here + " a b"},
		"silent":                    {[]broker.Beat{beat("a", "h", here, silent(8, 60)), beat("b", "h", here)}, ""},
		"one that leaves":           {[]broker.Beat{beat("a", "h", here, state(proto.EngineDraining)), beat("b", "h", here)}, ""},
		"one process a container":   {[]broker.Beat{beat("a1", "h", here), beat("a2", "h", here)}, ""},
		"containers of a pod":       {[]broker.Beat{beat("a", "h", here, net("b/1")), beat("b", "h", here, net("b/1"))}, here + " a b"},
		"the machine's network":     {[]broker.Beat{beat("a", "h", here, net("b/1")), beat("b", "i", here, net("b/1"))}, here + " a b"},
		"a name, in one network":    {[]broker.Beat{beat("a", "h", "http://vllm:8000", net("b/1")), beat("b", "i", "http://vllm:8000", net("b/1"))}, "http://vllm:8000 a b"},
		"a network each":            {[]broker.Beat{beat("a", "h", here, net("b/1")), beat("b", "h", here, net("b/2"), func(b *broker.Beat) { b.PID = 7 })}, ""},
		"a name, in a network each": {[]broker.Beat{beat("a", "h", "http://vllm:8000", net("b/1")), beat("b", "i", "http://vllm:8000", net("b/2"))}, ""},
		"their machine's address":   {[]broker.Beat{beat("a", "h", "http://172.17.0.1:8000", net("b/1")), beat("b", "i", "http://172.17.0.1:8000", net("b/2"))}, "http://172.17.0.1:8000 a b"},
		"another machine's":         {[]broker.Beat{beat("a", "h", "http://172.17.0.1:8000", net("b/1")), beat("b", "h", "http://172.17.0.1:8000", net("c/2"))}, ""},
		"any address":               {[]broker.Beat{beat("a", "h", "http://0.0.0.0:8000", net("b/1")), beat("b", "h", "http://0.0.0.0:8000", net("b/2"))}, ""},
		"one does not tell":         {[]broker.Beat{beat("a", "h", here, net("b/1")), beat("b", "h", here)}, here + " a b"},
		"one name, other GPUs":      {[]broker.Beat{beat("a", "h", here, gpus("x", "y")), beat("b", "h", here, gpus("z"))}, ""},
		"the engine's GPUs":         {[]broker.Beat{beat("a", "h", here, gpus("x", "y"), hosted), beat("b", "h", here, gpus("z", "y"))}, here + " a b"},
		"one without GPUs":          {[]broker.Beat{beat("a", "h", here, gpus("x")), beat("b", "h", here), beat("c", "h", here, gpus("y"))}, here + " a b"},
		"an engine each":            {[]broker.Beat{beat("a", "h", here, hosted), beat("b", "h", here, hosted)}, ""},
		"one whose engine is given up": {[]broker.Beat{beat("a", "h", here, func(b *broker.Beat) { b.GivenUp = "it died" }),
			beat("b", "h", here)}, ""},
	} {
		var got []string
		for _, e := range broker.Shared(c.beats) {
			got = append(got, e.Engine+" "+strings.Join(e.Workers, " "))
		}
		if s := strings.Join(got, ", "); s != c.want {
			t.Errorf("%s: %q, want %q", name, s, c.want)
		}
	}
}

// TestDoctorOfSharedEngine: doctor says it of workers by their heartbeats.
func TestDoctorOfSharedEngine(t *testing.T) {
	c, kv := bucket(t, proto.WorkersBucket)
	for i, host := range []string{"h", "h", "i"} {
		w := proto.Worker{ID: fmt.Sprint("w", i), Host: host, PID: int64(i), Engine: "http://127.0.0.1:8000", State: proto.EngineReady, Models: []string{"m"}, UptimeUS: 60e6}
		v, err := w.Encode()
		if err == nil {
			_, err = kv.Put(t.Context(), w.ID, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var got []broker.Finding
	for _, f := range broker.Doctor(t.Context(), c) {
		if strings.HasPrefix(f.Check, "engine ") {
			got = append(got, f)
		}
	}
	if len(got) != 1 || got[0].Check != "engine http://127.0.0.1:8000" || got[0].Level != broker.LevelNote ||
		got[0].Found != "workers w0, w1 run on it: one of them is enough" || !strings.Contains(got[0].Mend, "stop all but one") {
		t.Errorf("%+v", got)
	}
}
