package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/rogpeppe/go-internal/testscript"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// badLines are lines that are not valid, each with what is said of it. The first and the last line of the file that
// cmdBad writes are valid; these lie between.
var badLines = []struct{ line, why string }{
	{`{"custom_id":"malformed",`, `malformed JSON`},
	{`{"method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[]}}`, `custom_id is missing`},
	{inputLine(0), `custom_id "id-0".* line 1`},
	{edited(1, `"POST"`, `"GET"`), `method is "GET"`},
	{edited(2, `/v1/chat/completions`, `/v1/images`), `url is "/v1/images"`},
	{edited(3, `"max_tokens"`, `"stream":true,"max_tokens"`), `stream is true`},
	{edited(4, `"model":"m",`, ``), `names no model`},
	{edited(5, `"model":"m"`, `"model":"m","model":"n"`), `two "model" keys`},
	{edited(6, `question`, "ques\x00tion"), `malformed JSON`},
	{edited(7, `"max_tokens":6`, `"x":`+strings.Repeat("[", 1e5)+strings.Repeat("]", 1e5)), `malformed JSON.*depth`},
	{edited(8, `question`, strings.Repeat("long ", proto.MaxPayload/5)), `the broker takes 8,388,608`},
	{edited(9, `question`, "ques\xfftion"), `UTF-8`},
}

func edited(i int, old, next string) string {
	s := strings.Replace(inputLine(i), old, next, 1)
	if s == inputLine(i) {
		panic("nothing to edit: " + old)
	}
	return s
}

// cmdBad writes a file with one line of every kind that is not valid, and its counterpart reads what was said of it:
//
//	bad write FILE
//	bad said FILE    FILE names each of them with its line number and its reason
//	bad failed FILE  FILE, an error file, has a line for each of them, with custom_id or line number
func cmdBad(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "bad write|said|failed FILE")
	switch args[0] {
	case "write":
		lines := []string{inputLine(0)}
		for _, b := range badLines {
			lines = append(lines, b.line)
		}
		lines = append(lines, inputLine(100), "")
		ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(strings.Join(lines, "\n")), 0o644))
	case "said":
		text := ts.ReadFile(args[1])
		for i, b := range badLines {
			if want := fmt.Sprintf(`^line %d: .*%s`, i+2, b.why); !pattern(ts, want).MatchString(text) {
				ts.Fatalf("nothing matches %q", want)
			}
		}
		if n := len(pattern(ts, `^line \d+: `).FindAllString(text, -1)); n != len(badLines) {
			ts.Fatalf("%d lines are named, want %d", n, len(badLines))
		}
	case "failed":
		checkFailed(ts, ts.ReadFile(args[1]))
	default:
		ts.Fatalf("bad %s?", args[0])
	}
}

// checkFailed looks for each invalid line in an error file.
func checkFailed(ts *testscript.TestScript, text string) {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if len(lines) != len(badLines) {
		ts.Fatalf("%d error lines, want %d", len(lines), len(badLines))
	}
	for i, b := range badLines {
		l, err := proto.ParseOutput([]byte(lines[i]))
		ts.Check(err)
		usable := strings.Contains(b.line[:min(20, len(b.line))], `"custom_id":"id-`) && i != 2 && !strings.Contains(b.why, "malformed") &&
			!strings.Contains(b.why, "UTF-8") && len(b.line) < proto.MaxPayload
		switch {
		case l.Error == nil || !pattern(ts, b.why).MatchString(l.Error.Message):
			ts.Fatalf("line %d: no error like %q: %s", i+2, b.why, lines[i])
		case usable && (l.CustomID == nil || !strings.Contains(b.line, *l.CustomID)):
			ts.Fatalf("line %d has a custom_id that is not there: %s", i+2, lines[i])
		case !usable && (l.CustomID != nil && !strings.Contains(b.line, *l.CustomID) || l.CustomID == nil && l.Line != int64(i+2)):
			ts.Fatalf("line %d is not named: %s", i+2, lines[i])
		}
	}
}

// cmdLint reads metrics and holds them against Prometheus' conventions.
func cmdLint(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "lint ADDR NAME...")
	resp, err := http.Get("http://" + args[0] + "/metrics")
	ts.Check(err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	ts.Check(err)
	problems, err := promlint.New(bytes.NewReader(text)).Lint()
	ts.Check(err)
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "millrace_") {
			ts.Fatalf("%s: %s", p.Metric, p.Text)
		}
	}
	for _, name := range append(args[1:], "millrace_build_info", "go_goroutines") {
		if !pattern(ts, `^`+name+`[ {]`).Match(text) {
			ts.Fatalf("no %s in\n%s", name, text)
		}
	}
}

// cmdNATS starts a plain nats-server, as an operator would bring it: `nats NAME` with JetStream, `nats NAME off` without.
func cmdNATS(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "nats NAME [off]")
	ns, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true,
		JetStream: !slices.Contains(args, "off"), StoreDir: ts.MkAbs(args[0])})
	ts.Check(err)
	ns.Start()
	ts.Defer(func() {
		ns.Shutdown()
		ns.WaitForShutdown()
	})
	if !ns.ReadyForConnections(10 * time.Second) {
		ts.Fatalf("nats-server does not become ready")
	}
	ts.Setenv(args[0], ns.ClientURL())
}

