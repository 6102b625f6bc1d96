// Package vllm starts, watches, restarts and ends one vLLM server. Its process has a group of its own, which is ended as
// a whole: EngineCore and Worker outlive an API server that is killed, and keep the GPU. No exit that was not asked for is
// a clean one, whatever its status: the API server of a dead engine ends with 0.
//
//	Flags     what the user gives behind --, and what follows from it    flags.go
//	process   a server process and its group                            process.go, group_linux.go, group_other.go
//	tune      what it is asked for beside the user's flags              tune.go, graphs.go
//	share     several servers of a very small model on one card         share.go
//	journal   its log: a file of limited size, and what was said last    journal.go
//	reasons   what a dead server's log says, and what to do              reasons.go
//	budget    how often it is started again                              budget.go
//	record    says on disk which process is ours, for the next start     record.go
package vllm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// Server keeps one vLLM server running at one port of the loopback interface. Its fields may be set until Run.
type Server struct {
	Command []string // what comes before `serve`; nil: vllm
	Model   string   // a name or a folder
	Flags   Flags
	Port    int
	GPUs    []string // that it may use, as in CUDA_VISIBLE_DEVICES; nil: as the environment says
	Key     string   // that it asks for; empty: none
	Dir     string   // of its log and of the record of its process; nobody else uses it
	Host    string   // names the machine and the scope of its process ids; empty: no process is found again

	Mates    *Mates        // the servers on its card, where there are several
	ByBus    bool          // GPUs are numbered as nvidia-smi does it
	Quiet    time.Duration // for how long a server that starts may say nothing new; 0: 15 min
	Grace    time.Duration // from SIGTERM to SIGKILL; 0: 15 s
	Restarts int           // until it is given up, those without what Tune asked for aside; counted anew when it has answered lines since, or was well for ten minutes

	Answered atomic.Int64 // lines that it has answered; whoever sends them counts

	Log       *slog.Logger           // nil: none
	Restarted *prometheus.CounterVec // see NewRestarted; nil: nobody counts

	pause time.Duration  // before the first restart; 0: 500 ms
	left  map[int]string // processes of servers before that did not go, and when each began

	mu      sync.Mutex
	state   string // as State returns it
	reason  string
	up      bool
	changed chan struct{}
	kill    chan string // causes for which the server is to be ended
	kv      int64
	graphs  int64
	extra   Flags  // our own, see Tune
	alone   Flags  // those for when it has its card alone; nil: extra are
	part    Flags  // those that it had before, if it came up with them; see back
	again   int64  // restarts
	cause   string // of the last one
}

const (
	lookEvery  = 250 * time.Millisecond // at a server that starts
	countEvery = 10 * time.Second       // at the processes of one that is up
)

// Failed is the error of a server that will not be started again.
type Failed struct {
	Why   string
	Final bool // no restart would mend it: it never came up
}

func (f *Failed) Error() string { return f.Why }

// String is where the server listens.
func (s *Server) String() string { return "http://127.0.0.1:" + strconv.Itoa(s.Port) }

// State says why the server cannot be asked: one of the proto.Engine states, and why. Both are empty when it can.
func (s *Server) State() (state, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.init()
	return s.state, s.reason
}

// Changed gets a value when State says something else. It is for one reader.
func (s *Server) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.init()
	return s.changed
}

// Restart ends a server that hangs, and starts it again. It returns at once, and does nothing where the server is not up.
func (s *Server) Restart(cause string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.init()
	if s.up {
		s.up = false
		s.kill <- cause // it has room: once emptied it
	}
}

// Devices are the GPUs that it may use, as nvidia-smi numbers and names them; nil: that is not known.
func (s *Server) Devices() []string {
	if !s.ByBus && slices.ContainsFunc(s.GPUs, func(id string) bool { return !strings.HasPrefix(id, "GPU-") }) {
		return nil
	}
	return s.GPUs
}

// KVTokens is the capacity of the KV cache in tokens, as the log of the running server says; 0: it does not.
func (s *Server) KVTokens() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kv
}

// CommandLine is what the server is started with.
func (s *Server) CommandLine() []string { return s.commandLine(s.flags().given()) }

