package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// TestUnserved: what status says of a job whose model nobody runs is what its owner says.
func TestUnserved(t *testing.T) {
	job := &broker.JobView{Job: proto.Job{Models: []proto.ModelLines{{Model: "m"}}}}
	loads := proto.Worker{ID: "a", State: proto.EngineWaiting, Reason: "loading", Models: []string{"m"}}
	hangs := proto.Worker{ID: "b", State: proto.EngineHung, Models: []string{"m"}}
	other := proto.Worker{ID: "c", State: proto.EngineReady, Models: []string{"n"}}
	ready := proto.Worker{ID: "d", State: proto.EngineReady, Models: []string{"m"}}
	for want, ws := range map[string][]proto.Worker{
		"":                         {loads, ready},
		"no worker serves model m": {other},
		"model m waits for a (loading), b (hung)": {other, loads, hangs},
	} {
		if got := unserved(job, ws); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	job.Progress.Models = []proto.ModelProgress{{Model: "m"}}
	if got := unserved(job, nil); got != "" {
		t.Errorf("of a model whose lines have all ended: %q", got)
	}
}

func TestWords(t *testing.T) {
	for got, want := range map[string]string{
		count(0, "line"):         "0 lines",
		count(1, "line"):         "1 line",
		count(int64(20), "line"): "20 lines",
		span(10 * time.Minute):   "10m",
		span(time.Hour):          "1h",
		span(90 * time.Second):   "1m30s",
		span(0):                  "0s",
		failure(&proto.ErrorCount{Count: 3, Code: "batch_cancelled", CustomID: "a"}):                                      "3 × batch_cancelled, e.g. custom_id a",
		failure(&proto.ErrorCount{Count: 1, Code: "engine_error", Status: 500, CustomID: "a", Message: "broke"}):          "1 × engine_error (HTTP 500), e.g. custom_id a: broke",
		failure(&proto.ErrorCount{Count: 2, Code: "invalid_request", Message: "bad", Line: 7}):                            "2 × invalid_request, e.g. line 7: bad",
		failure(&proto.ErrorCount{Count: 1, Code: "invalid_request", Message: "bad"}):                                     "1 × invalid_request, e.g. bad",
		failure(&proto.ErrorCount{Count: 1, Code: "engine_error", Status: 500, Mixed: true, CustomID: "a", Message: "x"}): "1 × engine_error (HTTP 500) with other messages, e.g. custom_id a: x",
		took(&aggregator.Figures{Duration: 12.34}):                                                                        "12.3 s",
		took(&aggregator.Figures{Duration: 723, Idle: 600.12}):                                                            "723.0 s (of which idle 600.1 s, with nothing at an engine that it answered; rates are over the rest)",
		repeats(&aggregator.Losses{}):              "",
		repeats(&aggregator.Losses{Duplicates: 1}): "not counted above: 1 result of lines that had ended before",
		repeats(&aggregator.Losses{Duplicates: 3, Replaced: 1, WastedInputTokens: 5, WastedOutputTokens: 7, WastedTokens: 12}): "not counted above: 3 results of lines that had ended before, 1 error of lines that ended ok after all, with 5 prompt and 7 output tokens",
		unheard(broker.StateRunning, proto.WantPause):  "",
		unheard(broker.StateOrphaned, proto.WantRun):   "no process runs this job at the moment; it takes effect when its command is run again",
		unheard(broker.StateOrphaned, proto.WantPause): "no process runs this job at the moment; workers begin no more of it, and what they drop of it is sent again when its command is run, after `millrace resume`",
		modelName(""): "(none)",
		note(overAs(broker.JobView{}, proto.CodeExpired)):                                                                "3 lines had no answer by then; --again makes a fresh run of all lines",
		note(overAs(broker.JobView{Control: proto.Control{Want: proto.WantCancel, By: "me@here"}}, proto.CodeCancelled)): "cancelled by me@here",
		note(overAs(broker.JobView{}, proto.CodeEngineError)):                                                            "",
		asked(&proto.Control{Want: proto.WantPause, By: "me@here", Reason: "lunch"}):                                     "paused by me@here: lunch",
		asked(&proto.Control{Want: proto.WantCancel, By: "me@here"}):                                                     "cancelled by me@here",
		asked(&proto.Control{Want: proto.WantRun, Reason: "on"}):                                                         "",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// overAs is a job that is over, three of whose lines ended so.
func overAs(v broker.JobView, code string) *broker.JobView {
	v.Progress = proto.Progress{State: proto.FoldDone, Errors: []proto.ErrorCount{{Code: code, Count: 3}}}
	return &v
}

// TestDoctorDisk: the disk of --data is looked at only where the broker may have its own there.
func TestDoctorDisk(t *testing.T) {
	t.Setenv("NATS_URL", "")
	ended, end := context.WithCancel(t.Context()) // nobody listens at any of these
	end()
	_, port, _ := strings.Cut(freePort(t), ":")
	for url, want := range map[string]bool{
		"": true, "nats://127.0.0.1:" + port: true, "localhost:" + port: true, "tls://me:pass@[::1]:" + port: true,
		"nats://0.0.0.0:" + port: false, "nats://127.0.0.1@0.0.0.0:" + port: false, "nats://0.0.0.0:" + port + ",nats://127.0.0.1:" + port: true,
	} {
		var out strings.Builder
		args := []string{"doctor", "--data", t.TempDir()}
		if url != "" {
			args = append(args, "--nats", url)
		}
		code, said := usually(ended, "nats://127.0.0.1:"+port, &out, args...)
		if code != exitFailure || strings.Contains(out.String(), "disk of ") != want || !strings.Contains(out.String(), "connection: ") {
			t.Errorf("%q: exit code %d, %s%s", url, code, out.String(), said)
		}
	}
	for url, want := range map[string]bool{"nats://127.0.0.1": true, "localhost": true, "nats://broker:4222": false, "nats://[fe80::1]:4222": false} {
		if near(url) != want {
			t.Errorf("%s is near: %v", url, !want)
		}
	}
}
