package sim

import "time"

// Virtual is an engine in virtual time: the scheduler of Engine with its model of how long a step takes, but without
// a clock, HTTP and text. It is for studies of what keeps an engine full: hours of a job pass in seconds, and the same
// requests give the same result each time. It belongs to one goroutine.
type Virtual struct {
	cfg   Config
	sched *scheduler
	plan  plan
	now   time.Duration
	salt  uint64
	made  int64 // output tokens
}

// Request is a request to a Virtual engine. All counts are tokens.
type Request struct {
	ID     int
	Prompt int
	Output int
	// The first Shared tokens of the prompt are those of every request of the same Group.
	Shared int
	Group  uint64
}

// Load is what the gauges and counters of a Virtual engine say at the end of its last step, as /metrics does.
type Load struct {
	Running, Waiting int
	KVUsage          float64 // 0 to 1
	Preemptions      int64
	Generated        int64 // output tokens
}

// NewVirtual returns an engine that has nothing to do. Of cfg it takes the sizes and the times of a step.
func NewVirtual(cfg Config) (*Virtual, error) {
	if len(cfg.Models) == 0 {
		cfg.Models = []string{"virtual"}
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Virtual{cfg: cfg, sched: newScheduler(cfg)}, nil
}

// Now is the time since the start.
func (v *Virtual) Now() time.Duration { return v.now }

// Wait lets time pass while nothing runs.
func (v *Virtual) Wait(until time.Duration) { v.now = max(v.now, until) }

// Submit puts a request at the end of the queue.
func (v *Virtual) Submit(r Request) {
	v.salt++
	s := &sequence{prompt: r.Prompt, want: r.Output, reason: finishLength, choice: r.ID, tail: mix(v.salt << 20)}
	s.call = &call{seqs: []*sequence{s}, left: 1}
	if v.sched.pool.caching {
		s.hashes = make([]uint64, r.Prompt/blockSize)
		for i := range s.hashes {
			if key := mix(v.salt); (i+1)*blockSize <= r.Shared {
				s.hashes[i] = mix(mix(r.Group)+uint64(i)) | 1
			} else {
				s.hashes[i] = mix(key+uint64(i)) | 1
			}
		}
	}
	v.sched.add(s.call)
}

// Step runs one step and returns the IDs of what has finished with it. It reports false when there was nothing to do.
func (v *Virtual) Step() (ended []int, ok bool) {
	if !v.sched.busy() {
		return nil, false
	}
	v.sched.schedule(&v.plan, int64(v.now))
	v.now += stepTime(v.cfg, &v.plan)
	finished := v.sched.advance(&v.plan)
	for _, s := range v.plan.seqs {
		if !s.emitted {
			continue
		}
		v.made++
		if finished && s.made == s.want {
			ended = append(ended, s.choice)
		}
	}
	return ended, true
}

// Load returns the gauges.
func (v *Virtual) Load() Load {
	return Load{
		Running: len(v.sched.running), Waiting: v.sched.waiting.len(),
		KVUsage:     float64(v.sched.pool.used()) / float64(len(v.sched.pool.refs)),
		Preemptions: int64(v.sched.preemptions), Generated: v.made,
	}
}
