package worker

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"millrace/proto"
)

// TestVouches: an answer is believed where the engine has listed its model since connections last told of a change, and where it
// does not name a model that was there while its line was and is gone.
func TestVouches(t *testing.T) {
	begin := time.Now().Add(-time.Minute)
	at := func(s int) time.Time { return begin.Add(time.Duration(s) * time.Second) }
	type found struct {
		at     int
		models []string
	}
	m, other := []string{"m"}, []string{"other"}
	for _, c := range []struct {
		name           string
		found          []found
		started, since int
		by             string
		want           bool
	}{
		{"listed since", []found{{2, m}}, 0, 1, "m", true},
		{"listed before", []found{{2, m}}, 0, 3, "m", false},
		{"gone when the line came", []found{{2, m}, {4, other}}, 3, 1, "m", false},
		{"gone while it was there", []found{{2, m}, {4, other}}, 1, 0, "m", true},
		{"by the first of two names", []found{{2, []string{"whole/name", "m"}}}, 0, 1, "whole/name", true},
		{"by a name that is not known", []found{{2, m}}, 0, 1, "file", false},
		{"by one that was there and is gone", []found{{0, m}, {2, other}, {4, m}}, 1, 3, "other", false},
	} {
		g := &gate{engine: new(Null), listed: map[string]listing{}, log: slog.New(slog.DiscardHandler)}
		for _, f := range c.found {
			g.list(f.models, at(f.at))
		}
		o := &outcome{line: &line{started: at(c.started), queue: &queue{model: "m"}}, answer: Answer{Since: at(c.since)}, verdict: verdict{model: c.by}}
		if got := g.vouches(o); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
		if got := g.known(o); got != (c.name != "by one that was there and is gone") {
			t.Errorf("%s: known %v", c.name, got)
		}
	}
}

// TestSinceDial: what a new connection brings is not older than the connection, however little is known of the others.
func TestSinceDial(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	first := make(chan struct{})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Request-Id") == "j-0" {
			<-first
		}
		_, _ = io.WriteString(w, "{}")
	})}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close(); <-served })
	e, err := NewHTTP("http://"+ln.Addr().String(), "")
	must(t, err)
	t.Cleanup(e.Close)
	busy := make(chan Answer)
	go func() {
		a, err := e.Do(t.Context(), &proto.Request{Job: "j", Index: 0, URL: "/v1/x", Body: []byte("{}")})
		if err != nil {
			t.Error(err)
		}
		busy <- a
	}()
	for e.direct.lives() == 0 { // the other one is not on a connection of its own before that
		wait(t.Context(), time.Millisecond)
	}
	before := time.Now()
	a, err := e.Do(t.Context(), &proto.Request{Job: "j", Index: 1, URL: "/v1/x", Body: []byte("{}")})
	must(t, err)
	if a.Since.Before(before) {
		t.Errorf("an answer tells of %s before its connection was made", before.Sub(a.Since))
	}
	close(first)
	if was := <-busy; was.Since.After(before) {
		t.Error("a connection became younger")
	}
}

func (d *direct) lives() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.live
}
