package aggregator

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"millrace/proto"
)

// refusal is a 400 of a line, with a message.
func refusal(index int64, message string) *proto.Result {
	r := bad("j", index, proto.CodeInvalidRequest)
	r.Status, r.Message = 400, message
	return r
}

// A message stands on the lines that had it, and on no others of the same code and status.
func TestAMessageStandsOnItsLinesOnly(t *testing.T) {
	var all tally
	for i := range int64(3) {
		all.add(refusal(i, fmt.Sprintf("temperature must be non-negative, got -%d.5.", i)), 1)
	}
	for i := range int64(5) {
		all.add(refusal(10+i, fmt.Sprintf("request chatcmpl-9f%d asks for too many tokens", i)), 1)
	}
	nameless := refusal(20, "no custom_id")
	nameless.CustomID, nameless.Line = "", 21
	all.add(nameless, 1)
	var p proto.Progress
	all.fill(&p)
	got := ""
	for _, e := range p.Errors {
		got += fmt.Sprintf("%d %s\n", e.Count, e.Example())
	}
	want := "5 custom_id id-10: request chatcmpl-9f0 asks for too many tokens\n" +
		"3 custom_id id-0: temperature must be non-negative, got -0.5.\n" +
		"1 line 21: no custom_id\n"
	if got != want {
		t.Errorf("told is\n%swant\n%s", got, want)
	}
}

// However many messages there are, some are told apart and the others are counted, and all can be taken back.
func TestKindsAreBounded(t *testing.T) {
	letters := func(n int) string {
		return string([]byte{'a' + byte(n/26/26%26), 'a' + byte(n/26%26), 'a' + byte(n%26)})
	}
	rapid.Check(t, func(t *rapid.T) {
		var k kinds
		var in []*proto.Result
		n := rapid.IntRange(0, 2*maxMessages).Draw(t, "messages")
		for i := range n {
			for range rapid.IntRange(1, 3).Draw(t, "times") {
				in = append(in, refusal(0, letters(i)))
			}
		}
		for _, r := range in {
			k.add(r, 1)
		}
		sum, mixed := int64(0), 0
		for _, e := range k.list() {
			sum += e.Count
			if e.Mixed {
				mixed++
			}
		}
		if len(k.list()) != min(n, maxMessages+1) || sum != int64(len(in)) || (mixed == 1) != (n > maxMessages) {
			t.Fatalf("%d messages of %d lines are %+v", n, len(in), k.list())
		}
		for _, r := range rapid.Permutation(in).Draw(t, "order") {
			k.add(r, -1)
		}
		if len(k.list()) != 0 {
			t.Fatalf("left is %+v", k.list())
		}
	})
}

func TestAlike(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"at most 5 tokens", "at most 812 tokens", true},
		{"got 1.5", "got 3", true},
		{"got -1.5.", "got 3.", true},
		{"chatcmpl-9f3: no", "chatcmpl-a2e: no", true},
		{"1 error:\n {'loc': 'n', 'msg': 'no', 'input': {'n': 'x y'}}", "1 error:\n {'loc': 'n', 'msg': 'no', 'input': 'z'}", true},
		{"1 error:\n {'loc': 'n', 'input': 1}", "1 error:\n {'loc': 'm', 'input': 1}", false},
		{"temperature must be in range", "top_p must be in range", false},
		{"3 tools", "3 schemas", false},
		{"", "x", false},
	} {
		if got := alike(c.a) == alike(c.b); got != c.want {
			t.Errorf("%q, %q: alike %v", c.a, c.b, got)
		}
	}
}
