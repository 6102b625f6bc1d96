package producer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"millrace/broker"
	"millrace/proto"
)

// writeLines makes an input of n lines of about 1 KB, of which each hundred share the beginning of their prompts.
func writeLines(tb testing.TB, n int) string {
	tb.Helper()
	name := filepath.Join(tb.TempDir(), "input.jsonl")
	f, err := os.Create(name)
	if err != nil {
		tb.Fatal(err)
	}
	w := bufio.NewWriter(f)
	text := strings.Repeat("some words of a prompt, ", 32)
	for i := range n {
		fmt.Fprintf(w, `{"custom_id":"request-%08d","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[{"role":"user","content":"%05d %s %d"}],"max_tokens":100}}`+"\n", i, i*7919%n/100, text, i)
	}
	if err := w.Flush(); err != nil {
		tb.Fatal(err)
	}
	if err := f.Close(); err != nil {
		tb.Fatal(err)
	}
	return name
}

func BenchmarkScan(b *testing.B) {
	const lines = 100_000
	in := Input{Path: writeLines(b, lines), Dir: b.TempDir()}
	st, err := os.Stat(in.Path)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(st.Size())
	b.ReportAllocs()
	for b.Loop() {
		d, err := Scan(b.Context(), in, nil)
		if err != nil {
			b.Fatal(err)
		}
		d.Close()
	}
	b.ReportMetric(float64(lines)*float64(b.N)/b.Elapsed().Seconds(), "lines/s")
}

// BenchmarkEnqueue runs an owner with a window for all lines, on a broker in the same process, until all are queued.
func BenchmarkEnqueue(b *testing.B) {
	for name, always := range map[string]bool{"sync=1s": false, "sync=always": true} {
		b.Run(name, func(b *testing.B) {
			const lines = 100_000
			d := scanned(b, Input{Path: writeLines(b, lines), Limit: lines})
			b.SetBytes(d.Bytes)
			for b.Loop() {
				b.StopTimer()
				enqueueAll(b, d, always)
			}
			b.ReportMetric(float64(lines)*float64(b.N)/b.Elapsed().Seconds(), "lines/s")
		})
	}
}

func enqueueAll(b *testing.B, d *Dataset, always bool) {
	b.Helper()
	srv := &broker.Server{Dir: b.TempDir(), SyncAlways: always}
	if err := srv.Start(b.Context()); err != nil {
		b.Fatal(err)
	}
	defer srv.Stop()
	conn, err := srv.Connect(b.Context(), "bench")
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancelCause(b.Context())
	done := errors.New("all are enqueued")
	o := &Owner{Conn: conn, Dataset: d, Job: d.Job(), Window: d.Lines, Disk: 8 << 30, Report: func(f proto.Feed) {
		if f.Enqueued == d.Lines {
			cancel(done)
		}
	}}
	b.StartTimer()
	err = o.Run(ctx)
	b.StopTimer()
	if !errors.Is(err, done) {
		b.Fatal(err)
	}
	b.StartTimer()
}
