package vllm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
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

	"millrace/proto"
)

// process is a server process and its group, whose id is that of the process.
type process struct {
	cmd     *exec.Cmd
	group   int
	over    chan struct{} // closed when the process that was started has ended
	reap    chan struct{} // closed when its number may be given away
	reaped  chan struct{} // closed when it may have been
	said    *os.File      // the end of its output that we read
	read    chan struct{} // closed when all of that is taken in
	journal *journal
	record  *record
	client  *http.Client
	models  []string // of which it must list one
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
	p := &process{cmd: cmd, over: make(chan struct{}), reap: make(chan struct{}), reaped: make(chan struct{}), said: said, read: make(chan struct{}),
		journal: j, models: s.Flags.names(s.Model), base: s.String(), key: s.Key,
		client: &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}}
	j.note(strings.Join(s.commandLine(s.Shown()), " "))
	err = p.start()
	out.Close()
	if err != nil {
		said.Close()
		j.close()
		return nil, notRun{err}
	}
	go func() {
		defer close(p.read)
		j.copy(said)
	}()
	p.record = &record{name: s.file(recordName), Host: s.Host, Group: p.group, Members: s.left}
	p.record.see()
	return p, nil
}

// start starts the process. The thread that did so lives on until the process has ended: where the system can end a
// process with its parent, it takes the end of that thread for it.
func (p *process) start() error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer close(p.reaped)
		err := p.cmd.Start()
		if err == nil {
			p.group = p.cmd.Process.Pid
		}
		started <- err
		if err != nil {
			return
		}
		await(p.cmd)
		close(p.over)
		<-p.reap
		_ = p.cmd.Wait() // how it ended is in its state
	}()
	return <-started
}

// environment is ours without what is nobody else's business.
func (s *Server) environment() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		// An API server that stays when its engine is dead would not be noticed to be.
		return strings.HasPrefix(v, "MILLRACE_") || strings.HasPrefix(v, "NATS_") || strings.HasPrefix(v, "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH=")
	})
	if s.GPUs != nil {
		env = append(env, "CUDA_VISIBLE_DEVICES="+strings.Join(s.GPUs, ","))
	}
	if s.GPUs != nil && s.ByBus {
		env = append(env, "CUDA_DEVICE_ORDER=PCI_BUS_ID") // without it CUDA puts the fastest first
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

// end kills what is left of the group and waits until nothing of it lives and all that it said is read. What does not go
// within a minute is left, and stays in the record.
func (p *process) end() (left []int) {
	p.record.see()
	left = endGroup(p.group, true, p.record.Members)
	close(p.reap)
	within(time.Second, p.reaped) // it was in the group: if it has not ended, it is left
	if !within(time.Second, p.read) {
		_ = p.said.SetReadDeadline(time.Now()) // who left the group may hold the other end
		<-p.read
	}
	p.said.Close()
	within(time.Second, p.journal.written) // a disk that hangs does not keep us
	if len(left) > 0 {
		p.record.see()
		return left
	}
	p.record.remove()
	return nil
}

// within says whether a channel is closed within a time.
func within(d time.Duration, c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	case <-time.After(d):
		return false
	}
}

// endGroup kills a group, those who came from it and those who were known to (by when they began), and waits until they
// are gone. The group is ours for sure, or if one of those is in it: else its number may have been given away. It returns
// who does not go.
func endGroup(group int, sure bool, known map[int]string) (left []int) {
	mine := map[int]string{}
	maps.Copy(mine, known)
	for limit := time.Now().Add(endMost); ; time.Sleep(endEvery) {
		all, err := processes()
		if err != nil { // then the group alone
			if sure {
				_ = syscall.Kill(-group, syscall.SIGKILL)
			}
			return nil
		}
		ours := family(all, group, sure, mine)
		late := time.Now().After(limit)
		left = nil
		whole := false
		for _, p := range ours {
			mine[p.id] = p.start
			left = append(left, p.id)
			switch {
			case late:
			case p.group == group:
				whole = true
			default:
				_ = syscall.Kill(p.id, syscall.SIGKILL) // it may just have gone
			}
		}
		if whole {
			_ = syscall.Kill(-group, syscall.SIGKILL)
		}
		if late || len(ours) == 0 {
			return left
		}
	}
}

// proc is a row of the process table.
type proc struct {
	id, parent, group int
	start             string // when it began, in the system's words
}

