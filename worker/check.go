package worker

import (
	"context"
	"time"

	"millrace/proto"
	"millrace/worker/load"
)

// Finding is what Check found of an engine, and what Run would do with it.
type Finding struct {
	Status
	Trouble  string      // why no line would be run now, for people; empty: lines would be run
	Models   []string    // that it would pull lines of
	Limit    int         // requests that it would have in flight at first
	LimitWhy string      // why so many, for people
	GPUs     []proto.GPU // of this machine, where the engine is on it and nvidia-smi is there
	OwnGPUs  bool        // these are the engine's; otherwise nobody knows which of them are
}

// checkTimeout is for all that an engine is asked.
const checkTimeout = 10 * time.Second

// Check looks at the engine once, as Run does again and again. It needs no broker, sends no request that costs the engine
// work, and waits for nothing. Of the fields it uses Engine, Models, Concurrency, KVTokens, Devices and GPUs.
func (w *Worker) Check(ctx context.Context) *Finding {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	st, err := w.Engine.Probe(ctx)
	f := &Finding{Status: st, Trouble: st.Reason, Models: st.Models}
	if w.Models != nil {
		f.Models = w.Models
	}
	if err != nil {
		f.State, f.Trouble = proto.EngineWaiting, unreachable(w.Engine.String(), err, false)
	}
	if w.GPUs != nil && here(w.Engine.String()) {
		_ = w.GPUs.look(ctx) // then nothing is known of them
		f.GPUs, f.OwnGPUs = w.gpus(st)
	}
	if f.State == proto.EngineReady {
		f.Gauges.KVTokens = w.capacity(st)
		l := load.New(w.Concurrency)
		l.Observe(f.Engine, 0, time.Now())
		f.Limit, f.LimitWhy = l.Get(), l.Reason()
	}
	return f
}
