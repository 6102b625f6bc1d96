package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"millrace/broker"
	"millrace/sim"
)

// hangLimit is when a test gives up on something that should have happened long ago.
const hangLimit = 2 * time.Minute

// signalBuffer collects what a process says, and lets others wait for it.
type signalBuffer struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
}

func newSignalBuffer() *signalBuffer { return &signalBuffer{more: make(chan struct{})} }

func (b *signalBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.more)
	b.more = make(chan struct{})
	return b.buf.Write(p)
}

func (b *signalBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// after returns what was said, and a channel that closes when more is.
func (b *signalBuffer) after() (string, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String(), b.more
}

// proc is a role in a process of its own.
type proc struct {
	t    testing.TB
	name string
	cmd  *exec.Cmd
	out  *signalBuffer
	err  *signalBuffer
	over chan struct{}
}

// startProc starts the program. It is killed at the end of the test if it still runs.
func startProc(t *testing.T, name string, env []string, args ...string) *proc {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(append(os.Environ(), programEnv+"=1"), env...)
	return launch(t, name, cmd)
}

func launch(t testing.TB, name string, cmd *exec.Cmd) *proc {
	t.Helper()
	p := &proc{t: t, name: name, cmd: cmd, out: newSignalBuffer(), err: newSignalBuffer(), over: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.err
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.over)
		_ = p.cmd.Wait() // its exit code is looked at by wait
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("%s said:\n%s", p.name, p.err)
		}
		if s := p.err.String(); strings.Contains(s, "WARNING: DATA RACE") || strings.Contains(s, "panic:") {
			t.Errorf("%s:\n%s", p.name, s)
		}
	})
	return p
}

// kill is kill -9.
func (p *proc) kill() {
	_ = p.cmd.Process.Kill() // it may be over
	<-p.over
}

// term asks it to stop in order, and waits until it has.
func (p *proc) term() int {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may be over
	return p.wait()
}

// wait waits for its end and returns its exit code, -1 for a signal.
func (p *proc) wait() int {
	p.t.Helper()
	select {
	case <-p.over:
	case <-time.After(hangLimit):
		p.t.Fatalf("%s does not end", p.name)
	}
	return p.cmd.ProcessState.ExitCode()
}

// says waits until it has said what.
func (p *proc) says(what string) {
	p.t.Helper()
	limit := time.After(hangLimit)
	for {
		s, more := p.err.after()
		if strings.Contains(s, what) {
			return
		}
		select {
		case <-more:
		case <-p.over:
			if !strings.Contains(p.err.String(), what) {
				p.t.Fatalf("%s ended without saying %q:\n%s", p.name, what, p.err)
			}
			return
		case <-limit:
			p.t.Fatalf("%s does not say %q:\n%s", p.name, what, p.err)
		}
	}
}

// testEngine is a simulated engine that counts its answers. It outlives the processes that are killed.
type testEngine struct {
	*sim.Engine
	url string

	mu      sync.Mutex
	answers int
	changed chan struct{}
}

// newEngine starts a simulated engine; it ends with the test.
func newEngine(t testing.TB, cfg sim.Config) *testEngine {
	t.Helper()
	if cfg.Models == nil {
		cfg.Models = []string{"m"}
	}
	eng, err := sim.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	e := &testEngine{Engine: eng, changed: make(chan struct{})}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.url = "http://" + ln.Addr().String()
	srv := &http.Server{Handler: e.counting(eng.Handler())}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(ln) }) // ends with ErrServerClosed
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() { _ = eng.Run(ctx) }) // ends with ctx
	t.Cleanup(func() {
		cancel()
		_ = srv.Close() // nobody is left
		wg.Wait()
	})
	return e
}

func (e *testEngine) counting(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r)
		if r.Method != http.MethodPost {
			return
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.answers++
		close(e.changed)
		e.changed = make(chan struct{})
	})
}

func (e *testEngine) count() (int, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.answers, e.changed
}

// answered waits until the engines together have answered n requests.
func answered(t testing.TB, n int, engines ...*testEngine) {
	t.Helper()
	limit := time.After(hangLimit)
	for {
		sum, any := 0, make(chan struct{}, len(engines))
		stop := make(chan struct{})
		for _, e := range engines {
			k, changed := e.count()
			sum += k
			go func() {
				select {
				case <-changed:
					any <- struct{}{}
				case <-stop:
				}
			}()
		}
		if sum >= n {
			close(stop)
			return
		}
		select {
		case <-any:
		case <-limit:
			t.Fatalf("engines answered %d requests, want %d", sum, n)
		}
		close(stop)
	}
}

