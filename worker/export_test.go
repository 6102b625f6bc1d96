package worker

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// What tests from outside use of the rig; only they may import the simulated engine.

type Rig = rig

func NewRig(tb testing.TB) *Rig            { return newRig(tb) }
func (r *rig) Send(reqs ...*proto.Request) { r.tb.Helper(); r.send(reqs...) }
func (r *rig) Wait(n int) []*proto.Result  { r.tb.Helper(); return r.wait(n) }
func (r *rig) WaitFor(d time.Duration, n int) []*proto.Result {
	r.tb.Helper()
	return r.waitFor(d, n)
}
func (r *rig) Until(what string, ok func() bool)       { r.tb.Helper(); r.until(what, ok) }
func (r *rig) Settled(n int)                           { r.tb.Helper(); r.settled(n) }
func (r *rig) State(want string) *proto.Worker         { r.tb.Helper(); return r.state(want) }
func (r *rig) Start(e Engine, change ...func(*Worker)) { r.tb.Helper(); r.start(e, change...) }
func (r *rig) Workers() []*proto.Worker                { r.tb.Helper(); return r.workers() }
func Requests(n int) []*proto.Request                  { return requests(n) }
func Exactly(tb testing.TB, got []*proto.Result, n int) map[int64]*proto.Result {
	tb.Helper()
	return exactly(tb, got, n)
}
func FreeAddr(tb testing.TB) string { tb.Helper(); return freeAddr(tb) }
func Labelled(tb testing.TB, reg *prometheus.Registry, name, label, value string) float64 {
	tb.Helper()
	return labelled(tb, reg, name, label, value)
}
func (r *rig) Pending() (stored, out int)    { r.tb.Helper(); return r.pending() }
func (w *Worker) SetLongGap(d time.Duration) { w.longGap = d }
func (w *Worker) SetGrace(d time.Duration)   { w.grace = d }
func (w *Worker) SetRefusal(d time.Duration) { w.refusal = d }

// Close lets go of idle connections at once; a test ends with none.
func (h *HTTP) Close() { h.rt.CloseIdleConnections() }
