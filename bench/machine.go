package main

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
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
	return s, nil
}

// others measures what other programs take of the CPUs meanwhile: figures of a machine that had other work are worth
// less, and of comparisons within one run a little less.
type others struct {
	began time.Time
	busy  time.Duration // of all CPUs since the system's start; 0: not known
	ours  time.Duration
}

func watchOthers() others { return others{time.Now(), busy(), ours()} }

// String is empty where the system does not tell.
func (o others) String() string {
	if o.busy == 0 {
		return ""
	}
	wall := time.Since(o.began).Seconds()
	return fmt.Sprintf("; other programs took %.2f CPUs meanwhile", max(0, (busy()-o.busy-(ours()-o.ours)).Seconds()/wall))
}

// ours is what this process and its children, as far as they have ended, took.
func ours() time.Duration {
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if syscall.Getrusage(who, &u) == nil {
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return sum
}

// busy reads the first line of /proc/stat: ticks (100 a second, USER_HZ of every Linux) in user, nice, system, idle,
// iowait, irq, softirq, steal. Source: proc_stat(5).
func busy() time.Duration {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(line)
	if len(f) < 9 {
		return 0
	}
	var ticks int64
	for _, i := range []int{1, 2, 3, 6, 7, 8} {
		n, _ := strconv.ParseInt(f[i], 10, 64) // the kernel writes numbers
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}