// fleet is the same job over separate processes on one machine.
type fleet struct {
	t    *testing.T
	dir  string
	addr string
	env  []string
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	return &fleet{t: t, dir: t.TempDir(), addr: freePort(t)}
}

var ports sync.Map // that freePort has given

// freePort is an address nobody listens on, nor will: below the ports that the system gives to connections.
func freePort(t testing.TB) string {
	t.Helper()
	for {
		addr := fmt.Sprintf("127.0.0.1:%d", 10000+rand.IntN(20000))
		ln, err := net.Listen("tcp", addr)
		if err != nil {
			continue
		}
		ln.Close()
		if _, taken := ports.LoadOrStore(addr, true); !taken {
			return addr
		}
	}
}

func (f *fleet) path(elem ...string) string {
	return filepath.Join(append([]string{f.dir}, elem...)...)
}

func (f *fleet) start(name string, args ...string) *proc {
	f.t.Helper()
	return startProc(f.t, name, append([]string{"NATS_URL=nats://" + f.addr}, f.env...), args...)
}

// testAckWait is short, so that what a killed process held comes back soon.
const testAckWait = "2s"

func (f *fleet) broker() *proc {
	p := f.start("broker", "broker", "--addr", f.addr, "--data", f.path("broker"))
	p.says("broker ready")
	return p
}

func (f *fleet) aggregate() *proc {
	return f.start("aggregator", "aggregate", "--output", f.path("out"), "--data", f.path("aggregator"))
}

func (f *fleet) worker(i int, e *testEngine) *proc {
	return f.start(fmt.Sprintf("worker %d", i), "worker", "--engine", e.url, "--data", f.path(fmt.Sprintf("worker%d", i)),
		"--concurrency", "8", "--ack-wait", testAckWait)
}

func (f *fleet) produce(file string, more ...string) *proc {
	return f.start("producer", append([]string{"produce", file, "--data", f.path("producer"), "--ack-wait", testAckWait}, more...)...)
}

// output is the folder of the only job.
func (f *fleet) output() string {
	f.t.Helper()
	dirs, err := filepath.Glob(f.path("out", "*", "manifest.json"))
	if err != nil || len(dirs) != 1 {
		f.t.Fatalf("%d manifests in %s, want one", len(dirs), f.path("out"))
	}
	return filepath.Dir(dirs[0])
}

func (f *fleet) serve() *proc {
	p := f.start("serve", "serve", "--addr", f.addr, "--data", f.path("serve"), "--output", f.path("out"), "--ack-wait", testAckWait)
	p.says("broker ready")
	return p
}

func (f *fleet) connect(ctx context.Context) *broker.Conn {
	f.t.Helper()
	conn, err := broker.Connect(ctx, broker.Access{URL: "nats://" + f.addr}, "test", slog.New(slog.DiscardHandler))
	if err != nil {
		f.t.Fatal(err)
	}
	return conn
}

// until follows the only job until is says so.
func (f *fleet) until(is func(*broker.JobView) bool) broker.JobView {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), hangLimit)
	defer cancel()
	conn := f.connect(ctx)
	defer conn.Close()
	for {
		jobs, err := broker.Jobs(ctx, conn.JS)
		if err == nil && len(jobs) == 1 && is(&jobs[0]) {
			return jobs[0]
		}
		select {
		case <-ctx.Done():
			f.t.Fatalf("the job does not come so far: %d jobs, %v, last %+v", len(jobs), err, jobs)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// finished waits until the only job of n lines is.
func (f *fleet) finished(n int64) broker.JobView {
	f.t.Helper()
	v := f.until(func(v *broker.JobView) bool { return v.State() == broker.StateFinished })
	if v.Ended() != n {
		f.t.Errorf("%d lines ended, want %d", v.Ended(), n)
	}
	return v
}

// holds waits until the workers together hold n requests.
func (f *fleet) holds(n int64) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), hangLimit)
	defer cancel()
	conn := f.connect(ctx)
	defer conn.Close()
	for {
		var held int64
		qs, err := broker.Queues(ctx, conn.JS)
		for _, q := range qs {
			held += q.HandedTo
		}
		if err == nil && held >= n {
			return
		}
		select {
		case <-ctx.Done():
			f.t.Fatalf("the workers hold %d requests, want %d: %v", held, n, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
