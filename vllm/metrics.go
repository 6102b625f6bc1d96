package vllm

import (
	"errors"
	"fmt"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// Causes of restarts.
const (
	CauseCrashed     = "crashed"      // it ended by itself, whatever its exit status
	CauseOOM         = "oom"          // its log says that memory of the GPU was short
	CauseKilled      = "killed"       // by a signal that was not ours
	CauseHung        = "hung"         // it made no progress and was ended
	CauseStartFailed = "start_failed" // it did not come up
)

// Causes lists all causes of restarts.
func Causes() []string {
	return []string{CauseCrashed, CauseOOM, CauseKilled, CauseHung, CauseStartFailed}
}

// ended are the causes in words.
var ended = map[string]string{CauseCrashed: "it crashed", CauseOOM: "the GPU's memory was full", CauseKilled: "it was killed",
	CauseHung: "it hung", CauseStartFailed: "it did not come up"}

func bounded(cause string) string {
	if slices.Contains(Causes(), cause) {
		return cause
	}
	return CauseHung // what is ended from outside the server does not answer
}

// NewRestarted registers the counter of restarts, which all servers of a process share.
func NewRestarted(r prometheus.Registerer) (*prometheus.CounterVec, error) {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "millrace_engine_restarts_total",
		Help: "Restarts of engines that this process runs itself, by cause."}, []string{"cause"})
	if err := r.Register(c); err != nil {
		var are prometheus.AlreadyRegisteredError
		if have, ok := (*prometheus.CounterVec)(nil), false; errors.As(err, &are) {
			if have, ok = are.ExistingCollector.(*prometheus.CounterVec); ok {
				return have, nil
			}
		}
		return nil, fmt.Errorf("register metrics of vLLM: %w", err)
	}
	for _, cause := range Causes() {
		c.WithLabelValues(cause)
	}
	return c, nil
}
