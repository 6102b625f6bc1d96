package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// TestTalkOfOwner: that nobody feeds a job is said when its owner has gone, not while it is about to come.
func TestTalkOfOwner(t *testing.T) {
	var said bytes.Buffer
	talk := (&app{std: stdio{err: &said}}).newTalk(proto.Job{ID: "j", Lines: 1})
	none, fed := broker.JobView{}, broker.JobView{Feed: proto.Feed{Owner: proto.Owner{ID: "o"}}}
	for _, v := range []broker.JobView{none, fed} {
		if talk.see(v); said.Len() > 0 {
			t.Fatalf("says %s", said.String())
		}
	}
	if talk.see(none); !strings.Contains(said.String(), "j: no process runs it") {
		t.Errorf("says %q when the owner has gone", said.String())
	}
}

// TestTalkOfItself: an owner that could not renew its lease while the broker was away does not say that no process runs its
// job; whoever else looks does, and the owner does of another one.
func TestTalkOfItself(t *testing.T) {
	for _, c := range []struct {
		self, holder string
		says         bool
	}{{"o", "o", false}, {"", "o", true}, {"o", "other", true}, {"", "", true}, {"o", "", true}} {
		var said bytes.Buffer
		talk := (&app{std: stdio{err: &said}}).newTalk(proto.Job{ID: "j", Lines: 1})
		talk.self = c.self
		v := broker.JobView{Feed: proto.Feed{Owner: proto.Owner{ID: "o"}}}
		talk.see(v)
		v.Feed.Owner.ID, v.Silent = c.holder, time.Minute
		if talk.see(v); strings.Contains(said.String(), "no process runs it") != c.says {
			t.Errorf("%+v: says %q", c, said.String())
		}
	}
}

// TestTalkTakesBack: what was in the way is not left standing when it is gone.
func TestTalkTakesBack(t *testing.T) {
	var said bytes.Buffer
	talk := (&app{std: stdio{err: &said}}).newTalk(proto.Job{ID: "j", Lines: 1})
	v := broker.JobView{Feed: proto.Feed{Owner: proto.Owner{ID: "o"}, Note: "the queue of m is full"}}
	talk.see(v)
	v.Feed.Note = ""
	talk.see(v)
	talk.see(v)
	if got := said.String(); got != "j: the queue of m is full\nj: it goes on\n" {
		t.Errorf("says %q", got)
	}
}
