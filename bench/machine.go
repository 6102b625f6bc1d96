package main

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"
)

var (
	cpuName  = regexp.MustCompile(`(?m)^model name\s*:\s*(.+)$`)
	memTotal = regexp.MustCompile(`(?m)^MemTotal:\s*(\d+)`)
)

// machine says in one line what is measured, on what, when, and how busy that was before.
func machine(ctx context.Context, bin string) (string, error) {
	version, err := output(ctx, bin, "--version")
	if err != nil {
		return "", err
	}
	s := fmt.Sprintf("%s, %s; %d CPUs", strings.TrimSpace(version), time.Now().UTC().Format("2006-01-02 15:04 UTC"), runtime.NumCPU())
	add := func(file string, r *regexp.Regexp, format string) {
		b, err := os.ReadFile(file)
		if err != nil { // not on this system
			return
		}
		if m := r.FindSubmatch(b); m != nil {
			s += fmt.Sprintf(format, m[1])
		}
	}
	add("/proc/cpuinfo", cpuName, " (%s)")
	add("/proc/meminfo", memTotal, ", %s kB of memory")
	s += fmt.Sprintf(", %s/%s, %s", runtime.GOOS, runtime.GOARCH, runtime.Version())
	add("/proc/loadavg", regexp.MustCompile(`^(\S+)`), "; load average before: %s")
	return s, nil
}
