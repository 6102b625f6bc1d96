package vllm_test

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"millrace/proto"
	"millrace/vllm"
)

func kill(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

// counted registers the counter of restarts and returns what reads it.
func (r *rig) counted() func(cause string, want float64) {
	c, err := vllm.NewRestarted(prometheus.NewRegistry())
	if err != nil {
		r.t.Fatal(err)
	}
	r.Restarted = c
	return func(cause string, want float64) {
		r.t.Helper()
		if got := testutil.ToFloat64(c.WithLabelValues(cause)); got != want {
			r.t.Errorf("%v restarts by cause %s, want %v", got, cause, want)
		}
	}
}

// TestKilled: the API server is killed; its EngineCore is ended before another one is started.
func TestKilled(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve")
	restarts := r.counted()
	first := r.start().up(1)
	if n := r.KVTokens(); n != 473807 {
		t.Errorf("KV cache of %d tokens", n)
	}
	kill(t, first.api, syscall.SIGKILL)
	second := r.up(2)
	if alive(first.core) {
		t.Error("EngineCore of the server that was killed lives")
	}
	restarts(vllm.CauseKilled, 1)
	r.stop()
	if alive(second.api) || alive(second.core) {
		t.Error("something of the server lives that was stopped")
	}
	if _, err := os.Stat(filepath.Join(r.Dir, vllm.RecordName)); err == nil {
		t.Error("the record of a server that was stopped is there")
	}
}

// TestStatusZero: an exit that was not asked for is a death, though vLLM ends with status 0.
func TestStatusZero(t *testing.T) {
	t.Parallel()
	r := newRig(t, `serve {"crash":true}`, "serve")
	restarts := r.counted()
	r.start().up(2)
	restarts(vllm.CauseCrashed, 0)
	restarts(vllm.CauseStartFailed, 1) // it was never up
	if s := r.said.String(); !strings.Contains(s, "status 0") || !strings.Contains(s, "engine said: ") {
		t.Errorf("said %s", s)
	}
}

// TestHung: one that hangs is killed at once, and EngineCore with it.
func TestHung(t *testing.T) {
	t.Parallel()
	r := newRig(t, "stubborn", "serve")
	restarts := r.counted()
	r.Grace = time.Hour
	first := r.start().up(1)
	kill(t, first.core, syscall.SIGSTOP)
	r.Restart("hung")
	r.Restart("hung") // by a worker that has not seen yet that it is done
	r.up(2)
	if alive(first.api) || alive(first.core) {
		t.Error("the server that hung lives")
	}
	restarts(vllm.CauseHung, 1)
	r.stop()
	if n := len(r.lives()); n != 2 {
		t.Errorf("%d starts, want 2", n)
	}
}

// TestStubborn: a server that SIGTERM does not end is killed, after its grace or when its patience ends.
func TestStubborn(t *testing.T) {
	t.Parallel()
	r := newRig(t, "stubborn")
	r.Grace = time.Millisecond
	l := r.start().up(1)
	r.stop()
	if alive(l.api) || alive(l.core) {
		t.Error("it lives")
	}
	r = newRig(t, "stubborn")
	r.Grace = time.Hour
	l = r.start().up(1)
	r.hurry()
	r.stop()
	if alive(l.api) || alive(l.core) {
		t.Error("it lives")
	}
}

// stray is a process that the script says has left its group.
func (r *rig) stray() int {
	r.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.life, "stray"))
	if err != nil {
		r.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || !alive(pid) {
		r.t.Fatalf("no stray: %v", err)
	}
	return pid
}