// cmdDrift changes the results' stream behind everyone's back: `drift URL`.
func cmdDrift(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "drift URL")
	ctx := worldOf(ts).ctx
	conn, err := broker.Connect(ctx, broker.Access{URL: args[0]}, "test", slog.New(slog.DiscardHandler))
	ts.Check(err)
	defer conn.Close()
	s, err := conn.JS.Stream(ctx, proto.ResultStream)
	ts.Check(err)
	cfg := s.CachedInfo().Config
	cfg.MaxAge = time.Hour
	_, err = conn.JS.UpdateStream(ctx, cfg)
	ts.Check(err)
}

// cmdPacked: `packed FILE TO [N]` puts a file in gzip, or its first N bytes.
func cmdPacked(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "packed FILE TO [N]")
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write([]byte(ts.ReadFile(args[0])))
	ts.Check(err)
	ts.Check(w.Close())
	n := b.Len()
	if len(args) > 2 {
		n = atoi(ts, args[2])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b.Bytes()[:n], 0o644))
}

// cmdOdd writes three lines that are valid, with a byte order mark, CRLF, blank lines and no end of the last one.
func cmdOdd(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "odd FILE")
	text := "\ufeff" + inputLine(0) + "\r\n\r\n\n" + inputLine(1) + "\n\n\n" + inputLine(2)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o644))
}

// cmdOneLine: what the last program said on its error stream is one line.
func cmdOneLine(ts *testscript.TestScript, neg bool, args []string) {
	if s := ts.ReadFile("stderr"); strings.Count(s, "\n") != 1 {
		ts.Fatalf("not one line:\n%s", s)
	}
}

// cmdTamper changes a file: `tamper FILE [lose|double|cut]`.
func cmdTamper(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "tamper FILE [lose|double|cut]")
	text := ts.ReadFile(args[0])
	first, rest, _ := strings.Cut(text, "\n")
	switch strings.Join(args[1:], "") {
	case "lose":
		text = rest
	case "double":
		text = first + "\n" + text
	case "cut":
		text = text[:len(text)-1]
	default:
		text = strings.Replace(text, "sim:", "sin:", 1)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o644))
}

// cmdSmallDisk mounts a file system of its own: `smalldisk DIR SIZE`.
func cmdSmallDisk(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "smalldisk DIR SIZE")
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o755))
	ts.Check(mountSmall(dir, args[1]))
	ts.Defer(func() { _ = syscall.Unmount(dir, 0) }) // the folder of the script goes anyway
}

// cmdFill writes a file until its disk is full.
func cmdFill(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "fill FILE")
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	for size := 1 << 16; size > 0; size /= 2 {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			ts.Check(err)
		}
	}
}

// cmdGone: no process lives that is named in the file pids, one a line.
func cmdGone(ts *testscript.TestScript, neg bool, args []string) {
	for line := range strings.Lines(ts.ReadFile("pids")) {
		b, err := os.ReadFile("/proc/" + strings.TrimSpace(line) + "/stat")
		if err == nil && !strings.HasPrefix(string(b[bytes.LastIndexByte(b, ')')+1:]), " Z") {
			ts.Fatalf("a process lives: %s", b)
		}
	}
}

// scriptCondition says whether a small file system can be mounted, [tmpfs], and whether a broker is at the usual place,
// [usualbroker].
func scriptCondition(cond string) (bool, error) {
	if cond == "usualbroker" {
		return listens(context.Background(), defaultNATS), nil
	}
	if cond != "tmpfs" {
		return false, fmt.Errorf("no such condition: %s", cond)
	}
	dir, err := os.MkdirTemp("", "tmpfs*")
	if err != nil {
		return false, err
	}
	defer os.Remove(dir)
	if mountSmall(dir, "64k") != nil {
		return false, nil
	}
	return true, syscall.Unmount(dir, 0)
}

// cmdSameSet: a file has the same lines as the output file in a folder with one job, in any order.
func cmdSameSet(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "sameset FILE DIR")
	names, err := filepath.Glob(filepath.Join(ts.MkAbs(args[1]), "*", "output.jsonl"))
	if err != nil || len(names) != 1 {
		ts.Fatalf("%d output files in %s, want one", len(names), args[1])
	}
	sorted := func(text string) []string { return slices.Sorted(strings.Lines(text)) }
	if a, b := sorted(ts.ReadFile(args[0])), sorted(ts.ReadFile(names[0])); !slices.Equal(a, b) {
		ts.Fatalf("%s has %d lines, %s has %d, or they differ", args[0], len(a), names[0], len(b))
	}
}

// cmdCancelled: one job in a folder was cancelled when some of its lines had run, and its files are whole.
func cmdCancelled(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "cancelled DIR")
	names, err := filepath.Glob(filepath.Join(ts.MkAbs(args[0]), "long-*", "manifest.json"))
	if err != nil || len(names) != 1 {
		ts.Fatalf("%d manifests, want one", len(names))
	}
	m, reasons, err := aggregator.Verify(names[0])
	ts.Check(err)
	failed := ts.ReadFile(filepath.Join(filepath.Dir(names[0]), "errors.jsonl"))
	if n := strings.Count(failed, `"batch_cancelled"`); len(reasons) > 0 || n == 0 || int64(n) != m.Counts.Failed || m.Counts.OK == 0 {
		ts.Fatalf("%d ok, %d failed, %d of them cancelled; %v", m.Counts.OK, m.Counts.Failed, n, reasons)
	}
}
