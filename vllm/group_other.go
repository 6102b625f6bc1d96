//go:build !linux

package vllm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// attributes give the server a group of its own. One whose millrace is killed is found at the next start.
func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

// await waits until a process that was started has ended. Its number may then be given away, though hardly within the
// moment until its group is ended.
func await(cmd *exec.Cmd) { _ = cmd.Wait() } // how it ended is in its state

// processes lists those that live, by ps(1).
func processes() ([]proc, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "ps", "-A", "-o", "pid=,ppid=,pgid=,state=,lstart=")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var all []proc
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) < 5 || strings.HasPrefix(f[3], "Z") {
			continue
		}
		p := proc{start: strings.Join(f[4:], " ")}
		p.id, _ = strconv.Atoi(f[0]) // numbers, as ps says
		p.parent, _ = strconv.Atoi(f[1])
		p.group, _ = strconv.Atoi(f[2])
		all = append(all, p)
	}
	return all, nil
}