// TestStray: a process that left the group is ended, too.
func TestStray(t *testing.T) {
	if _, err := os.Stat("/usr/bin/setsid"); err != nil {
		t.Skip("no setsid here")
	}
	t.Parallel()
	r := newRig(t, "strays")
	r.start().up(1)
	first := r.stray()
	r.Restart("hung")
	l := r.up(2)
	second := r.stray()
	kill(t, l.api, syscall.SIGKILL)
	r.up(3)
	third := r.stray()
	r.stop()
	for _, pid := range []int{first, second, third} {
		if alive(pid) {
			t.Errorf("stray %d lives", pid)
			kill(t, pid, syscall.SIGKILL)
		}
	}
}

// TestStrayOfGone: who has left the group is ended at a clean stop, though the parent ended while the server loaded.
func TestStrayOfGone(t *testing.T) {
	if _, err := os.Stat("/usr/bin/setsid"); err != nil {
		t.Skip("no setsid here")
	}
	t.Parallel()
	r := newRig(t, "orphans")
	r.Command = append([]string{"env", "RECORD=" + filepath.Join(r.Dir, vllm.RecordName)}, r.Command...)
	r.start().up(1)
	pid := r.stray()
	r.stop()
	if alive(pid) {
		t.Errorf("stray %d lives", pid)
		kill(t, pid, syscall.SIGKILL)
	}
}

// TestFinal: what a restart cannot mend is not tried again.
func TestFinal(t *testing.T) {
	t.Parallel()
	r := newRig(t, "says "+recorded(t, "model-no-config.txt"))
	f := r.start().fails()
	if !f.Final || !strings.Contains(f.Why, "no such model") || !strings.Contains(f.Why, "check the name") || len(r.lives()) != 1 {
		t.Errorf("%d starts, %+v", len(r.lives()), f)
	}
}

// TestFinalAfterAll: where it was up before, the same reason is worth another try, and another.
func TestFinalAfterAll(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve", "says "+recorded(t, "model-no-config.txt"))
	l := r.start().up(1)
	kill(t, l.api, syscall.SIGKILL)
	f := r.fails()
	if f.Final || !strings.Contains(f.Why, "no such model") || len(r.lives()) != 4 {
		t.Errorf("%d starts, %+v", len(r.lives()), f)
	}
}

// TestBudget: a server that dies again and again is given up.
func TestBudget(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve")
	r.Restarts = 2
	restarts := r.counted()
	r.start()
	for n := range 3 {
		kill(t, r.up(n+1).api, syscall.SIGKILL)
	}
	if f := r.fails(); f.Final || !strings.Contains(f.Why, "2 times") || !strings.Contains(f.Why, "signal 9") {
		t.Errorf("%+v", f)
	}
	restarts(vllm.CauseKilled, 2)
	r.counts("(1 of 2)", "(2 of 2)")
}

// counts checks which number was said of each restart.
func (r *rig) counts(want ...string) {
	r.t.Helper()
	said := r.said.String()
	for _, n := range want {
		if !strings.Contains(said, n) {
			r.t.Errorf("%s is not said", n)
		}
	}
	if n := strings.Count(said, "it is started again"); n != len(want) {
		r.t.Errorf("%d restarts are said, want %d", n, len(want))
	}
}

// TestBudgetOfStarts: the number of a restart says which budget ends it: that of a server that was up and dies, or that of one
// that does not come up, which is smaller.
func TestBudgetOfStarts(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve", "fails")
	r.start()
	kill(t, r.up(1).api, syscall.SIGKILL)
	if f := r.fails(); !strings.Contains(f.Why, "3 times") {
		t.Errorf("%+v", f)
	}
	r.counts("(1 of 5)", "(1 of 2 while it does not come up)", "(2 of 2 while it does not come up)")
	r = newRig(t, "fails")
	r.Restarts = 1
	r.start().fails()
	r.counts("(1 of 1)")
}

// TestBudgetOfProgress: restarts of a server that has answered lines in between are forgotten.
func TestBudgetOfProgress(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve")
	r.Restarts = 1
	r.start()
	for n := range 3 {
		l := r.up(n + 1)
		if n < 2 {
			r.Answered.Add(1)
		}
		kill(t, l.api, syscall.SIGKILL)
	}
	if f := r.fails(); !strings.Contains(f.Why, "1 time ") || len(r.lives()) != 3 {
		t.Errorf("%d starts, %+v", len(r.lives()), f)
	}
}

