package main

import (
	"context"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
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
	testscript.Main(m, map[string]func(){"millrace": main})
}
