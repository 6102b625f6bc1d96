package producer

import (
	"slices"
	"testing"
	"time"

	"millrace/broker"
	"millrace/proto"
)

// TestGone: of a worker that fell silent with lines in hand it is said, once that is sure, how many it has and when others
// get them; until they have them, it speaks again, or that time is over.
func TestGone(t *testing.T) {
	begin := time.Date(2026, 1, 2, 15, 0, 0, 0, time.UTC)
	at := func(sec int) time.Time { return begin.Add(time.Duration(sec) * time.Second) }
	beat := func(id string, silent int, held int64) broker.Beat {
		return broker.Beat{Worker: proto.Worker{ID: id, Host: id, UptimeUS: 1e12, Held: held, Models: []string{"m"}, State: proto.EngineReady}, Silent: time.Duration(silent) * time.Second}
	}
	g := gone{}
	is := func(sec int, handed int64, there int, want string, beats ...broker.Beat) {
		t.Helper()
		ws := g.look(beats, at(sec))
		qs := []broker.Queue{{Model: "m", HandedTo: handed, AckWait: time.Minute}}
		if got := g.note(qs, ws, at(sec)); got != want || len(ws) != there {
			t.Errorf("after %d s %d workers are there: %q, want %d: %q", sec, len(ws), got, there, want)
		}
	}
	is(0, 18, 2, "", beat("a", 1, 10), beat("b", 1, 8))
	is(9, 18, 2, "", beat("a", 9, 10), beat("b", 1, 8)) // the broker may have been away
	const lost = "worker a is gone, not heard of since 15:00:00, with about 10 lines in hand: other workers get them by 15:01:02 UTC"
	is(12, 18, 1, lost, beat("a", 12, 10), beat("b", 1, 8))
	is(18, 18, 1, lost, beat("b", 1, 8)) // its heartbeat has run out
	is(40, 10, 0, "workers a, b are gone, not heard of since 15:00:00, with 10 lines in hand: free again by 15:01:31 UTC, for a worker that serves the model", twice(g, beat("b", 11, 8), at(40))...)
	is(43, 18, 1, lost, beat("b", 1, 8)) // that one was only held up
	is(45, 12, 1, "", beat("b", 1, 8))   // most of what the other one had is with others by now
	is(61, 18, 1, "", beat("b", 1, 8))   // which is not said anew
	is(62, 18, 1, "", beat("b", 1, 8))
	if len(g) != 0 {
		t.Errorf("%d are remembered whose lines are with others", len(g))
	}
	is(70, 8, 2, "", beat("c", 9, 0), beat("b", 1, 8))
	is(73, 9, 1, "", beat("c", 12, 0), beat("b", 1, 8)) // it had nothing
	is(76, 5, 0, "worker c is gone, not heard of since 15:01:01, with 5 lines in hand: free again by 15:02:03 UTC, for a worker that serves the model", beat("c", 15, 0))
	// One that was started in its place has given back what it had.
	is(80, 10, 2, "", beat("d", 9, 10), beat("b", 1, 0))
	is(83, 10, 1, "worker d is gone, not heard of since 15:01:11, with about 10 lines in hand: other workers get them by 15:02:13 UTC", beat("d", 12, 10), beat("b", 1, 0))
	again := beat("e", 1, 0)
	again.Host = "d"
	again.UptimeUS = 20e6
	is(84, 10, 1, "worker d is gone, not heard of since 15:01:11, with about 10 lines in hand: other workers get them by 15:02:13 UTC", again) // it was there before
	late := again                                                                                                                              // it began before that, and was last heard 6 s ago
	late.UptimeUS, late.Silent = 10e6, 6*time.Second
	is(86, 10, 1, "worker d is gone, not heard of since 15:01:11, with about 10 lines in hand: other workers get them by 15:02:13 UTC", late)
	again.UptimeUS = 3e6
	is(87, 10, 1, "", again)
	// One that leaves in order takes its heartbeat away before it runs out, and has given back what it had.
	is(100, 10, 2, "", beat("f", 9, 10), beat("b", 1, 0))
	is(103, 10, 1, "worker f is gone, not heard of since 15:01:31, with about 10 lines in hand: other workers get them by 15:02:33 UTC", beat("f", 12, 10), beat("b", 1, 0))
	is(103, 10, 1, "", beat("b", 1, 0))
	// What one holds that serves another model too may be of that.
	both := beat("b", 1, 50)
	both.Models = []string{"m", "n"}
	is(110, 10, 2, "", beat("h", 9, 10), both)
	is(113, 10, 1, "worker h is gone, not heard of since 15:01:41, with about 10 lines in hand: other workers get them by 15:02:43 UTC", beat("h", 12, 10), both)
	// It is forgotten once that is over, though nobody asked the queues meanwhile.
	if g.look([]broker.Beat{both}, at(200)); len(g) != 0 {
		t.Errorf("%d are remembered for ever", len(g))
	}
}