// TestNoCommand: there is no such program.
func TestNoCommand(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.Command = []string{filepath.Join(t.TempDir(), "vllm")}
	if f := r.start().fails(); !f.Final || !strings.Contains(f.Why, "--vllm-command") {
		t.Errorf("%+v", f)
	}
}

// TestNoLog: what is wrong with the log is not taken for a command that is not there.
func TestNoLog(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve")
	if err := os.Symlink(filepath.Join(t.TempDir(), "nosuch", "log"), r.LogFile()); err != nil {
		t.Fatal(err)
	}
	if f := r.start().fails(); !strings.Contains(f.Why, "choose another --data") || strings.Contains(f.Why, "--vllm-command") {
		t.Errorf("%+v", f)
	}
}

// TestPortTaken: a server is not mistaken for another one that has its port.
func TestPortTaken(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve")
	ln, err := net.Listen("tcp", strings.TrimPrefix(r.String(), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	other := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"data":[{"id":"m"}]}`)) // looks like one
	})}
	served := make(chan error)
	go func() { served <- other.Serve(ln) }()
	r.Restarts = 4 // more than starts in a row that may fail for other reasons
	f := r.start().fails()
	other.Close()
	<-served
	if f.Final || !strings.Contains(f.Why, "is taken") || !strings.Contains(f.Why, "4 times") || len(r.lives()) != 0 {
		t.Errorf("%d starts, %+v", len(r.lives()), f)
	}
}

// TestQuiet: a server that says nothing new and does not come up is ended.
func TestQuiet(t *testing.T) {
	t.Parallel()
	r := newRig(t, "quiet")
	r.Quiet = time.Millisecond
	r.start()
	r.state(proto.EngineWaiting, "nothing new", "--engine-start-timeout")
}

// TestOtherModel: a server that lists another model is not ready.
func TestOtherModel(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve")
	r.Flags = vllm.Flags{"--served-model-name", "n"}
	r.start().up(1)
	if s := strings.Join(r.CommandLine(), " "); !strings.HasSuffix(s, "serve m --served-model-name n --disable-uvicorn-access-log --host 127.0.0.1 --port "+strconv.Itoa(r.Port)) {
		t.Errorf("started with %s", s)
	}
}

// TestAnswersOther: one that comes up under another name is not waited for, and not started again: it is said what to do.
func TestAnswersOther(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve")
	r.Flags = vllm.Flags{"--served-model-name=other"} // the script does not see it
	r.start()
	if f := r.fails(); !f.Final || len(r.lives()) != 1 ||
		f.Why != "vLLM is up and serves m, not other; have it served by that name (-- --served-model-name other), or let every line ask for m (--model)" {
		t.Errorf("%d starts, %+v", len(r.lives()), f)
	}
}

// answer has another program answer at the port of a server that starts, until the function is called that it returns.
func (r *rig) answer(do http.HandlerFunc) (leave func()) {
	r.t.Helper()
	r.state(proto.EngineWaiting, "vLLM is starting") // until then the port must be free
	ln, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(r.Port))
	if err != nil {
		r.t.Fatal(err)
	}
	srv := &http.Server{Handler: do}
	over := make(chan error, 1)
	go func() { over <- srv.Serve(ln) }()
	return func() {
		if err := srv.Close(); err != nil {
			r.t.Error(err)
		}
		<-over
	}
}

// TestForeign: another program that answers while the server loads is not taken for it, whatever it lists.
func TestForeign(t *testing.T) {
	t.Parallel()
	r := newRig(t, "mute")
	r.start()
	leave := r.answer(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"data":[{"id":"x"}]}`)) })
	r.state(proto.EngineWaiting, "vLLM is starting", "lists x, not m")
	leave()
	r.write("seen", "")
	r.up(1)
}

