package vllm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// attributes give the server a group of its own, and let it be asked to stop when we are killed. It stops its engine
// then, which a SIGKILL would leave behind.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}

// await waits until a process that was started has ended, and leaves its number to it until somebody waits for it: so the
// number of its group is nobody else's either.
func await(cmd *exec.Cmd) {
	const byID = 1 // P_PID of waitid(2)
	for {
		_, _, err := syscall.Syscall6(syscall.SYS_WAITID, byID, uintptr(cmd.Process.Pid), 0, syscall.WEXITED|syscall.WNOWAIT, 0, 0)
		if err != syscall.EINTR {
			return
		}
	}
}

// processes lists those that live, by proc(5).
func processes() ([]proc, error) {
	names, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil || len(names) == 0 {
		return nil, fmt.Errorf("list processes: %w", os.ErrNotExist)
	}
	var all []proc
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		s := string(b)
		f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:]) // the name before may hold anything; f[0] is field 3
		if len(f) < 20 || f[0] == "Z" || f[0] == "X" {
			continue // it is dead, nobody has taken notice
		}
		p := proc{start: f[19]}
		p.id, _ = strconv.Atoi(filepath.Base(filepath.Dir(name))) // numbers, as the pattern and proc(5) say
		p.parent, _ = strconv.Atoi(f[1])
		p.group, _ = strconv.Atoi(f[2])
		all = append(all, p)
	}
	return all, nil
}
