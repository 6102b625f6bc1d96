package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestReadWrk(t *testing.T) {
	const said = "  256 connections\n  483213 requests in 10.02s, 190.32MB read\nRequests/sec:  48236.47\nTransfer/sec:     18.99MB\n"
	if v, n, err := readWrk(said); err != nil || v != 48236.47 || n != 483213 {
		t.Errorf("read %v, %d, %v", v, n, err)
	}
	for _, bad := range []string{"", said + "  Non-2xx or 3xx responses: 3\n", said + "  Socket errors: connect 0, read 2, write 0, timeout 0\n"} {
		if v, _, err := readWrk(bad); err == nil {
			t.Errorf("read %v in %q", v, bad)
		}
	}
}

func TestReadRates(t *testing.T) {
	const said = "goos: linux\nBenchmarkFold-2   \t  300000\t      2525 ns/op\t 376.83 MB/s\t    396037 results/s\t 1206 B/op\t 3 allocs/op\n" +
		"BenchmarkEnqueue/sync=1s-2 \t 1\t1.2e+09 ns/op\t 1e+05 lines/s\nPASS\n"
	if v, err := readRates(said); err != nil || len(v) != 2 || v[0] != 396037 || v[1] != 100000 {
		t.Errorf("read %v, %v", v, err)
	}
	if v, err := readRates("PASS\n"); err == nil {
		t.Errorf("read %v in nothing", v)
	}
}

func TestTable(t *testing.T) {
	var tab table
	tab.add("a", []float64{3, 1, 33_333}, "goal", "how")
	tab.add("b", nil, "", "no wrk")
	var b bytes.Buffer
	if err := tab.write(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| a | 3 | 1 | 33,300 | 3 | goal | how |", "| b | – | – | – | 0 |  | no wrk |"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
}

// TestInput: the same lines every time, of about the length that the table speaks of, and a body that fits wrk's script.
func TestInput(t *testing.T) {
	n := len(body(123, 100_000))
	if n < 850 || n > 1050 || strings.Contains(body(0, 1), "]==]") {
		t.Errorf("a body has %d bytes", n)
	}
}
