package sim

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
)

// Faults are the failures on demand. The shares are of well-formed requests,
// counted as they arrive; at most one of the shares from Errors to Garbage meets
// a request. Which one is a pure function of Config.Seed and the arrival number,
// so equal runs fail alike. Streams know Errors, Abort and Slow only. The JSON
// form is that of POST /sim/faults.
type Faults struct {
	// Errors maps an HTTP status to the share of requests that get it at once,
	// with vLLM's body for it.
	Errors map[int]float64 `json:"errors,omitzero"`
	// Abort is the share that ends half-way: HTTP 200, finish_reason "abort".
	Abort float64 `json:"abort,omitzero"`
	// Torn is the share whose connection is cut in the middle of the body.
	Torn float64 `json:"torn,omitzero"`
	// Reset is the share whose connection is cut instead of an answer.
	Reset float64 `json:"reset,omitzero"`
	// Empty is the share answered by HTTP 200 and nothing.
	Empty float64 `json:"empty,omitzero"`
	// Garbage is the share answered by HTTP 200 and half a JSON document.
	Garbage float64 `json:"garbage,omitzero"`

	// Slow is the share that makes progress only in every SlowFactor-th step
	// (default 10), holding its place and its KV blocks all the while. It adds
	// to the others.
	Slow       float64 `json:"slow,omitzero"`
	SlowFactor int     `json:"slow_factor,omitzero"`

	// Hang stops the scheduler: /health stays 200, the gauges freeze, nothing is
	// answered. Setting it back to false goes on where it stopped.
	Hang bool `json:"hang,omitzero"`
	// Asleep is an engine that was put to sleep: /health stays 200, /is_sleeping and
	// engine_sleep_state say so, nothing is answered.
	Asleep bool `json:"asleep,omitzero"`
	// Crash kills the engine now; see Engine.Kill. It is not kept.
	Crash bool `json:"crash,omitzero"`
	// CrashAfter kills the engine when the request of that number, counted from
	// when this was set, is scheduled first. Zero means never.
	CrashAfter int `json:"crash_after,omitzero"`
	// Poison kills the engine when a prompt that contains it is scheduled.
	Poison string `json:"poison,omitzero"`
}

// ParseFaults reads faults from their JSON form, and checks them.
func ParseFaults(b []byte) (f Faults, err error) {
	err = json.Unmarshal(b, &f, json.RejectUnknownMembers(true))
	var wrong *json.SemanticError
	switch {
	case errors.Is(err, json.ErrUnknownName) && errors.As(err, &wrong):
		return f, fmt.Errorf("%q is no fault; known are %s", wrong.JSONPointer.LastToken(), strings.Join(faultNames(), ", "))
	case err != nil:
		return f, fmt.Errorf(`%w; give JSON such as {"errors":{"500":0.01},"abort":0.01}`, err)
	}
	return f, f.check()
}

// faultNames are the keys of the JSON form.
func faultNames() (names []string) {
	for _, field := range reflect.VisibleFields(reflect.TypeFor[Faults]()) {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		names = append(names, name)
	}
	return names
}

func (f *Faults) check() error {
	sum := f.Abort + f.Torn + f.Reset + f.Empty + f.Garbage
	for status, share := range f.Errors {
		if status < 400 || status > 599 {
			return fmt.Errorf("%d is no HTTP error status, 400 to 599", status)
		}
		sum += share
		if share < 0 {
			return errors.New("a share is negative")
		}
	}
	switch {
	case min(f.Abort, f.Torn, f.Reset, f.Empty, f.Garbage, f.Slow) < 0:
		return errors.New("a share is negative")
	case sum > 1 || f.Slow > 1:
		return fmt.Errorf("the shares add up to %g, above 1", max(sum, f.Slow))
	case f.SlowFactor < 0 || f.CrashAfter < 0:
		return errors.New("slow_factor or crash_after is negative")
	}
	return nil
}

// stand says whether the scheduler stands still.
func (f *Faults) stand() bool { return f.Hang || f.Asleep }

type fault int

const (
	faultNone fault = iota
	faultStatus
	faultAbort
	faultTorn
	faultReset
	faultEmpty
	faultGarbage
)

// armed is a set of faults as the handlers use it. It is not changed once shared.
type armed struct {
	Faults
	bands []band
	since uint64 // arrivals before it was set
}

// band is the part of [0, 1) below upTo and above the band before it.
type band struct {
	upTo   float64
	kind   fault
	status int
}

func (f Faults) arm(since uint64) *armed {
	f.Errors = maps.Clone(f.Errors)
	a := &armed{Faults: f, since: since}
	for status, share := range f.Errors {
		a.bands = append(a.bands, band{share, faultStatus, status})
	}
	slices.SortFunc(a.bands, func(x, y band) int { return cmp.Compare(x.status, y.status) })
	for kind, share := range []float64{faultAbort: f.Abort, faultTorn: f.Torn, faultReset: f.Reset, faultEmpty: f.Empty, faultGarbage: f.Garbage} {
		a.bands = append(a.bands, band{share, fault(kind), http.StatusOK})
	}
	var sum float64
	for i := range a.bands {
		sum += a.bands[i].upTo
		a.bands[i].upTo = sum
	}
	return a
}

// verdict is what happens to one request.
type verdict struct {
	kind   fault
	status int // of faultStatus
	slow   int // 1 is normal
	crash  bool
}

// judge decides about the request that arrived as number n, from 1.
func (a *armed) judge(seed, n uint64) verdict {
	v := verdict{slow: 1, crash: a.CrashAfter > 0 && n >= a.since+uint64(a.CrashAfter)}
	u := unit(mix(seed) + 2*n)
	for _, b := range a.bands {
		if u < b.upTo {
			v.kind, v.status = b.kind, b.status
			break
		}
	}
	if unit(mix(seed)+2*n+1) < a.Slow {
		v.slow = cmp.Or(a.SlowFactor, 10)
	}
	return v
}

// unit maps x to [0, 1), evenly.
func unit(x uint64) float64 { return float64(mix(x)>>11) / (1 << 53) }

// SetFaults replaces all faults. CrashAfter counts from now.
func (e *Engine) SetFaults(f Faults) error {
	if err := f.check(); err != nil {
		return err
	}
	crash := f.Crash
	f.Crash = false
	e.faults.Store(f.arm(e.arrivals.Load()))
	if crash {
		e.Kill()
	}
	e.inbox.wake()
	return nil
}

// Faults returns the faults in force.
func (e *Engine) Faults() Faults {
	f := e.faults.Load().Faults
	f.Errors = maps.Clone(f.Errors)
	return f
}

// serveFaults is GET and POST /sim/faults.
func (e *Engine) serveFaults(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost {
		body, err := io.ReadAll(r.Body)
		var f Faults
		if err == nil {
			f, err = ParseFaults(body)
		}
		if err == nil {
			err = e.SetFaults(f)
		}
		if err != nil {
			badRequest("", "%v", err).write(w)
			return
		}
	}
	body, err := json.Marshal(e.Faults(), json.Deterministic(true))
	if err != nil {
		internalError(err.Error()).write(w)
		return
	}
	writeJSON(w, http.StatusOK, body)
}
