package proto

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/tinylib/msgp/msgp"
)

var update = flag.Bool("update", false, "write the files under testdata anew")

// golden is one record on the wire. Value is what any msgpack reader sees: binary is {"hex": …}.
// testdata/check_golden.py holds the same file against Python's msgpack.
type golden struct {
	Name  string `json:"name"`
	Hex   string `json:"hex"`
	Value any    `json:"value"`
}

func goldenRecords() map[string]record {
	attempts := []Attempt{{"w-1", CodeEngineError, 500, "boom", 1234567}, {"w-2", CodeTransport, 0, "", 1}}
	return map[string]record{
		"request": &Request{Job: "reviews-0123456789", Index: 4294967296, CustomID: "a-1 é", URL: "/v1/chat/completions", Model: "m",
			Body: []byte(`{"n":12345678901234567890, "x":1e400}`), MaxAttempts: 4, TimeoutMS: 1800000, Attempts: attempts, Suspicions: 2, Doubted: "w-3", Alone: 1, Run: 1795477737000000003},
		"request-empty": &Request{},
		"result": &Result{Job: "j", Index: 7, CustomID: "c", Line: 8, Model: "m", URL: "/v1/completions", OK: true, Status: 200,
			RequestID: "cmpl-1", Body: []byte{0, 1, 0xff}, Finish: "stop", Usage: Usage{true, 308, 121, 240}, Worker: "w",
			StartUS: 1, DurationUS: 70000, LoadUS: 1 << 40, Attempts: attempts[:1], Pace: Pace{437, 1 << 33, true, 5, 9}, ContextCut: true, Run: 1},
		"result-error": &Result{Job: "j", Index: -1, Code: CodeCancelled, Message: "cancelled"},
		"job": &Job{ID: "j", Name: "n", Input: "/in", Host: "h", SHA256: "00", Bytes: 1, Lines: 2, Invalid: 1,
			Models: []ModelLines{{"m", 2}}, Override: "o", MaxAttempts: 3, TimeoutMS: 4, Object: "x", Again: 5, CreatedMS: 6,
			MaxErrors: "5%", LifetimeMS: 7, Program: "p", SkipInvalid: true, Lane: "high", After: 1795477737000000002, Limit: 9},
		"control": &Control{WantCancel, "why", "me@here"},
		"feed":    &Feed{Owner{"id", "h", 42, "99"}, FeedWaiting, "note", 10, 1, 2, []ModelLines{{"m", 10}}, 3, 300, 1795477737000000001, 1795477737000000002, 17},
		"progress": &Progress{State: FoldDone, Lines: 2, OK: 1, Failed: 1, Models: []ModelProgress{{"m", 1, 1, Usage{true, 1, 2, 0}, 1}},
			Errors: []ErrorCount{{CodeBadResponse, 200, 1, "c", "m", 4, true}}, Stream: 1795477737000000001, Seq: 12, RateLines: 1.5, After: 8, BusyUS: 70000, BeforeLines: 3, BeforeTokens: 900},
		"worker": &Worker{ID: "w", Models: []string{"a", "b"}, State: EngineReady, Limit: 437, KVTokens: 473807, Simulated: true, LimitWhy: "why",
			Metered: true, KVUsage: 0.5, Preemptions: 3, TokenRate: 9300.5, RateOf: RateEngine, LastError: "HTTP 500: boom", LastErrorUS: 4000000,
			Flags: []string{"block_size=16"}, GPUs: []GPU{{"0", "GPU-1", "NVIDIA H100 80GB HBM3", 7 << 30, 80 << 30, 612.25, 0.98}}, OwnGPUs: true, Kind: "vllm", Slots: 256, Hosted: true, Restarts: 2, LastRestart: "oom", GivenUp: "out of memory", Network: "b/n"},
		"missing": &MissingAnswer{Known: true, Ranges: []Range{{0, 5}, {9, 10}}, Next: 11},
	}
}

// plain shows a record as a generic msgpack reader does.
func plain(t *testing.T, b []byte) any {
	t.Helper()
	v, _, err := msgp.ReadIntfBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	return jsonable(v)
}

func jsonable(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = jsonable(v[i])
		}
	case []byte:
		return map[string]any{"hex": hex.EncodeToString(v)}
	}
	return v
}

