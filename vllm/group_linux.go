package vllm

import (
	"fmt"
	"os"
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
