//go:build crashpoints

package broker

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

var passes atomic.Int64

// CrashPoint ends the process as kill -9 would when MILLRACE_CRASH names this point. "name:3" dies at the third
// pass.
func CrashPoint(name string) {
	want, nth, _ := strings.Cut(os.Getenv("MILLRACE_CRASH"), ":")
	if want != name {
		return
	}
	n, err := strconv.ParseInt(nth, 10, 64)
	if err != nil {
		n = 1
	}
	if passes.Add(1) == n {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL) // cannot fail: it is our own process
		select {}
	}
}