func TestGolden(t *testing.T) {
	records := goldenRecords()
	if *update {
		writeGolden(t, records)
	}
	text, err := os.ReadFile("testdata/golden.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []golden
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	if len(all) != len(records) {
		t.Errorf("%d golden records, want %d; run with -update", len(all), len(records))
	}
	for _, g := range all {
		want := records[g.Name]
		if want == nil {
			t.Errorf("%s: unknown record", g.Name)
			continue
		}
		b, err := encode(want)
		if err != nil {
			t.Fatal(err)
		}
		if hex.EncodeToString(b) != g.Hex {
			t.Errorf("%s: encoded\n%x, golden\n%s", g.Name, b, g.Hex)
		}
		got := reflect.New(reflect.TypeOf(want).Elem()).Interface().(record)
		if err := decode(b, got); err != nil {
			t.Errorf("%s: %v", g.Name, err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: read back\n%+v, want\n%+v", g.Name, got, want)
		}
	}
}

func writeGolden(t *testing.T, records map[string]record) {
	t.Helper()
	var all []golden
	for _, name := range []string{"request", "request-empty", "result", "result-error", "job", "control", "feed", "progress", "worker", "missing"} {
		b, err := encode(records[name])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, golden{name, hex.EncodeToString(b), plain(t, b)})
	}
	text, err := json.MarshalIndent(all, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("testdata/golden.json", append(text, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestVersions: what a newer program appended is skipped, what an older one did not write stays zero, and a newer
// version is told apart from garbage.
func TestVersions(t *testing.T) {
	raw := func(v ...any) []byte {
		b, err := msgp.AppendIntf(nil, v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var c Control
	if err := c.Decode(raw(1, "run", "r", "b", "new", []any{1, 2}, map[string]any{"k": nil})); err != nil || c.By != "b" {
		t.Errorf("longer record: %+v, %v", c, err)
	}
	c = Control{}
	if err := c.Decode(raw(1, "run")); err != nil || c != (Control{Want: "run"}) {
		t.Errorf("shorter record: %+v, %v", c, err)
	}
	if err := c.Decode(raw(2, "run")); !errors.Is(err, ErrNewerVersion) {
		t.Errorf("newer record: %v", err)
	}
	var f Feed
	if err := f.Decode(raw(1, []any{"id", "host", 1, "s", "more"}, "feeding")); err != nil || f.Owner.Start != "s" || f.State != "feeding" {
		t.Errorf("longer inner record: %+v, %v", f, err)
	}
	for _, b := range [][]byte{nil, {}, {0x90}, raw(0), raw("x"), raw(1, 5), append(raw(1, "run"), 0)} {
		if err := new(Control).Decode(b); err == nil || errors.Is(err, ErrNewerVersion) {
			t.Errorf("%x: %v", b, err)
		}
	}
}

func FuzzRecords(f *testing.F) {
	for _, r := range goldenRecords() {
		b, err := encode(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := DecodeRequest(b); err == nil {
			again(t, r)
		}
		if r, err := DecodeResult(b); err == nil {
			again(t, r)
		}
		for _, r := range []record{&Job{}, &Progress{}, &Feed{}, &Worker{}, &MissingAnswer{}, &ResultsAnswer{}} {
			if decode(b, r) == nil {
				again(t, r)
			}
		}
	})
}

// again checks that what was read can be written and read to the same.
func again(t *testing.T, r record) {
	t.Helper()
	b, err := encode(r)
	if err != nil {
		t.Fatal(err)
	}
	got := reflect.New(reflect.TypeOf(r).Elem()).Interface().(record)
	if err := decode(b, got); err != nil {
		t.Fatal(err)
	}
	b2, err := encode(got)
	if err != nil || string(b) != string(b2) {
		t.Fatalf("%x became %x, %v", b, b2, err)
	}
}

func TestNames(t *testing.T) {
	tokens := map[string]string{}
	for _, m := range []string{"meta-llama/Llama-3.2-1B", "meta-llama/llama-3.2-1b", "meta-llama-Llama-3.2-1B", "模型", "", "a.b.*.>", strings.Repeat("x", 500)} {
		tok := ModelToken(m)
		if other, ok := tokens[strings.ToLower(tok)]; ok {
			t.Errorf("%q and %q share the token %s", m, other, tok)
		}
		tokens[strings.ToLower(tok)] = m
		if strings.ContainsAny(tok, ".*> /") || len(tok) > 60 {
			t.Errorf("%q: token %q", m, tok)
		}
	}
	if got := ModelToken("meta-llama/Llama-3.2-1B"); !strings.HasPrefix(got, "meta-llama-llama-3-2-1b-") {
		t.Errorf("token %q is not readable", got)
	}
	if got := JobOfSubject(RequestSubject("m", LaneNormal, "job-1")); got != "job-1" {
		t.Errorf("job %q", got)
	}
}

func TestTruncate(t *testing.T) {
	for _, n := range []int{0, 1, 2, 3, 4, 5, 6, 7} {
		if got := Truncate("ééé é", n); len(got) > max(n, 3) || strings.Contains(got, "\uFFFD") {
			t.Errorf("%d: %q", n, got)
		}
	}
}
