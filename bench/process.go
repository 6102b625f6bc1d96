package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// usage is what a process took over its whole life.
type usage struct {
	cpu  time.Duration // user and system, by getrusage
	peak int64         // bytes of memory at its peak, by getrusage
}

// process is a child, killed when its context ends.
type process struct {
	name string
	cmd  *exec.Cmd
	out  talk // standard output
	err  talk // standard error
	over chan struct{}
	fate error // of Wait; read it after over
}

// talk collects what a process says, and lets others wait for it.
type talk struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
}

func (t *talk) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.more != nil {
		close(t.more)
		t.more = nil
	}
	return t.buf.Write(p)
}

// heard returns what was said, and a channel that closes when there is more.
func (t *talk) heard() (string, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.more == nil {
		t.more = make(chan struct{})
	}
	return t.buf.String(), t.more
}

func start(ctx context.Context, name, bin string, args ...string) (*process, error) {
	p := &process{name: name, cmd: exec.CommandContext(ctx, bin, args...), over: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.err
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		defer close(p.over)
		p.fate = p.cmd.Wait()
	}()
	return p, nil
}

// says waits until one of the process's streams holds what matches, and returns its first group.
func (p *process) says(ctx context.Context, in *talk, what *regexp.Regexp) (string, error) {
	for {
		s, more := in.heard()
		if m := what.FindStringSubmatch(s); m != nil {
			return m[1], nil
		}
		select {
		case <-more:
		case <-p.over:
			return "", p.failed("it ended early")
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

// wait waits for its end, which must be a success, and returns what it took.
func (p *process) wait() (usage, error) {
	<-p.over
	if p.fate != nil {
		return usage{}, p.failed(p.fate.Error())
	}
	u, ok := p.cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return usage{}, p.failed("the system does not tell what it took")
	}
	peak := int64(u.Maxrss)
	if runtime.GOOS != "darwin" { // getrusage(2): bytes there, kilobytes elsewhere
		peak <<= 10
	}
	return usage{cpu: p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime(), peak: peak}, nil
}

// end asks it to stop in order and waits.
func (p *process) end() (usage, error) {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // wait says if it was over before
	return p.wait()
}

// kill is for the ways out that failed.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may be over
	<-p.over
}

func (p *process) failed(why string) error {
	s, _ := p.err.heard()
	if len(s) > 2000 {
		s = "…" + s[len(s)-2000:]
	}
	return fmt.Errorf("%s: %s\n%s", p.name, why, strings.TrimSpace(s))
}

// output runs a command to its end, which must be a success, and returns what it printed.
func output(ctx context.Context, bin string, args ...string) (string, error) {
	p, err := start(ctx, bin+" "+strings.Join(args, " "), bin, args...)
	if err != nil {
		return "", err
	}
	if _, err := p.wait(); err != nil {
		return "", err
	}
	s, _ := p.out.heard()
	return s, nil
}
