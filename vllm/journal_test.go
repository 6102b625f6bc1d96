package vllm_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"millrace/vllm"
)

// TestDiskHangs: neither the server nor who looks at what it said waits for a disk that takes nothing.
func TestDiskHangs(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Repeat(strings.Repeat("x", 999)+"\n", 5000) + "the last words"
	tail, _, written := vllm.Journal(w, strings.NewReader(lines))
	if got := tail[len(tail)-1]; got != "the last words" {
		t.Errorf("the last is %.50s", got)
	}
	select {
	case <-written:
		t.Error("all is written")
	default:
	}
	r.Close()
	<-written
}

// TestAccessLog: lines of the access log, as ours that look at /health make them, are no news and hide nothing.
func TestAccessLog(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/log")
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&said, "(APIServer pid=7) INFO:     127.0.0.1:%d - \"GET /health HTTP/1.1\" 503 Service Unavailable\n", i)
		fmt.Fprintf(&said, "INFO:     127.0.0.1:%d - \"POST /v1/chat/completions HTTP/1.1\" 500 Internal Server Error\n", i)
	}
	tail, news, written := vllm.Journal(f, strings.NewReader(said.String()))
	<-written
	if len(tail) > 0 || !news.IsZero() {
		t.Errorf("%d lines stay, the last news came at %v", len(tail), news)
	}
	if b, err := os.ReadFile(f.Name()); err != nil || string(b) != said.String() {
		t.Errorf("the file has %d bytes of %d, %v", len(b), said.Len(), err)
	}
	if tail, news, _ = vllm.Journal(nil, strings.NewReader("it died\n"+said.String())); !slices.Equal(tail, []string{"it died"}) || time.Since(news) > time.Hour {
		t.Errorf("%d lines stay, the last news came at %v", len(tail), news)
	}
}

// TestEnvironment: what is ours alone is not handed on, and CUDA counts GPUs as whoever chose them.
func TestEnvironment(t *testing.T) {
	t.Setenv("NATS_URL", "nats://user:secret@queue")
	t.Setenv("MILLRACE_TOKEN", "secret")
	for _, c := range []struct {
		server *vllm.Server
		want   []string
	}{
		{&vllm.Server{}, nil},
		{&vllm.Server{GPUs: []string{"2", "3"}}, []string{"CUDA_VISIBLE_DEVICES=2,3"}},
		{&vllm.Server{GPUs: []string{"2"}, ByBus: true}, []string{"CUDA_VISIBLE_DEVICES=2", "CUDA_DEVICE_ORDER=PCI_BUS_ID"}},
	} {
		env := c.server.Environment()
		if !slices.Equal(env[len(env)-len(c.want):], c.want) || len(c.want) == 1 && slices.Contains(env, "CUDA_DEVICE_ORDER=PCI_BUS_ID") {
			t.Errorf("%q, want %q", env, c.want)
		}
		if s := strings.Join(env, "\n"); strings.Contains(s, "secret") {
			t.Errorf("a secret of ours is handed on")
		}
	}
}

// TestTraceback: of a log whose reason is not known what is said is told, and not where in the program.
func TestTraceback(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("testdata/reasons/machine-memory.txt")
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, "says "+logged(t, strings.ReplaceAll(string(b), "less than desired", "not")), "serve")
	r.start().up(2)
	said := r.said.String()
	for _, want := range []string{"ValueError: Available memory on node", "Exception: WorkerProc initialization failed"} {
		if strings.Count(said, want) != 1 {
			t.Errorf("%q is not told", want)
		}
	}
	if n := strings.Count(said, "engine said: "); n > 4 {
		t.Errorf("told %d lines", n)
	}
}
