package worker

import (
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"millrace/broker"
	"millrace/proto"
)

// benchmark runs b.N lines with 2 KB bodies through a worker, and reports lines per second from the first pull to
// the last stored result.
func benchmark(b *testing.B, e Engine, concurrency int) {
	r := &rig{tb: b, model: "m", server: &broker.Server{Dir: b.TempDir()}}
	must(b, r.server.Start(b.Context()))
	b.Cleanup(r.server.Stop)
	conn, err := r.server.Connect(b.Context(), "bench")
	must(b, err)
	b.Cleanup(conn.Close)
	r.conn = conn
	r.declare(0)
	stored := make(chan struct{})
	n := 0
	_, err = conn.NC.Subscribe("res.>", func(*nats.Msg) {
		if n++; n == b.N {
			close(stored)
		}
	})
	must(b, err)
	pad := strings.Repeat("x", 2000)
	for i := range b.N {
		q := request(i)
		q.Body = []byte(`{"model":"m","max_tokens":16,"messages":[{"role":"user","content":"` + pad + strconv.Itoa(i) + `"}]}`)
		data, err := q.Encode()
		must(b, err)
		_, err = conn.JS.PublishAsync(proto.RequestSubject("m", proto.LaneNormal, "j"), data)
		must(b, err)
	}
	<-conn.JS.PublishAsyncComplete()
	cpu := cpuTime(b)
	b.ResetTimer()
	r.start(e, func(w *Worker) { w.Concurrency = concurrency; w.ProbeEvery = 0; w.RetryEvery = 0 })
	<-stored
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "lines/s")
	b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(b.N), "cpu-µs/line")
	b.ReportMetric(0, "ns/op")
}

// cpuTime is what this process has used so far; the broker is inside.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	must(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkNull measures everything but an engine:
//
//	go test -run - -bench Null -benchtime 100000x ./worker
func BenchmarkNull(b *testing.B) { benchmark(b, &Null{Models: []string{"m"}}, 1024) }

// BenchmarkHTTP adds net/http on both sides, with a server that says the same to everything.
func BenchmarkHTTP(b *testing.B) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		body := string(nullText)
		switch q.URL.Path {
		case "/v1/models":
			body = `{"data":[{"id":"m","max_model_len":4096}]}`
		case "/health", "/metrics", "/version":
			body = ""
		}
		w.Header()["Content-Type"] = []string{"application/json"}
		w.Header()["Content-Length"] = []string{strconv.Itoa(len(body))}
		_, _ = w.Write([]byte(body)) // the worker sees what is missing
	}))
	b.Cleanup(srv.Close)
	h, err := NewHTTP(srv.URL, "")
	must(b, err)
	b.Cleanup(h.Close)
	benchmark(b, h, 256)
}
