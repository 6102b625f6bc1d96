package vllm_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"millrace/proto"
	"millrace/sim"
	"millrace/vllm"
)

// TestMain makes the test binary the simulated engine, too, so that it runs as a process that can be killed.
func TestMain(m *testing.M) {
	if len(os.Args) == 5 && os.Args[1] == "sim" {
		os.Exit(simulate(os.Args[2], os.Args[3], os.Args[4]))
	}
	goleak.VerifyTestMain(m)
}

func simulate(port, model, faults string) int {
	f, err := sim.ParseFaults([]byte(faults))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	eng, err := sim.New(sim.Config{Models: []string{model}, Faults: f})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	ctx, done := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer done()
	if os.Getenv("STUBBORN") != "" {
		signal.Ignore(syscall.SIGTERM)
	}
	if err := eng.ListenAndServe(ctx, "127.0.0.1:"+port, func(net.Addr) {}); err != nil {
		fmt.Println(err)
	}
	return 0
}

const patient = 30 * time.Second // how long a test waits for what must come

// rig is a Server whose vLLM is testdata/vllm.sh.
type rig struct {
	*vllm.Server
	t     *testing.T
	life  string // folder that tells the script what to do
	said  *said
	end   context.CancelFunc
	hurry context.CancelFunc
	over  chan struct{}
	err   error // what Run returned, once over is closed
}

// newRig prepares a server. Plans say what its starts do, the last one all that follow, too.
func newRig(t *testing.T, plans ...string) *rig {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script, err := filepath.Abs("testdata/vllm.sh")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, life: t.TempDir(), said: &said{more: make(chan struct{})}, over: make(chan struct{})}
	for i, plan := range plans {
		n := i + 1
		if n == len(plans) {
			n = 0
		}
		r.write(strconv.Itoa(n), plan)
	}
	port, err := vllm.FreePort(taken)
	if err != nil {
		t.Fatal(err)
	}
	r.Server = &vllm.Server{Command: []string{"env", "LIFE=" + r.life, "SIM=" + self + " sim", script}, Model: "m", Port: port, Dir: t.TempDir(),
		Host: "here/boot", Restarts: 5, Log: slog.New(slog.NewTextHandler(r.said, nil))}
	r.Quicken()
	return r
}

var ports sync.Map // that tests have

func taken(port int) bool {
	_, is := ports.LoadOrStore(port, true)
	return is
}

func (r *rig) write(name, s string) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.life, name), []byte(s), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// start runs the server until the end of the test.
func (r *rig) start() *rig {
	r.t.Helper()
	live, end := context.WithCancel(context.Background())
	patience, hurry := context.WithCancel(context.Background())
	r.end, r.hurry = end, hurry
	go func() {
		defer close(r.over)
		r.err = r.Run(live, patience)
	}()
	r.t.Cleanup(func() {
		hurry()
		end()
		<-r.over
		if r.t.Failed() {
			b, _ := os.ReadFile(r.LogFile()) // there may be none
			r.t.Logf("the log of the server:\n%s\nsaid:\n%s", b, r.said)
		}
		for _, l := range r.lives() {
			if alive(l.api) || alive(l.core) {
				r.t.Errorf("of start %+v something lives", l)
			}
		}
	})
	return r
}

// state waits until the server says that, with a reason that has all of these in it.
func (r *rig) state(want string, has ...string) string {
	r.t.Helper()
	limit := time.After(patient)
	for {
		state, reason := r.State()
		all := state == want
		for _, part := range has {
			all = all && strings.Contains(reason, part)
		}
		if all {
			return reason
		}
		select {
		case <-r.Changed():
		case <-limit:
			r.t.Fatalf("the server is %q, %q; want %q, %q", state, reason, want, has)
		}
	}
}

// up waits until the server is, for the n-th time.
func (r *rig) up(n int) life {
	r.t.Helper()
	for {
		r.state("")
		if ls := r.lives(); len(ls) >= n {
			return ls[n-1]
		}
		r.await(fmt.Sprintf("start %d", n))
	}
}

// await waits for the next change of state.
func (r *rig) await(what string) {
	r.t.Helper()
	select {
	case <-r.Changed():
	case <-time.After(patient):
		r.t.Fatalf("%s does not come", what)
	}
}

// fails waits until the server was given up.
func (r *rig) fails() *vllm.Failed {
	r.t.Helper()
	select {
	case <-r.over:
	case <-time.After(patient):
		state, reason := r.State()
		r.t.Fatalf("the server is not given up: %s, %s", state, reason)
	}
	var f *vllm.Failed
	if !errors.As(r.err, &f) {
		r.t.Fatalf("it ended with %v", r.err)
	}
	if state, reason := r.State(); state != proto.EngineDegraded || !strings.HasPrefix(reason, f.Why) {
		r.t.Errorf("it is %s, %q, and failed with %q", state, reason, f.Why)
	}
	return f
}

// stop ends the server in order and waits for it.
func (r *rig) stop() {
	r.t.Helper()
	r.end()
	select {
	case <-r.over:
	case <-time.After(patient):
		r.t.Fatal("the server does not end")
	}
	if r.err != nil {
		r.t.Errorf("it ended with %v", r.err)
	}
}

// life is one start of the script.
type life struct {
	api, core int
	gpus      string
	port      string
}

func (r *rig) lives() (all []life) {
	b, err := os.ReadFile(filepath.Join(r.life, "log"))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		var l life
		if n, err := fmt.Sscan(line, &l.api, &l.core, &l.gpus, &l.port); n == 4 && err == nil {
			all = append(all, l)
		}
	}
	return all
}

// alive says whether a process is there and is no zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return syscall.Kill(pid, 0) == nil && !proc()
	}
	s := string(b)
	return !strings.HasPrefix(s[strings.LastIndexByte(s, ')')+1:], " Z")
}

func proc() bool {
	_, err := os.Stat("/proc/self/stat")
	return err == nil
}

// said is what was logged.
type said struct {
	mu   sync.Mutex
	buf  strings.Builder
	more chan struct{}
}

func (s *said) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(b)
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}