// TestAnswersNo: one that answers and is not well says what it answers while it starts.
func TestAnswersNo(t *testing.T) {
	t.Parallel()
	r := newRig(t, "quiet")
	r.start()
	leave := r.answer(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	r.state(proto.EngineWaiting, "vLLM is starting", "; its /health says 503 Service Unavailable")
	leave()
}

// TestOrphan: what a killed millrace left is ended; what is not ours is not.
func TestOrphan(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve")
	l := r.start().up(1)
	record := filepath.Join(r.Dir, vllm.RecordName)
	b, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	left := func(b []byte) string { // as that one would have left it
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, vllm.RecordName), b, 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	other := []byte(strings.ReplaceAll(string(b), `":"`, `":"1`)) // ids of ours that began at other times
	for _, c := range []struct {
		dir, host string
	}{{left(b), "here/other boot"}, {left(other), "1here/boot"}, {left([]byte("{")), "here/boot"}, {t.TempDir(), "here/boot"}} {
		if n, err := vllm.EndOrphan(c.dir, c.host); n != 0 || err != nil {
			t.Errorf("%d ended that are not ours, %v", n, err)
		}
		if _, err := os.Stat(filepath.Join(c.dir, vllm.RecordName)); err == nil {
			t.Error("the record stays")
		}
	}
	if !alive(l.api) || !alive(l.core) {
		t.Fatal("it was ended")
	}
	// Though none is in the group that is written down.
	b = regexp.MustCompile(`"group":\d+`).ReplaceAll(b, []byte(`"group":2147483647`))
	if n, err := vllm.EndOrphan(left(b), "here/boot"); n != 2 || err != nil {
		t.Errorf("%d ended, want 2; %v", n, err)
	}
	if alive(l.api) || alive(l.core) {
		t.Error("the orphan lives")
	}
}

// TestLog: the log is kept, up to its size.
func TestLog(t *testing.T) {
	t.Parallel()
	r := newRig(t, "serve")
	if err := os.WriteFile(r.LogFile(), make([]byte, vllm.JournalSize-1), 0o600); err != nil {
		t.Fatal(err)
	}
	r.start().up(1)
	r.stop()
	now, err := os.ReadFile(r.LogFile())
	if err != nil || !strings.Contains(string(now), "Starting to load model m") || !strings.Contains(string(now), "serve m --disable-uvicorn-access-log --host") {
		t.Errorf("the log is %.300s, %v", now, err)
	}
	if before, err := os.Stat(r.LogFile() + ".1"); err != nil || before.Size() != vllm.JournalSize-1 {
		t.Errorf("the log before: %v", err)
	}
}

func TestLoading(t *testing.T) {
	for _, c := range []struct {
		took         time.Duration
		phase, cause string
		want         string
	}{
		{time.Second, "", "", "vLLM is starting"},
		{47 * time.Second, "loading weights", "", "vLLM is starting (40 s): loading weights"},
		{119 * time.Second, "compiling", "", "vLLM is starting (1 min 30 s): compiling"},
		{2 * time.Minute, "", "", "vLLM is starting (2 min)"},
		{47 * time.Second, "compiling", vllm.CauseCrashed, "vLLM is starting again after it crashed (40 s): compiling"},
	} {
		if got := vllm.Loading(c.took, c.phase, c.cause); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
	for _, cause := range vllm.Causes() {
		if got := vllm.Loading(0, "", cause); strings.HasSuffix(got, "after ") {
			t.Errorf("%s has no words", cause)
		}
	}
}

// TestStartingAgain: of a server that starts again it is said why.
func TestStartingAgain(t *testing.T) {
	r := newRig(t, "fails", "quiet").start()
	r.state(proto.EngineWaiting, "vLLM is starting again after it did not come up")
}
