package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// bare sends the requests of a job to an engine as the plainest Go client does, C at a time, and prints what that took.
// A worker is held against it.
func bare(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("bench bare", flag.ContinueOnError)
	engine := fs.String("engine", "http://127.0.0.1:8000", "the engine")
	most := fs.Int("c", 256, "requests in flight")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 || *most < 1 {
		return errors.New("give one file with a job, and -c of at least 1")
	}
	lines, err := readLines(fs.Arg(0))
	if err != nil {
		return err
	}
	t := &http.Transport{MaxIdleConnsPerHost: *most, IdleConnTimeout: 4 * time.Second}
	client := &http.Client{Transport: t, Timeout: 10 * time.Minute}
	defer t.CloseIdleConnections()
	var next, bad atomic.Int64
	var wg sync.WaitGroup
	begun, cpu := time.Now(), cpuTime()
	for range min(*most, len(lines)) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(lines)) && ctx.Err() == nil; i = next.Add(1) - 1 {
				if err := post(ctx, client, *engine, &lines[i]); err != nil {
					bad.Add(1)
				}
			}
		})
	}
	wg.Wait()
	took, used := time.Since(begun), cpuTime()-cpu
	fmt.Printf(`{"how":"bare","c":%d,"lines":%d,"failed":%d,"wall_s":%.2f,"cpu_ms_per_request":%.3f}`+"\n",
		*most, len(lines), bad.Load(), took.Seconds(), used.Seconds()*1000/float64(len(lines)))
	return context.Cause(ctx)
}

// request is a line of a job.
type request struct {
	URL  string         `json:"url"`
	Body jsontext.Value `json:"body"`
}

func readLines(name string) ([]request, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var out []request
	for l := range bytes.Lines(b) {
		var r request
		if err := json.Unmarshal(l, &r); err != nil {
			return nil, fmt.Errorf("line %d of %s: %w", len(out)+1, name, err)
		}
		out = append(out, r)
	}
	return out, nil
}

func post(ctx context.Context, client *http.Client, engine string, r *request) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, engine+r.URL, bytes.NewReader(r.Body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.ReadAll(resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	return nil
}

// cpuTime is what this process has used, user and system.
func cpuTime() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
