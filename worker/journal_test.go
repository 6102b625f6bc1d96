package worker

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// born is when the stream of the model was made.
func (r *rig) born() time.Time {
	r.tb.Helper()
	st, err := r.conn.JS.Stream(r.tb.Context(), proto.RequestStream(r.model))
	must(r.tb, err)
	return st.CachedInfo().Created
}

// hand takes n requests, as a worker does that dies then, and returns where their acknowledgements go.
func (r *rig) hand(n int) []string {
	r.tb.Helper()
	c, err := r.conn.JS.Consumer(r.tb.Context(), proto.RequestStream(r.model), string(proto.LaneNormal))
	must(r.tb, err)
	batch, err := c.Fetch(n, jetstream.FetchMaxWait(patient))
	must(r.tb, err)
	var replies []string
	for m := range batch.Messages() {
		replies = append(replies, m.Reply())
	}
	return replies
}

// journalOf writes a journal.
func journalOf(tb testing.TB, dir string, h heldBy, more string) {
	tb.Helper()
	must(tb, os.WriteFile(filepath.Join(dir, journalName), []byte(h.text()+more), 0o644))
}

// TestJournal: what a dead process held is had at once, not after AckWait (60 s).
func TestJournal(t *testing.T) {
	r, f := newRig(t), newFake(t)
	dir := t.TempDir()
	r.send(requests(5)...)
	h := heldBy{open: map[string]int64{}, lived: time.Now(), ackWait: time.Minute}
	for _, reply := range r.hand(5) {
		h.open[reply] = r.born().UnixNano()
	}
	journalOf(t, dir, h, "-$JS.ACK.other\n+1 torn")
	w := r.start(f.engine(), func(w *Worker) { w.Dir = dir })
	exactly(t, r.wait(5), 5)
	r.settled(0)
	if err := (&Worker{Conn: r.conn, Engine: f.engine(), Dir: dir}).Run(t.Context(), t.Context()); err == nil {
		t.Error("two workers have one folder")
	}
	w.leave()
	w.end(t)
	left, err := os.ReadFile(filepath.Join(dir, journalName))
	must(t, err)
	if open := readJournal(string(left)).open; len(open) != 0 {
		t.Errorf("open at the end: %v", open)
	}
}

// TestJournalOfOthers: a journal speaks of another stream of the same name, or of long ago, or is an older version's.
// Nothing is given back by it: others hold what has these numbers now.
func TestJournalOfOthers(t *testing.T) {
	for _, c := range []struct {
		name  string
		lived time.Duration // ago
		born  time.Duration // before the stream that is there
		old   bool
	}{
		{"another stream", 0, time.Hour, false},
		{"long dead", 2 * time.Minute, 0, false}, // though the file was written a moment ago
		{"of a later time", -time.Hour, 0, false},
		{"old format", 0, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, f := newRig(t), newFake(t)
			dir := t.TempDir()
			r.send(requests(3)...)
			h := heldBy{open: map[string]int64{}, lived: time.Now().Add(-c.lived), ackWait: time.Minute}
			old := ""
			for _, reply := range r.hand(3) {
				if c.old {
					old += "+" + reply + "\n~60000000000\n"
				} else {
					h.open[reply] = r.born().Add(-c.born).UnixNano()
				}
			}
			journalOf(t, dir, h, old)
			r.start(f.engine(), func(w *Worker) { w.Dir = dir })
			r.send(request(9)) // what is given back would come before it
			if got := r.wait(1); got[0].Index != 9 || len(got) != 1 {
				t.Errorf("line %d ran, of %d", got[0].Index, len(got))
			}
			r.until("the journal holds no more of it", func() bool {
				b, err := os.ReadFile(filepath.Join(dir, journalName))
				return err == nil && len(readJournal(string(b)).open) == 0
			})
			if _, out := r.pending(); out < 3 {
				t.Errorf("%d requests are handed out, want those 3", out)
			}
		})
	}
}

// TestJournalFile: what is read is what was written, also after the file was written anew, and once.
func TestJournalFile(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	log := (&rig{tb: t}).log()
	reply := func(model string, seq int) string {
		return fmt.Sprintf("$JS.ACK.%s.normal.1.%d.%d.1.0", proto.RequestStream(model), seq, seq)
	}
	born := time.Unix(0, 12345)
	j, err := openJournal(dir, log)
	must(t, err)
	if got := j.reclaim("m", born); len(got) != 0 {
		t.Errorf("left %v", got)
	}
	j.alive(now, time.Minute)
	for i := range 3 {
		j.received(reply("m", i), born)
	}
	j.received(reply("b", 7), born)
	j.received(reply("m", 8), born.Add(1))
	for range journalLarge / 20 {
		j.received("$JS.ACK.x", born)
		j.done("$JS.ACK.x")
	}
	j.done(reply("m", 0))
	j.flush()
	st, err := os.Stat(filepath.Join(dir, journalName))
	must(t, err)
	if st.Size() > 1000 {
		t.Errorf("file has %d bytes", st.Size())
	}
	j.close()

	j, err = openJournal(dir, log)
	must(t, err)
	j.alive(now.Add(time.Hour), time.Hour) // says nothing of the dead
	got := j.reclaim("m", born)
	slices.Sort(got)
	if want := []string{reply("m", 1), reply("m", 2)}; !slices.Equal(got, want) {
		t.Errorf("left %v, want %v", got, want)
	}
	if got := j.reclaim("m", born); len(got) != 0 {
		t.Errorf("left again %v", got)
	}
	j.close()

	j, err = openJournal(dir, log)
	must(t, err)
	if got := j.reclaim("b", born); !slices.Equal(got, []string{reply("b", 7)}) {
		t.Errorf("left of another model %v", got)
	}
	j.close()
	j, err = openJournal(dir, log)
	must(t, err)
	defer j.close()
	if len(j.dead.open) != 0 {
		t.Errorf("left at the end %v", j.dead.open)
	}
}

// FuzzJournal cuts journals anywhere, as a kill does: what is read was written as a whole line, and is read again
// from what is written of it.
func FuzzJournal(f *testing.F) {
	f.Add("~60000000000 1700000000000000000\n+1 $JS.ACK.a.b\n+2 $JS.ACK.c.d\n-$JS.ACK.a.b\n+3 $JS.ACK.e", 40)
	f.Add("+$JS.ACK.old\n~60\n+x $JS.ACK.y\n~1 z\n\n-\n", 9)
	f.Add("\x00\x00\x00\n+1 $JS.ACK. \n", 30)
	f.Fuzz(func(t *testing.T, text string, n int) {
		text = text[:min(max(n, 0), len(text))]
		h := readJournal(text)
		for reply := range h.open {
			if !strings.HasPrefix(reply, "$JS.ACK.") || !strings.Contains(text, " "+reply+"\n") {
				t.Errorf("read %q", reply)
			}
		}
		again := readJournal(h.text())
		if !maps.Equal(again.open, h.open) || !again.lived.Equal(h.lived) || again.ackWait != h.ackWait {
			t.Errorf("read %+v, and then %+v", h, again)
		}
	})
}
