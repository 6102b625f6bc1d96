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

// TestTalkOfHalted: that a job was halted is not said by the process that is about to go on with it, and is by others, or when it is
// halted anew.
func TestTalkOfHalted(t *testing.T) {
	for _, self := range []string{"o", ""} {
		var said bytes.Buffer
		talk := (&app{std: stdio{err: &said}}).newTalk(proto.Job{ID: "j", Lines: 1})
		talk.self = self
		halted := broker.JobView{Feed: proto.Feed{State: proto.FeedHalted, Note: "too many lines failed"}}
		if talk.see(halted); (said.Len() > 0) != (self == "") {
			t.Errorf("owner %q: says %q", self, said.String())
		}
		talk.see(broker.JobView{Feed: proto.Feed{Owner: proto.Owner{ID: "o"}}})
		said.Reset()
		if talk.see(halted); said.String() != "j: too many lines failed\n" {
			t.Errorf("owner %q, halted anew: says %q", self, said.String())
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

// TestTalkStands: why a job stands is said when that comes, and again each minute and not with every line.
func TestTalkStands(t *testing.T) {
	var said bytes.Buffer
	talk := (&app{std: stdio{err: &said}}).newTalk(proto.Job{ID: "j", Lines: 9})
	v := broker.JobView{Feed: proto.Feed{Owner: proto.Owner{ID: "o"}, Note: "vLLM is starting"}}
	is := func(want string) {
		t.Helper()
		said.Reset()
		if talk.see(v); said.String() != want {
			t.Errorf("says %q, want %q", said.String(), want)
		}
	}
	is("j: vLLM is starting\n")
	talk.said = talk.said.Add(-2 * standing)
	is("") // it was said just now
	v.Feed.Note = "vLLM is starting (10 s): compiling"
	is("j: vLLM is starting (10 s): compiling\n")
	talk.noted = talk.noted.Add(-2 * standing)
	is("j: 0 of 9 lines, 0 failed; vLLM is starting (10 s): compiling\n")
	talk.said = talk.said.Add(-2 * sayEvery)
	is("")
	v.Feed.Note = ""
	is("j: it goes on\nj: 0 of 9 lines, 0 failed\n")
	v.Progress.OK = 4
	talk.said = talk.said.Add(-2 * sayEvery)
	is("j: 4 of 9 lines, 0 failed\n")
	v.Feed.Note = "vLLM died"
	v.Progress.OK = 6
	talk.said = talk.said.Add(-2 * sayEvery)
	is("j: vLLM died\nj: 6 of 9 lines, 0 failed\n")
}

// TestTalkOfPast: of a job of which nothing has ended for long, and that has a note, no rate is shown.
func TestTalkOfPast(t *testing.T) {
	talk := (&app{std: stdio{err: new(bytes.Buffer)}}).newTalk(proto.Job{ID: "j", Lines: 900})
	now := time.Now()
	talk.pace.Add(now.Add(-40*time.Second), progress(0, 0), false)
	talk.pace.Add(now.Add(-time.Second), progress(39, 390), false)
	v := broker.JobView{Feed: proto.Feed{Owner: proto.Owner{ID: "o"}, Note: "worker a is gone"}, Progress: proto.Progress{BusyUS: 39e6, OK: 390}}
	talk.see(v)
	v.Progress.OK, v.Progress.BusyUS = 400, 40e6
	if talk.see(v); talk.told.Load() == (rates{}) {
		t.Error("no rate while others go on")
	}
	talk.moved = talk.moved.Add(-paceLately)
	if talk.see(v); talk.told.Load() != (rates{}) {
		t.Errorf("shows a rate of the past: %s", talk.told.Load())
	}
}