// family are the living processes that are known by when they began, those of the group where that is ours for sure or one
// of them is in it, and those that came from them and left it.
func family(all []proc, group int, sure bool, known map[int]string) []proc {
	ours := map[int]bool{}
	for _, p := range all {
		if start, is := known[p.id]; is && start == p.start {
			ours[p.id] = true
			sure = sure || p.group == group
		}
	}
	for more := true; more; {
		more = false
		for _, p := range all {
			if !ours[p.id] && (sure && p.group == group || ours[p.parent]) {
				ours[p.id], more = true, true
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(all), func(p proc) bool { return !ours[p.id] })
}

// how says how the process ended, and whether it was by a signal.
func (p *process) how() (string, bool) {
	st := p.cmd.ProcessState
	if st == nil {
		return "does not end", true
	}
	if w, ok := st.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		how := fmt.Sprintf("was killed by signal %d (%s)", w.Signal(), w.Signal())
		if w.Signal() == syscall.SIGKILL {
			how += "; perhaps the machine's memory was short (see dmesg)"
		}
		return how, true
	}
	return fmt.Sprintf("ended with status %d, and said nothing that is known here; its log tells more", st.ExitCode()), false
}

// otherModel says that a server is up under other names than it should serve: what waits for those waits in vain.
type otherModel struct{ serves, wanted []string }

func (o *otherModel) Error() string {
	return fmt.Sprintf("vLLM is up and serves %s, not %s; have it served by that name (-- --served-model-name %s), or let every line ask for %s (--model)",
		proto.Truncate(strings.Join(o.serves, ", "), 200), strings.Join(o.wanted, ", "), o.wanted[0], o.serves[0])
}

// lists says the same of a port at which it may not be the server that answers.
func (o *otherModel) lists() string {
	return fmt.Sprintf("its port answers already, and lists %s, not %s", proto.Truncate(strings.Join(o.serves, ", "), 200), strings.Join(o.wanted, ", "))
}

// ready says whether the server is well and lists the model; and if not, what it says to that (empty: it answers nothing), or
// what it lists.
func (p *process) ready(ctx context.Context) (bool, string, *otherModel) {
	if _, err := p.get(ctx, "/health"); err != nil {
		return false, refused("/health", err), nil
	}
	b, err := p.get(ctx, "/v1/models")
	if err != nil {
		return false, refused("/v1/models", err), nil
	}
	var list struct {
		Data []struct {
			ID string `json:"id"`
		} `json:"data"`
	}
	if json.Unmarshal(b, &list, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)) != nil {
		return false, "its /v1/models is no list of models", nil
	}
	var ids []string
	for _, m := range list.Data {
		if slices.Contains(p.models, m.ID) {
			return true, "", nil
		}
		ids = append(ids, m.ID)
	}
	if len(ids) == 0 {
		return false, "it lists no model", nil
	}
	return false, "", &otherModel{ids, p.models}
}

// refusal is an answer other than 200.
type refusal struct {
	code   int
	status string
}

func (r refusal) Error() string { return r.status }

// refused says what a server answered that is not well; empty: nothing.
func refused(path string, err error) string {
	var r refusal
	switch {
	case !errors.As(err, &r):
		return ""
	case r.code == http.StatusUnauthorized, r.code == http.StatusForbidden:
		return fmt.Sprintf("its %s wants a key (%s); give the right one with --engine-api-key or --engine-api-key-file", path, r.status)
	}
	return fmt.Sprintf("its %s says %s", path, r.status)
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
		return nil, refusal{r.StatusCode, r.Status}
	}
	return io.ReadAll(io.LimitReader(r.Body, 1<<20))
}

// FreePort is a port of the loopback interface at which nobody listens. It lies below those that systems give to
// connections (from 32,768 on Linux, from 49,152 elsewhere), so that it stays free while no server has it.
func FreePort(taken func(int) bool) (int, error) {
	first := rand.IntN(lastPort - firstPort) // two that look at once should not find the same one
	for i := range lastPort - firstPort {
		port := firstPort + (first+i)%(lastPort-firstPort)
		if taken(port) {
			continue
		}
		ln, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err == nil {
			return port, ln.Close()
		}
	}
	return 0, fmt.Errorf("find a port for vLLM: all from %d to %d are taken", firstPort, lastPort-1)
}

const firstPort, lastPort = 18000, 19000
