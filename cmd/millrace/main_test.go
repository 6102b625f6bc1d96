package main

import (
	"context"
	"fmt"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
)

// programEnv makes the test binary the program itself, so that roles run as processes of their own, under the race
// detector, and can be killed.
const programEnv = "MILLRACE_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(programEnv) != "" {
		os.Exit(run(context.Background(), os.Args[1:], stdio{os.Stdin, os.Stdout, os.Stderr}))
	}
	if os.Getenv("GORACE") == "" { // the race detector of a process that ends lingers for a second
		if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
			panic(err)
		}
	}
	testscript.Main(leakTested{m}, map[string]func(){"millrace": main})
}

// leakTested does what goleak.VerifyTestMain does, inside testscript.Main, which ends the process as that does.
type leakTested struct{ m *testing.M }

func (l leakTested) Run() int {
	code := l.m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines are left:", err)
			return 1
		}
	}
	return code
}
