package vllm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// process is a server process and its group, whose id is that of the process.
type process struct {
	cmd     *exec.Cmd
	group   int
	over    chan struct{} // closed when the process that was started has ended
	said    *os.File      // the end of its output that we read
	read    chan struct{} // closed when all of that is read
	journal *journal
	record  *record
	client  *http.Client
	models  []string // that it must list; nil: any
	base    string
	key     string
}

// launch starts the server process.
func (s *Server) launch() (*process, error) {
	// Whoever else has the port would be taken for it while it loads.
	ln, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(s.Port))
	if err != nil {
		return nil, portTaken(s.Port)
	}
	ln.Close()
	j, err := openJournal(s.LogFile())
	if err != nil {
		return nil, err
	}
	said, out, err := os.Pipe()
	if err != nil {
		j.close()
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	line := s.CommandLine()
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = s.environment(), out, out, attributes()
	p := &process{cmd: cmd, over: make(chan struct{}), said: said, read: make(chan struct{}), journal: j, models: s.Flags.names(s.Model),
		base: s.String(), key: s.Key, client: &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}}
	j.note(strings.Join(slices.Concat(line[:len(line)-len(s.Flags.given())-4], s.Flags.Shown(), line[len(line)-4:]), " "))
	err = p.start()
	out.Close()
	if err != nil {
		said.Close()
		j.close()
		return nil, err
	}
	go func() {
		defer close(p.read)
		j.copy(said)
	}()
	p.record = &record{name: s.file(recordName), Host: s.Host, Group: p.group}
	p.record.members(p.group)
	return p, nil
}

// start starts the process. The thread that did so lives on until the process has ended: where the system can end a
// process with its parent, it takes the end of that thread for it.
func (p *process) start() error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer close(p.over)
		err := p.cmd.Start()
		if err == nil {
			p.group = p.cmd.Process.Pid
		}
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // how it ended is in its state
		}
	}()
	return <-started
}

// environment is ours without what is nobody else's business.
func (s *Server) environment() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		// An API server that stays when its engine is dead would not be noticed to be.
		return strings.HasPrefix(v, "MILLRACE_") || strings.HasPrefix(v, "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH=")
	})
	if s.GPUs != nil {
		// Numbers are then those of nvidia-smi; without it CUDA puts the fastest first.
		env = append(env, "CUDA_VISIBLE_DEVICES="+strings.Join(s.GPUs, ","), "CUDA_DEVICE_ORDER=PCI_BUS_ID")
	}
	if s.Key != "" {
		env = append(env, "VLLM_API_KEY="+s.Key) // not among the arguments, which everybody may read
	}
	return env
}

// terminate asks the API server to stop; it ends the others.
func (p *process) terminate() { _ = p.cmd.Process.Signal(syscall.SIGTERM) } // it may have ended

const (
	endEvery = 50 * time.Millisecond // looks at a group that was killed
	endMost  = time.Minute           // until one that does not go is let be
)

// end kills what is left of the group and waits until nothing of it lives and all that it said is read.
func (p *process) end() {
	endGroup(p.group, p.record.Members)
	<-p.over // it was in the group
	select {
	case <-p.read:
	case <-time.After(time.Second): // who left the group may hold the other end
		_ = p.said.SetReadDeadline(time.Now())
		<-p.read
	}
	p.said.Close()
	p.journal.close()
	p.record.remove()
}

// endGroup kills a group, those who came from it and those who were known to (by when they began), and waits until they
// are gone.
func endGroup(group int, known map[int]string) (left int) {
	for limit := time.Now().Add(endMost); ; time.Sleep(endEvery) {
		all, err := processes()
		if err != nil { // then the group alone
			_ = syscall.Kill(-group, syscall.SIGKILL)
			return 0
		}
		ours := family(all, group, known)
		if len(ours) == 0 || time.Now().After(limit) {
			return len(ours)
		}
		_ = syscall.Kill(-group, syscall.SIGKILL) // it may just have gone
		for _, p := range ours {
			if p.group != group {
				_ = syscall.Kill(p.id, syscall.SIGKILL)
			}
		}
	}
}

// proc is a row of the process table.
type proc struct {
	id, parent, group int
	start             string // when it began, in the system's words
}

// family are the living processes of a group, those that are known by when they began, and those that came from them and
// left it.
func family(all []proc, group int, known map[int]string) []proc {
	ours := map[int]bool{}
	for _, p := range all {
		start, is := known[p.id]
		ours[p.id] = is && start == p.start
	}
	for more := true; more; {
		more = false
		for _, p := range all {
			if !ours[p.id] && (p.group == group || ours[p.parent]) {
				ours[p.id], more = true, true
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(p proc) bool { return !ours[p.id] })
}

// how says how the process ended, and whether it was by a signal.
func (p *process) how() (string, bool) {
	st := p.cmd.ProcessState
	if w, ok := st.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		how := fmt.Sprintf("was killed by signal %d (%s)", w.Signal(), w.Signal())
		if w.Signal() == syscall.SIGKILL {
			how += "; perhaps the machine's memory was short (see dmesg)"
		}
		return how, true
	}
	return fmt.Sprintf("ended with status %d, and said nothing that is known here; its log tells more", st.ExitCode()), false
}

// ready says whether the server is well and lists the model.
func (p *process) ready(ctx context.Context) bool {
	if _, err := p.get(ctx, "/health"); err != nil {
		return false
	}
	b, err := p.get(ctx, "/v1/models")
	if err != nil {
		return false
	}
	var list struct {
		Data []struct {
			ID string `json:"id"`
		} `json:"data"`
	}
	if json.Unmarshal(b, &list, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)) != nil {
		return false
	}
	for _, m := range list.Data {
		if p.models == nil || slices.Contains(p.models, m.ID) {
			return true
		}
	}
	return false
}

func (p *process) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.base+path, nil)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	if p.key != "" {
		req.Header.Set("Authorization", "Bearer "+p.key)
	}
	r, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return nil, errors.New(r.Status)
	}
	return io.ReadAll(io.LimitReader(r.Body, 1<<20))
}