// TestGoneOnce: that a worker is gone is said without a break, though what others have, which their heartbeats tell late, goes up
// and down.
func TestGoneOnce(t *testing.T) {
	begin := time.Date(2026, 1, 2, 15, 0, 0, 0, time.UTC)
	g, last, turns := gone{}, "", 0
	for sec := 9; sec <= 70; sec += 3 {
		now := begin.Add(time.Duration(sec) * time.Second)
		beats := []broker.Beat{{Worker: proto.Worker{ID: "b", UptimeUS: 1e12, Held: int64(sec % 2 * 10), Models: []string{"m"}, State: proto.EngineReady}, Silent: time.Second}}
		if sec < 15 {
			beats = append(beats, broker.Beat{Worker: proto.Worker{ID: "a", Host: "a", UptimeUS: 1e12, Held: 4, Models: []string{"m"}, State: proto.EngineReady}, Silent: time.Duration(sec) * time.Second})
		}
		note := g.note([]broker.Queue{{Model: "m", HandedTo: int64(4 + (sec+1)%2*10), AckWait: time.Minute}}, g.look(beats, now), now)
		if (note == "") != (last == "") {
			turns++
		}
		last = note
		if early := sec >= 15 && sec < 40; early && note == "" {
			t.Errorf("after %d s nothing is said", sec)
		}
	}
	if turns != 2 || last != "" {
		t.Errorf("it comes and goes: %d, at last %q", turns, last)
	}
}

// twice has a beat looked at once before.
func twice(g gone, b broker.Beat, now time.Time) []broker.Beat {
	g.look([]broker.Beat{b}, now)
	return []broker.Beat{b}
}

// TestGoneModels: only the queues of models are asked that the job still has lines of and workers were for that are gone.
func TestGoneModels(t *testing.T) {
	g := gone{
		"a": {Worker: proto.Worker{Models: []string{"open", "over", "another job's"}}, sure: true},
		"b": {Worker: proto.Worker{Models: []string{"not sure"}}},
	}
	var models []proto.ModelLines
	for _, m := range []string{"open", "over", "not sure", "served"} {
		models = append(models, proto.ModelLines{Model: m, Lines: 2})
	}
	r := &run{job: proto.Job{Models: models}, progress: proto.Progress{Models: []proto.ModelProgress{{Model: "over", OK: 1, Failed: 1}}}}
	if got := r.goneModels(g); !slices.Equal(got, []string{"open"}) {
		t.Errorf("%q", got)
	}
}

// TestNoticeAgain: what is said of the workers is looked at again soon; that of many, of which each is asked for, later.
func TestNoticeAgain(t *testing.T) {
	few, many := noticeAgain("no worker", 2), noticeAgain("no worker", 1000)
	if few >= time.Second || many != noticeEvery || noticeAgain("", 2) != noticeEvery {
		t.Errorf("%v, %v", few, many)
	}
}
