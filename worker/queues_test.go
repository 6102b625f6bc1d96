package worker

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"millrace/proto"
)

// claim makes the queue of a model another model's: their names have one token.
func (r *rig) claim(model string) {
	r.tb.Helper()
	cfg := proto.RequestStreamConfig(model, 1<<20)
	cfg.Metadata[proto.MetaModel] = "another"
	_, err := r.conn.JS.CreateOrUpdateStream(r.tb.Context(), cfg)
	must(r.tb, err)
}

// says waits until the heartbeat has a state and a reason that contains a text, and checks which models it names.
func (r *rig) says(state, text string, models ...string) {
	r.tb.Helper()
	r.until("heartbeat "+state+", "+text, func() bool {
		return slices.ContainsFunc(r.workers(), func(w *proto.Worker) bool {
			return w.State == state && strings.Contains(w.Reason, text) && slices.Equal(w.Models, models)
		})
	})
}

// TestOneQueueFails: a model whose queue cannot be declared does not stop the others, and its worker says so.
func TestOneQueueFails(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.models = `"b","m"` })
	r.claim("b")
	r.send(requests(5)...)
	r.start(f.engine())
	exactly(t, r.wait(5), 5)
	r.settled(0)
	r.says(proto.EngineReady, `belongs to model "another"`, "m")
	must(t, r.conn.JS.DeleteStream(t.Context(), proto.RequestStream("b")))
	r.until("both are declared", func() bool {
		got := r.state(proto.EngineReady)
		return got.Reason == "" && len(got.Models) == 2
	})
}

// TestAllQueuesFail: a worker that has no queue says why it does not run.
func TestAllQueuesFail(t *testing.T) {
	r, f := newRig(t), newFake(t)
	f.set(func() { f.models = `"b"` })
	r.claim("b")
	r.start(f.engine())
	r.says(proto.EngineNoModel, `belongs to model "another"`)
	must(t, r.conn.JS.DeleteStream(t.Context(), proto.RequestStream("b")))
	r.says(proto.EngineReady, "", "b")
}

// TestOneQueueFailsLater: the same when the connection is made anew. What is held of the others is acknowledged.
func TestOneQueueFailsLater(t *testing.T) {
	r, f := newRigTCP(t), newFake(t)
	release := make(chan struct{})
	f.set(func() {
		f.models = `"b","m"`
		f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
			<-release
			say(w, 200, okBody)
		}
	})
	r.start(f.engine(), func(w *Worker) { w.Concurrency = 2 })
	r.says(proto.EngineReady, "", "b", "m")
	r.send(requests(2)...)
	f.enter(2)
	r.claim("b")
	r.restart("")
	close(release)
	exactly(t, r.wait(2), 2)
	r.settled(0)
	r.says(proto.EngineReady, `belongs to model "another"`, "m")
	r.send(request(2))
	exactly(t, r.wait(3), 3)
}

// TestModelLeaves: what is held of a model that its engine does not serve any more is acknowledged after the
// connection was made anew.
func TestModelLeaves(t *testing.T) {
	r, f := newRigTCP(t), newFake(t)
	release := make(chan struct{})
	f.set(func() {
		f.models = `"b","m"`
		f.work = func(w http.ResponseWriter, _ *http.Request, _ string) {
			<-release
			say(w, 200, okBody)
		}
	})
	r.start(f.engine())
	r.says(proto.EngineReady, "", "b", "m")
	r.send(requests(2)...)
	f.enter(2)
	f.set(func() { f.models = `"b"` })
	r.says(proto.EngineReady, "", "b")
	r.restart("")
	close(release)
	exactly(t, r.wait(2), 2)
	r.settled(0)
}
