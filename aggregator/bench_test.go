package aggregator

import (
	"bytes"
	"fmt"
	"path/filepath"
	"testing"

	"millrace/broker"
	"millrace/proto"
)

// kilobyte is an ok result of about 1 KB on the wire.
func kilobyte(job string, index int64) *proto.Result {
	r := good(job, index, index)
	r.Body = fmt.Appendf(nil, `{"choices":[{"text":"%s"}],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}`,
		bytes.Repeat([]byte("word "), 140), r.Usage.Prompt, r.Usage.Completion)
	return r
}

func messages(b *testing.B, n int64) []message {
	b.Helper()
	var st stream
	for i := range n {
		st.add(b, kilobyte("j", i))
	}
	return st.msgs
}

// BenchmarkFold decodes, checks, counts and spools results of 1 KB, with a checkpoint about every second of a stream of
// 50,000/s: go test ./aggregator -run '^$' -bench Fold -benchtime 500000x
func BenchmarkFold(b *testing.B) {
	const batch = 50_000
	msgs := messages(b, batch)
	b.SetBytes(int64(len(msgs[0].data)))
	b.ReportAllocs()
	b.ResetTimer()
	root := b.TempDir()
	for n := 0; n < b.N; {
		b.StopTimer()
		s := openTest(b, filepath.Join(root, fmt.Sprint(n)))
		if err := s.know(spec("j", batch), sight{rev: 1}, nil); err != nil {
			b.Fatal(err)
		}
		s.moveTo(position{}, true)
		b.StartTimer()
		for i := 0; i < batch && n < b.N; i++ {
			if err := s.fold(msgs[i]); err != nil {
				b.Fatal(err)
			}
			n++
		}
		save(b, s)
		b.StopTimer()
		s.close()
		b.StartTimer()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "results/s")
}

// BenchmarkReadAndFold reads the results out of an embedded broker's stream of files and folds them.
func BenchmarkReadAndFold(b *testing.B) {
	srv := &broker.Server{Dir: b.TempDir()}
	if err := srv.Start(b.Context()); err != nil {
		b.Fatal(err)
	}
	defer srv.Stop()
	conn, err := srv.Connect(b.Context(), "bench")
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	if err := (broker.Declarer{JS: conn.JS, Disk: 64 << 30}).Base(b.Context()); err != nil {
		b.Fatal(err)
	}
	for i := range b.N {
		if _, err := conn.JS.PublishAsync(proto.ResultSubject("j"), wire(b, kilobyte("j", int64(i)))); err != nil {
			b.Fatal(err)
		}
	}
	<-conn.JS.PublishAsyncComplete()
	s := openTest(b, b.TempDir())
	defer s.close()
	if err := s.know(spec("j", int64(b.N)), sight{rev: 1}, nil); err != nil {
		b.Fatal(err)
	}
	src, to, again, err := openSource(b.Context(), conn.JS, position{})
	if err != nil {
		b.Fatal(err)
	}
	defer src.close()
	s.moveTo(to, again)
	b.ResetTimer()
	for range b.N {
		m, err := src.next(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		if err := s.fold(m); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "results/s")
}

// BenchmarkFinish writes, checks and describes the files of a job.
func BenchmarkFinish(b *testing.B) {
	s := openTest(b, b.TempDir())
	defer s.close()
	if err := s.know(spec("j", int64(b.N)), sight{rev: 1}, nil); err != nil {
		b.Fatal(err)
	}
	s.moveTo(position{}, true)
	for i := range int64(b.N) {
		r := kilobyte("j", i)
		if err := s.fold(message{subject: "res.j", data: wire(b, r), seq: uint64(i + 1), time: 1e18 + i*1e5}); err != nil {
			b.Fatal(err)
		}
	}
	save(b, s)
	to := filesIn(b.TempDir())
	f := newFinisher(s, to)
	b.ResetTimer()
	for _, j := range s.finishable() {
		if err := f.one(b.Context(), j); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "lines/s")
}
