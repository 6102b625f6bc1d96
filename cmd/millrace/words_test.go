package main

import (
	"testing"
	"time"

	"millrace/proto"
)

func TestWords(t *testing.T) {
	for got, want := range map[string]string{
		count(0, "line"):         "0 lines",
		count(1, "line"):         "1 line",
		count(int64(20), "line"): "20 lines",
		span(10 * time.Minute):   "10m",
		span(time.Hour):          "1h",
		span(90 * time.Second):   "1m30s",
		span(0):                  "0s",
		failure(3, "batch_cancelled", 0, "a", ""):     "3 × batch_cancelled, e.g. a",
		failure(1, "engine_error", 500, "a", "broke"): "1 × engine_error (HTTP 500), e.g. a: broke",
		failure(1, "invalid_request", 0, "", "bad"):   "1 × invalid_request: bad",
		modelName(""): "(none)",
		asked(&proto.Control{Want: proto.WantPause, By: "me@here", Reason: "lunch"}): "paused by me@here: lunch",
		asked(&proto.Control{Want: proto.WantCancel, By: "me@here"}):                 "cancelled by me@here",
		asked(&proto.Control{Want: proto.WantRun, Reason: "on"}):                     "",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
