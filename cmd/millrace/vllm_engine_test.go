//go:build vllm && linux

package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// realVLLM is a real engine on the CPU. It runs at one port for all cases, and is started again at it when it has died.
type realVLLM struct {
	addr   string
	tmp    string // its TMPDIR
	log    string
	cmd    *exec.Cmd
	over   chan struct{} // closed when the process that was started, the API server, has ended
	starts int
	took   time.Duration // all starts together
}

// vllmHome is what testdata/vllm-cpu/setup.sh has made.
const vllmHome = "../../.vllm"

// newVLLM prepares an engine; nothing of it is left after the test.
func newVLLM(t *testing.T) *realVLLM {
	t.Helper()
	if _, err := os.Stat(filepath.Join(vllmHome, "venv", "bin", "vllm")); err != nil {
		t.Fatalf("%v; make test-vllm sets it up", err)
	}
	tmp, err := os.MkdirTemp("", "vllm") // short: the names of sockets are made of it
	if err != nil {
		t.Fatal(err)
	}
	e := &realVLLM{addr: freePort(t), tmp: tmp, log: filepath.Join(t.TempDir(), "engine.log")}
	t.Cleanup(func() {
		e.end(t)
		if t.Failed() {
			b, _ := os.ReadFile(e.log) // it may never have been started
			t.Logf("the engine said at last:\n%s", b[max(0, len(b)-8000):])
		}
		if err := os.RemoveAll(tmp); err != nil {
			t.Error(err)
		}
	})
	return e
}

func (e *realVLLM) url() string { return "http://" + e.addr }

// start starts the engine, unless it is well, and returns when it is ready.
func (e *realVLLM) start(t *testing.T, options ...string) {
	t.Helper()
	if e.cmd != nil && get(e.url()+"/health") == nil {
		return
	}
	e.end(t) // what a case that failed has left
	log, err := os.OpenFile(e.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	model, err := filepath.Abs(filepath.Join(vllmHome, "model"))
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(e.addr) // freePort has made it
	cmd := exec.Command("../../testdata/vllm-cpu/serve.sh", append([]string{filepath.Join(vllmHome, "venv"), model, port}, options...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+e.tmp)
	cmd.Stdout, cmd.Stderr = log, log
	// A group of its own, to be killed as one. It must not outlive a test that is interrupted.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	begun, started := time.Now(), make(chan error)
	e.over = make(chan struct{})
	go func() {
		runtime.LockOSThread() // Pdeathsig is sent when this thread ends
		defer close(e.over)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its state
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	e.cmd = cmd
	poll(t, "the engine is ready", func() bool {
		select {
		case <-e.over:
			t.Fatalf("the engine ended at its start: %v", cmd.ProcessState)
		default:
		}
		return get(e.url()+"/health") == nil
	})
	e.starts++
	e.took += time.Since(begun)
}

// core is the EngineCore process, a child of the one that was started.
func (e *realVLLM) core(t *testing.T) int {
	t.Helper()
	for _, p := range processes(t) {
		if p.parent == e.cmd.Process.Pid && strings.HasPrefix(p.name, "VLLM::EngineCor") { // the kernel keeps 15 bytes
			return p.id
		}
	}
	t.Fatal("the engine has no EngineCore")
	return 0
}

// send sends a signal to one process of the engine, or (id below zero) to its group.
func send(t *testing.T, id int, what syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(id, what); err != nil {
		t.Fatalf("send a signal to %d: %v", id, err)
	}
}

// gone says whether no process of the engine lives.
func (e *realVLLM) gone(t *testing.T) bool {
	t.Helper()
	for _, p := range processes(t) {
		if p.group == e.cmd.Process.Pid {
			return false
		}
	}
	return true
}

// ended waits until the API server has ended by itself, and returns how.
func (e *realVLLM) ended(t *testing.T) string {
	t.Helper()
	select {
	case <-e.over:
	case <-time.After(hangLimit):
		t.Fatal("the API server does not end")
	}
	return e.cmd.ProcessState.String()
}

// end kills what is left of the engine.
func (e *realVLLM) end(t *testing.T) {
	t.Helper()
	if e.cmd == nil {
		return
	}
	if !e.gone(t) {
		_ = syscall.Kill(-e.cmd.Process.Pid, syscall.SIGKILL) // it may just have gone
	}
	<-e.over
	poll(t, "the engine is gone", func() bool { return e.gone(t) })
	e.cmd = nil
}

// process is a row of the process table.
type process struct {
	id, parent, group int
	name              string
}

// processes lists those that live.
func processes(t *testing.T) []process {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var out []process
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		s := string(b)
		open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
		f := strings.Fields(s[end+1:])
		if f[0] == "Z" || f[0] == "X" {
			continue // it is dead, nobody has taken notice
		}
		p := process{name: s[open+1 : end]}
		p.id, _ = strconv.Atoi(strings.TrimSpace(s[:open])) // numbers, as proc(5) says
		p.parent, _ = strconv.Atoi(f[1])
		p.group, _ = strconv.Atoi(f[2])
		out = append(out, p)
	}
	return out
}

// pollLimit is longer than a worker takes to call an engine hung.
const pollLimit = 3 * time.Minute

// poll waits for what no event tells.
func poll(t *testing.T, what string, is func() bool) {
	t.Helper()
	for limit := time.Now().Add(pollLimit); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("it does not come so far that %s", what)
		}
	}
}

// get says whether a URL answers with 200.
func get(url string) error {
	_, err := fetch(url)
	return err
}

var client = &http.Client{Timeout: 30 * time.Second}

func fetch(url string) ([]byte, error) {
	r, err := client.Get(url)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("HTTP %d", r.StatusCode)
	}
	return b, err
}

// samples are metrics in Prometheus' text.
type samples string

// scrape reads /metrics; empty: there is none to be read.
func scrape(base string) samples {
	b, err := fetch(base + "/metrics")
	if err != nil {
		return ""
	}
	return samples(b)
}

// sum adds up the samples of a name that have all the labels, each given as name="value".
func (s samples) sum(name string, labels ...string) int64 {
	sum := 0.0
next:
	for line := range strings.Lines(string(s)) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(rest, l) {
				continue next
			}
		}
		v, _ := strconv.ParseFloat(strings.TrimSpace(rest[strings.LastIndexByte(rest, ' ')+1:]), 64) // the format says so
		sum += v
	}
	return int64(sum)
}
