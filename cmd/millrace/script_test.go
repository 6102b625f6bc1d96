package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/rogpeppe/go-internal/testscript"

	"millrace/sim"
)

// TestScripts runs the scripts in testdata/script: each is a user who types commands. Beside the commands of
// testscript they know
//
//	exits CODE PROGRAM ARG...        run a program, which must end with CODE (stdout and stderr look at what it said)
//	start NAME PROGRAM ARG...        start one that runs beside the script; it is killed at the end
//	says NAME REGEXP                 wait until it has said that, on either stream
//	silent NAME REGEXP               it has not said that so far
//	ends NAME CODE                   wait for its end; what it said is in NAME.out and NAME.err then
//	signal NAME int|term|hup|kill    send it a signal
//	eventually REGEXP PROGRAM ARG... run a program again and again until it prints that
//	port VAR                         a free address on the loopback interface
//	engine NAME KEY=VALUE...         a simulated engine; its URL is $NAME. Keys: model, key, hang, slow, 400, 401, 500
//	answered N NAME...               wait until these engines together have answered N requests
//	unhang NAME                      let an engine go on
//	input FILE N [MODEL]             write N lines that are valid
//	oracle INPUT OUTPUT OK FAILED    judge the files of a finished job: OUTPUT.jsonl and its neighbours, or a folder
//	json FILE PATH VALUE             a value in a JSON document, such as jobs.0.state; stdout is a file, too
//	lint URL NAME...                 metrics that are as Prometheus wants them, with families of these names
//
// and those of script_tools_test.go, which say there what they do. State lies in the script's own folder.
func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Values[worldKey{}] = newWorld(t.Context())
			env.Setenv("XDG_STATE_HOME", filepath.Join(env.WorkDir, "state"))
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			return nil
		},
		Condition: scriptCondition,
		Cmds:      scriptCommands,
	})
}

var scriptCommands = map[string]func(ts *testscript.TestScript, neg bool, args []string){
	"exits": cmdExits, "start": cmdStart, "says": cmdSays, "silent": cmdSilent, "ends": cmdEnds, "signal": cmdSignal,
	"eventually": cmdEventually, "port": cmdPort, "engine": cmdEngine, "answered": cmdAnswered, "unhang": cmdUnhang,
	"input": cmdInput, "oracle": cmdOracle, "json": cmdJSON, "lint": cmdLint, "nats": cmdNATS, "drift": cmdDrift, "bad": cmdBad, "sameset": cmdSameSet, "cancelled": cmdCancelled, "smalldisk": cmdSmallDisk, "fill": cmdFill, "oneline": cmdOneLine, "tamper": cmdTamper, "odd": cmdOdd, "packed": cmdPacked, "gone": cmdGone,
}

// world is what runs beside one script.
type world struct {
	ctx     context.Context // of the test that runs all scripts
	procs   map[string]*proc
	engines map[string]*testEngine
}

type worldKey struct{}

func newWorld(ctx context.Context) *world {
	return &world{ctx: ctx, procs: map[string]*proc{}, engines: map[string]*testEngine{}}
}

func worldOf(ts *testscript.TestScript) *world { return ts.Value(worldKey{}).(*world) }

// scriptTB lets a script use the helpers of the other tests.
type scriptTB struct {
	testing.TB
	ts *testscript.TestScript
}

func (t scriptTB) Helper()                         {}
func (t scriptTB) Fatal(args ...any)               { t.ts.Fatalf("%s", fmt.Sprint(args...)) }
func (t scriptTB) Fatalf(format string, a ...any)  { t.ts.Fatalf(format, a...) }
func (t scriptTB) Errorf(format string, a ...any)  { t.ts.Fatalf(format, a...) }
func (t scriptTB) Error(args ...any)               { t.Fatal(args...) }
func (t scriptTB) Logf(format string, args ...any) { t.ts.Logf(format, args...) }
func (t scriptTB) Cleanup(f func())                { t.ts.Defer(f) }
func (t scriptTB) Context() context.Context        { return worldOf(t.ts).ctx }
func (t scriptTB) Failed() bool                    { return false }

