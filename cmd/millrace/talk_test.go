package main

import (
	"bytes"
	"strings"
	"testing"

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
	if talk.see(none); !strings.Contains(said.String(), "j: nobody feeds it") {
		t.Errorf("says %q when the owner has gone", said.String())
	}
}