// commandLine is a command line with such flags.
func (s *Server) commandLine(flags []string) []string {
	command := s.Command
	if len(command) == 0 {
		command = []string{"vllm"}
	}
	return slices.Concat(command, []string{"serve", s.Model}, flags, s.withoutAccessLog(),
		[]string{"--host", "127.0.0.1", "--port", strconv.Itoa(s.Port)})
}

// init makes what the first use needs. Called with mu held.
func (s *Server) init() {
	if s.changed == nil {
		s.changed, s.kill = make(chan struct{}, 1), make(chan string, 1)
		s.state, s.reason = proto.EngineWaiting, "engine is not started yet"
	}
}

// set changes what State says.
func (s *Server) set(up bool, state, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.init()
	s.up = up
	if s.state == state && s.reason == reason {
		return
	}
	s.state, s.reason = state, reason
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

func (s *Server) complete() error {
	switch {
	case s.Model == "":
		return errors.New("run vLLM: no model")
	case s.Port <= 0:
		return errors.New("run vLLM: no port")
	case s.Dir == "":
		return errors.New("run vLLM: no folder")
	}
	s.mu.Lock()
	s.init()
	s.mu.Unlock()
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	for v, d := range map[*time.Duration]time.Duration{&s.Quiet: 15 * time.Minute, &s.Grace: 15 * time.Second, &s.pause: 500 * time.Millisecond} {
		if *v <= 0 {
			*v = d
		}
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return fmt.Errorf("make folder for vLLM's log: %w; choose another --data", err)
	}
	return nil
}

// Run keeps the server running until live ends. Then it is asked to stop, and killed after Grace or when patience ends.
// Nothing of its processes is left when Run returns, unless the system does not end them: that is logged, and they are
// in the record. The error is a *Failed where it was given up before.
func (s *Server) Run(live, patience context.Context) error {
	if err := s.complete(); err != nil {
		return err
	}
	var t tally
	for {
		s.settle(t.came)
		end := s.once(live, patience)
		if live.Err() != nil {
			s.set(false, proto.EngineWaiting, "engine is stopped")
			return nil
		}
		if failed := s.aside(end, &t); failed != nil {
			s.set(false, proto.EngineDegraded, failed.Why)
			return failed
		}
		if how := s.otherwise(end, t.came); how != "" {
			s.Log.Warn(fmt.Sprintf("%s; it is tried %s", end.why, how), "engine", s.String(), "log", s.LogFile())
			t.others++
			s.count(end.cause)
			continue
		}
		pause, failed := t.judge(end, s)
		if failed != nil {
			s.Mates.leave()
			s.set(false, proto.EngineDegraded, failed.Why+"; mend that, and start millrace again")
			return failed
		}
		when := ""
		if pause >= time.Second {
			when = " in " + short(pause)
		}
		why := fmt.Sprintf("%s; it is started again%s (%s)", end.why, when, t.number(end, s))
		s.Log.Warn(why, "engine", s.String(), "log", s.LogFile())
		s.set(false, proto.EngineWaiting, why)
		s.count(end.cause)
		select {
		case <-live.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// count counts a restart.
func (s *Server) count(cause string) {
	s.mu.Lock()
	s.again, s.cause = s.again+1, cause
	s.mu.Unlock()
	if s.Restarted != nil {
		s.Restarted.WithLabelValues(cause).Inc()
	}
}

// Again is how often the server was started again since Run began, and the cause of the last time, one of Causes.
func (s *Server) Again() (n int64, cause string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.again, s.cause
}

// once starts the server and watches it to its end.
func (s *Server) once(live, patience context.Context) ending {
	s.set(false, proto.EngineWaiting, "engine is starting")
	s.mu.Lock()
	s.kv, s.graphs = 0, 0
	select {
	case <-s.kill: // it was for the one before
	default:
	}
	s.mu.Unlock()
	p, err := s.launch()
	if err != nil {
		return notStarted(s.CommandLine()[0], err)
	}
	w := &watch{Server: s, process: p, began: time.Now()}
	return w.run(live, patience)
}

// watch is one life of the server.
type watch struct {
	*Server
	*process
	began time.Time
	upAt  time.Time // zero: it is not up yet
	says  string    // what it answers while it is not up
}

func (w *watch) run(live, patience context.Context) ending {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		select {
		case <-live.Done():
			w.stop(patience)
			return ending{}
		case <-w.over:
			return w.died()
		case cause := <-w.kill:
			why := "engine made no progress and was killed"
			if cause == "gone" {
				why = "engine did not answer any more, though its process was there, and was killed"
			}
			return w.killed(cause, why)
		case <-look.C:
			w.record.see()
			if !w.upAt.IsZero() {
				continue
			}
			ready, other := w.look(live)
			if other != nil {
				e := w.killed(CauseStartFailed, other.Error())
				e.final = true
				return e
			}
			if ready {
				look.Reset(countEvery)
				continue
			}
			if quiet := time.Since(w.journal.last()); quiet >= w.Quiet {
				return w.killed(CauseStartFailed, fmt.Sprintf("engine logged nothing new for %s while it started and was killed%s; --engine-start-timeout says how long that may be", short(quiet), w.but()))
			}
		}
	}
}

// look asks a server that starts whether it is up, and says how far it is; or that it is up under other names.
func (w *watch) look(ctx context.Context) (bool, *otherModel) {
	took := time.Since(w.began)
	ready, says, other := w.ready(ctx)
	if other != nil && w.journal.phase() != answers { // so this may be another program
		says, other = other.lists(), nil
	}
	if !ready {
		w.says = says
		_, cause := w.Again()
		w.set(false, proto.EngineWaiting, loading(took, w.journal.phase(), cause)+w.but())
		return false, other
	}
	w.upAt = time.Now()
	w.mu.Lock()
	w.kv, w.graphs = w.journal.told()
	w.mu.Unlock()
	w.Log.Info("engine is up", "engine", w.String(), "after", took.Round(time.Second).String())
	w.set(true, "", "")
	return true, nil
}

// but says what a server answers that is not up; empty: nothing.
func (w *watch) but() string {
	if w.says == "" {
		return ""
	}
	return "; " + w.says
}

// died deals with a server that ended by itself.
func (w *watch) died() ending {
	w.set(false, proto.EngineWaiting, "engine died")
	w.end()
	e := ending{cause: CauseCrashed, why: "engine died", well: w.well()}
	if e.well == 0 {
		e.cause, e.why = CauseStartFailed, "engine does not start"
	}
	how, killed := w.how()
	e.itself = !killed
	if r, line := recognise(w.journal.tail()); r != nil {
		e.said = r.words(line)
		e.why += ": " + r.say(line)
		e.line, e.reason, e.final, e.passes = line, r.name, r.final, r.passes
		if r.cause != "" {
			e.cause = r.cause
		}
	} else {
		e.said = "its process " + how
		e.why += ": " + e.said
		if killed {
			e.cause = CauseKilled
			return e
		}
		for _, line := range telling(w.journal.tail()) {
			w.Log.Warn("engine said: " + line)
		}
	}
	return e
}

// killed ends a server that does not answer, or not in time.
func (w *watch) killed(cause, why string) ending {
	w.set(false, proto.EngineWaiting, why)
	w.end()
	return ending{cause: bounded(cause), why: why, well: w.well()}
}

func (w *watch) well() time.Duration {
	if w.upAt.IsZero() {
		return 0
	}
	return max(time.Since(w.upAt), 1)
}

// stop asks the server to end, and sees to it that it does.
func (w *watch) stop(patience context.Context) {
	w.set(false, proto.EngineWaiting, "engine is stopped")
	w.record.see() // who came since
	w.terminate()
	grace := time.NewTimer(w.Grace)
	defer grace.Stop()
	select {
	case <-w.over:
	case <-grace.C:
	case <-patience.Done():
	}
	w.end()
}

// end ends what is left of the server.
func (w *watch) end() {
	w.left = nil
	if left := w.process.end(); len(left) > 0 {
		w.left = w.record.Members
		w.Log.Error("processes of the engine do not go, and may keep its GPU; see why (ps -o pid,stat,user,wchan)", "engine", w.String(), "processes", left)
	}
}

func (s *Server) file(name string) string { return filepath.Join(s.Dir, name) }

// LogFile is where what the server says is kept: at most 16 MiB, and as much in the file before it.
func (s *Server) LogFile() string { return s.file("engine.log") }