// usage refuses a command that is not as it must be.
func usage(ts *testscript.TestScript, neg bool, args []string, least int, how string) {
	if neg || len(args) < least {
		ts.Fatalf("usage: %s", how)
	}
}

func atoi(ts *testscript.TestScript, s string) int {
	n, err := strconv.Atoi(s)
	ts.Check(err)
	return n
}

func pattern(ts *testscript.TestScript, s string) *regexp.Regexp {
	re, err := regexp.Compile("(?m)" + s)
	ts.Check(err)
	return re
}

func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "exits CODE PROGRAM ARG...")
	got := 0
	err := ts.Exec(args[1], args[2:]...)
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		got, err = ee.ExitCode(), nil
	}
	ts.Check(err)
	if want := atoi(ts, args[0]); got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func cmdStart(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "start NAME PROGRAM ARG...")
	name, w := args[0], worldOf(ts)
	program, err := exec.LookPath(args[1])
	ts.Check(err)
	cmd := exec.Command(program, args[2:]...)
	cmd.Dir = ts.MkAbs(".")
	for _, key := range []string{"PATH", "HOME", "TMPDIR", "GORACE", "GOMAXPROCS", "XDG_STATE_HOME", "NATS_URL", "MILLRACE_TOKEN", "MILLRACE_ENGINE_API_KEY"} {
		if v := ts.Getenv(key); v != "" {
			cmd.Env = append(cmd.Env, key+"="+v)
		}
	}
	w.procs[name] = launch(scriptTB{ts: ts}, name, cmd)
}

func procOf(ts *testscript.TestScript, name string) *proc {
	p := worldOf(ts).procs[name]
	if p == nil {
		ts.Fatalf("%s was not started", name)
	}
	return p
}

func cmdSays(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "says NAME REGEXP")
	p, re := procOf(ts, args[0]), pattern(ts, args[1])
	limit := time.After(hangLimit)
	for {
		out, more := p.out.after()
		errs, more2 := p.err.after()
		if re.MatchString(out) || re.MatchString(errs) {
			return
		}
		select {
		case <-more:
		case <-more2:
		case <-p.over:
			if !re.MatchString(p.out.String()) && !re.MatchString(p.err.String()) {
				ts.Fatalf("%s ended without saying %q:\n%s%s", p.name, args[1], p.out, p.err)
			}
			return
		case <-limit:
			ts.Fatalf("%s does not say %q:\n%s%s", p.name, args[1], p.out, p.err)
		}
	}
}

func cmdSilent(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "silent NAME REGEXP")
	p, re := procOf(ts, args[0]), pattern(ts, args[1])
	if s := p.out.String() + p.err.String(); re.MatchString(s) {
		ts.Fatalf("%s says %q:\n%s", p.name, args[1], s)
	}
}

func cmdEnds(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "ends NAME CODE")
	p := procOf(ts, args[0])
	code := p.wait()
	ts.Logf("%s%s", p.out, p.err)
	for ext, b := range map[string]*signalBuffer{".out": p.out, ".err": p.err} {
		ts.Check(os.WriteFile(ts.MkAbs(p.name+ext), []byte(b.String()), 0o644))
	}
	if want := atoi(ts, args[1]); code != want {
		ts.Fatalf("%s ended with %d, want %d", p.name, code, want)
	}
}

func cmdSignal(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "signal NAME int|term|hup|kill")
	sig := map[string]os.Signal{"int": os.Interrupt, "term": syscall.SIGTERM, "hup": syscall.SIGHUP, "kill": os.Kill}[args[1]]
	if sig == nil {
		ts.Fatalf("no such signal: %s", args[1])
	}
	ts.Check(procOf(ts, args[0]).cmd.Process.Signal(sig))
}

func cmdEventually(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "eventually REGEXP PROGRAM ARG...")
	re := pattern(ts, args[0])
	for until := time.Now().Add(hangLimit); ; {
		if err := ts.Exec(args[1], args[2:]...); err == nil && re.MatchString(ts.ReadFile("stdout")) {
			return
		}
		if time.Now().After(until) {
			ts.Fatalf("%s does not come", args[0])
		}
		<-time.After(100 * time.Millisecond) // between looks
	}
}

