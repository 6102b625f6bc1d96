package aggregator

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"millrace/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testModel = "org/model"

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func spec(id string, lines int64) *proto.Job {
	return &proto.Job{ID: id, Input: "in.jsonl", SHA256: "5ec", Lines: lines, Models: []proto.ModelLines{{Model: testModel, Lines: lines}}}
}

// good is an ok result of a line, with an answer whose tokens depend on the line and on salt.
func good(job string, index int64, salt int64) *proto.Result {
	u := proto.Usage{Counted: true, Prompt: 10 + index, Completion: 100 + salt, Cached: index % 3}
	return &proto.Result{
		Job: job, Index: index, CustomID: fmt.Sprintf("id-%d", index), Model: testModel, URL: "/v1/chat/completions",
		OK: true, Status: 200, RequestID: fmt.Sprintf("req-%d", salt), Finish: "stop", Usage: u,
		Body:   fmt.Appendf(nil, `{"choices":[{"text":"answer %d"}],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}`, salt, u.Prompt, u.Completion),
		Worker: fmt.Sprintf("w%d", index%2), StartUS: 1_000_000 + index*1000, DurationUS: 500_000, LoadUS: 900_000,
	}
}

// bad is an error of a line, after one attempt before it.
func bad(job string, index int64, code string) *proto.Result {
	return &proto.Result{
		Job: job, Index: index, CustomID: fmt.Sprintf("id-%d", index), Model: testModel, Code: code, Message: "it broke",
		Worker: "w0", StartUS: 1_000_000, DurationUS: 1000,
		Attempts: []proto.Attempt{{Worker: "w1", Code: code, DurationUS: 10}},
	}
}

func wire(t testing.TB, r *proto.Result) []byte {
	t.Helper()
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// log is a stream of results in memory.
type stream struct {
	created int64
	msgs    []message
	purged  uint64 // sequences up to here are gone
}

func (s *stream) add(t testing.TB, r *proto.Result) message {
	t.Helper()
	seq := uint64(len(s.msgs) + 1)
	m := message{subject: proto.ResultSubject(r.Job), data: wire(t, r), seq: seq, time: s.created + int64(seq)*1000}
	s.msgs = append(s.msgs, m)
	return m
}

func openTest(t testing.TB, dir string) *state {
	t.Helper()
	s, err := openState(context.Background(), dir, "host", quiet(), newMeter(), make(chan struct{}, 1))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// catchUp folds what s has not folded of the stream, as a session would.
func catchUp(t testing.TB, s *state, st *stream) {
	t.Helper()
	pos, again := s.position(), false
	switch {
	case pos.Stream != st.created || pos.Seq > uint64(len(st.msgs)):
		pos, again = position{Stream: st.created, Seq: st.purged}, true
	case pos.Seq < st.purged:
		pos, again = position{Stream: st.created, Seq: st.purged}, pos.Seq == 0
	}
	s.moveTo(pos, again)
	for _, m := range st.msgs[pos.Seq:] {
		if err := s.fold(m); err != nil {
			t.Fatal(err)
		}
	}
}

func noWorkers(string) *proto.Worker { return nil }

func save(t testing.TB, s *state) {
	t.Helper()
	if err := s.save(noWorkers); err != nil {
		t.Fatal(err)
	}
}

// copyDir copies a folder as a crash at this instant would leave it.
func copyDir(t testing.TB, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o755)
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), b, 0o644)
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

// kind says how a line stands: "ok <request id>", "error <code>", or "".
func kind(t testing.TB, j *job, index int64) string {
	t.Helper()
	if j.at[index] == 0 {
		return ""
	}
	r, err := j.result(index)
	if err != nil {
		t.Fatal(err)
	}
	if r.OK {
		return "ok " + r.RequestID
	}
	return "error " + r.Code
}
