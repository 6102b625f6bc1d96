package aggregator

import (
	"cmp"
	"slices"

	"millrace/proto"
)

// tally is what is known of a job's results while they come, in numbers that can be taken back when an ok replaces an
// error. The full statistics are made from the spool when the job is whole: see [Report].
type tally struct {
	ok       int64
	failed   int64
	attempts int64
	usage    proto.Usage
	models   map[string]*proto.ModelProgress
	errors   kinds
}

// topKinds is how many kinds of errors are told, beside those that say how a job ended.
const topKinds = 10

// add takes r in with sign 1 and takes it back with sign -1.
func (t *tally) add(r *proto.Result, sign int64) {
	m := t.model(r.Model)
	if r.OK {
		t.ok += sign
		m.OK += sign
	} else {
		t.failed += sign
		m.Failed += sign
		t.errors.add(r, sign)
	}
	t.attempts += sign * attempts(r)
	addUsage(&t.usage, r.Usage, sign)
	addUsage(&m.Usage, r.Usage, sign)
	if r.ContextCut {
		m.ContextCut += sign
	}
}

func (t *tally) model(name string) *proto.ModelProgress {
	if m := t.models[name]; m != nil {
		return m
	}
	if len(t.models) >= maxKinds && name != otherKind {
		return t.model(otherKind)
	}
	if t.models == nil {
		t.models = map[string]*proto.ModelProgress{}
	}
	m := &proto.ModelProgress{Model: name}
	t.models[name] = m
	return m
}

// fill writes the tally into a progress.
func (t *tally) fill(p *proto.Progress) {
	p.OK, p.Failed, p.Attempts, p.Usage = t.ok, t.failed, t.attempts, t.usage
	for _, m := range t.models {
		p.Models = append(p.Models, *m)
	}
	slices.SortFunc(p.Models, func(a, b proto.ModelProgress) int { return cmp.Compare(a.Model, b.Model) })
	p.Errors = t.errors.list()
	rank := 0
	p.Errors = slices.DeleteFunc(p.Errors, func(e proto.ErrorCount) bool {
		rank++
		return rank > topKinds && !proto.EndedWithJob(e.Code)
	})
}

// losses are what came of each model and does not count. Its zero value is ready.
type losses map[string]loss

type loss struct {
	Duplicates int64       `json:"duplicates"`
	Replaced   int64       `json:"replaced,omitempty"`
	Wasted     proto.Usage `json:"wasted"`
}

func (l *losses) add(model string, o loss) {
	if *l == nil {
		*l = losses{}
	}
	if _, ok := (*l)[model]; !ok && len(*l) >= maxKinds {
		model = otherKind
	}
	v := (*l)[model]
	v.Duplicates += o.Duplicates
	v.Replaced += o.Replaced
	addUsage(&v.Wasted, o.Wasted, 1)
	(*l)[model] = v
}

// attempts counts the charged tries of a line that ended with r: those in its history, and its last one where an
// engine was asked at all. A line that its owner ended (invalid, cancelled, expired) was not tried again for that.
func attempts(r *proto.Result) int64 {
	n := int64(len(r.Attempts))
	if r.Worker != "" && !proto.EndedWithJob(r.Code) { // it is not charged what was broken off
		n++
	}
	return n
}

func addUsage(to *proto.Usage, u proto.Usage, sign int64) {
	if !u.Counted {
		return
	}
	to.Counted = true
	to.Prompt += sign * u.Prompt
	to.Completion += sign * u.Completion
	to.Cached += sign * u.Cached
}
