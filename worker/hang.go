package worker

import (
	"time"

	"millrace/worker/load"
)

// hangWatch finds an engine that has requests and makes nothing of them. Such an engine looks well: /health says
// 200, /metrics answers, its gauges stand still (a stopped EngineCore, a sleeping engine). So it is the tokens that
// count: hung is an engine that had requests of ours all the time and for the whole stall timeout counted no token
// and answered nothing. Whether num_requests_running says so too does not matter: an engine that stopped while it
// was idle never counts what came after. The KV cache in use counts as well, for engines that count tokens only when a
// request ends. Without metrics only the time limit of each request guards.
type hangWatch struct {
	since   time.Time // of the last sign of life
	tokens  int64
	usage   float64 // of the KV cache
	answers int
}

// stalled takes what a probe found and says whether it is time to call the engine hung.
func (h *hangWatch) stalled(now time.Time, g load.Gauges, inFlight, answers int, stall time.Duration) bool {
	tokens := g.Prompt + g.Generation
	if !g.Known || inFlight == 0 || tokens != h.tokens || g.KVUsage != h.usage || answers != h.answers || h.since.IsZero() {
		h.since, h.tokens, h.usage, h.answers = now, tokens, g.KVUsage, answers
		return false
	}
	return stall > 0 && now.Sub(h.since) >= stall
}

// reset gives the engine its whole time again.
func (h *hangWatch) reset(now time.Time) { h.since = now }

// moved says whether an engine that hung lives again: anything that it counts has changed.
func (h *hangWatch) moved(then, now load.Gauges) bool {
	return now.Known && (then.Prompt != now.Prompt || then.Generation != now.Generation ||
		then.Running != now.Running || then.Waiting != now.Waiting)
}