func cmdPort(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "port VAR")
	ts.Setenv(args[0], freePort(scriptTB{ts: ts}))
}

func cmdEngine(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "engine NAME KEY=VALUE...")
	cfg := sim.Config{OutputTokens: sim.Range{Min: 4, Max: 8}, Faults: sim.Faults{Errors: map[int]float64{}}}
	for _, arg := range args[1:] {
		key, value, _ := strings.Cut(arg, "=")
		switch key {
		case "model":
			cfg.Models = append(cfg.Models, value)
		case "key":
			cfg.APIKey = value
		case "hang":
			cfg.Faults.Hang = true
		case "slow":
			cfg.StepTime, cfg.MaxNumSeqs = slow().StepTime, slow().MaxNumSeqs
		default:
			share, err := strconv.ParseFloat(value, 64)
			ts.Check(err)
			cfg.Faults.Errors[atoi(ts, key)] = share
		}
	}
	e := newEngine(scriptTB{ts: ts}, cfg)
	worldOf(ts).engines[args[0]] = e
	ts.Setenv(args[0], e.url)
}

func enginesOf(ts *testscript.TestScript, names []string) (es []*testEngine) {
	for _, name := range names {
		e := worldOf(ts).engines[name]
		if e == nil {
			ts.Fatalf("no engine %s", name)
		}
		es = append(es, e)
	}
	return es
}

func cmdAnswered(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, false, args, 2, "answered N NAME...")
	es, n := enginesOf(ts, args[1:]), atoi(ts, args[0])
	if !neg {
		answered(scriptTB{ts: ts}, n, es...)
		return
	}
	sum := 0
	for _, e := range es {
		k, _ := e.count()
		sum += k
	}
	if sum >= n {
		ts.Fatalf("%d requests were answered", sum)
	}
}

func cmdUnhang(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 1, "unhang NAME")
	ts.Check(enginesOf(ts, args[:1])[0].SetFaults(sim.Faults{}))
}

func cmdInput(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 2, "input FILE N [MODEL]")
	var b strings.Builder
	for i := range atoi(ts, args[1]) {
		line := inputLine(i)
		if len(args) > 2 {
			line = strings.Replace(line, `"model":"m"`, `"model":"`+args[2]+`"`, 1)
		}
		b.WriteString(line + "\n")
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(b.String()), 0o644))
}

func cmdOracle(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 4, "oracle INPUT OUTPUT OK FAILED")
	input, out := ts.MkAbs(args[0]), ts.MkAbs(args[1])
	var c counts
	if st, err := os.Stat(out); err == nil && st.IsDir() {
		dirs, err := filepath.Glob(filepath.Join(out, "*", "manifest.json"))
		if err != nil || len(dirs) != 1 {
			ts.Fatalf("%d manifests in %s, want one", len(dirs), out)
		}
		c = oracleDir(scriptTB{ts: ts}, input, filepath.Dir(dirs[0]))
	} else {
		c = oracle(scriptTB{ts: ts}, input, out+".jsonl", out+".errors.jsonl", out+".manifest.json")
	}
	if want := (counts{atoi(ts, args[2]), atoi(ts, args[3])}); c != want {
		ts.Fatalf("%d ok and %d failed, want %d and %d", c.ok, c.failed, want.ok, want.failed)
	}
}

func cmdJSON(ts *testscript.TestScript, neg bool, args []string) {
	usage(ts, neg, args, 3, "json FILE PATH VALUE")
	var v any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &v))
	for _, part := range strings.Split(args[1], ".") {
		switch x := v.(type) {
		case map[string]any:
			have := slices.Sorted(maps.Keys(x))
			if v = x[part]; !slices.Contains(have, part) {
				ts.Fatalf("no %s there, only %v", part, have)
			}
		case []any:
			i := atoi(ts, part)
			if i >= len(x) {
				ts.Fatalf("%d elements, no %s", len(x), part)
			}
			v = x[i]
		default:
			ts.Fatalf("nothing lies under %v", v)
		}
	}
	if got := fmt.Sprint(v); !pattern(ts, "^(?:"+args[2]+")$").MatchString(got) {
		ts.Fatalf("%s is %s, want %s", args[1], got, args[2])
	}
}
