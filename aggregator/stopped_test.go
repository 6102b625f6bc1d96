package aggregator

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"millrace/proto"
)

// What an aggregator left can be read without one: the results that count, and nothing is changed.
func TestStopped(t *testing.T) {
	dir := t.TempDir()
	s, _ := folded(t, dir, 5, bad("j", 0, "a"), good("j", 1, 1), bad("j", 2, "b"), good("j", 0, 2), bad("j", 1, "c"), bad("j", 0, "d"))
	save(t, s)
	s.close()
	spool := filepath.Join(dir, "jobs", "j", fileSpool)
	before, err := os.ReadFile(spool)
	if err != nil {
		t.Fatal(err)
	}
	for which, want := range map[string]string{proto.WhichOK: "[id-1 id-0]", proto.WhichErrors: "[id-2]", proto.WhichAll: "[id-1 id-2 id-0]"} {
		var out bytes.Buffer
		if err := Stopped(dir, "j", which, &out); err != nil {
			t.Fatal(err)
		}
		var got []string
		for line := range strings.Lines(out.String()) {
			l, err := proto.ParseOutput([]byte(line))
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, *l.CustomID)
		}
		if fmt.Sprint(got) != want {
			t.Errorf("%q: %v, want %s", which, got, want)
		}
	}
	if after, err := os.ReadFile(spool); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the spool was changed, %v", err)
	}
	var none bytes.Buffer
	if err := Stopped(dir, "other", proto.WhichAll, &none); err != nil || none.Len() > 0 {
		t.Errorf("of a job that was not begun: %q, %v", none.String(), err)
	}
}
