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
	load  Load // what it has counted
}

// Request is a request to a Virtual engine. All counts are tokens.
type Request struct {
	ID     int
	Prompt int
	Output int
	// Choices is how many outputs it asks for, each of Output tokens; 0 is one.
	Choices int
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
	Prompts          int64 // prompt tokens of sequences that have made their first token
	Finished         int64 // sequences
	Held             int64 // tokens of sequences that have made their first token and not their last
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
	var hashes []uint64
	if v.sched.pool.caching {
		hashes = make([]uint64, r.Prompt/blockSize)
		for i := range hashes {
			if key := mix(v.salt); (i+1)*blockSize <= r.Shared {
				hashes[i] = mix(mix(r.Group)+uint64(i)) | 1
			} else {
				hashes[i] = mix(key+uint64(i)) | 1
			}
		}
	}
	c := &call{left: max(r.Choices, 1)}
	for i := range c.left {
		c.seqs = append(c.seqs, &sequence{call: c, prompt: r.Prompt, want: r.Output, reason: finishLength, choice: r.ID, hashes: hashes, tail: mix(v.salt<<20 + uint64(i))})
	}
	v.sched.add(c)
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
		if s.emitted && v.count(s, finished) {
			ended = append(ended, s.choice)
		}
	}
	return ended, true
}

// count takes in a token of s, and reports whether its request has ended with it.
func (v *Virtual) count(s *sequence, finished bool) bool {
	v.load.Generated++
	v.load.Held++
	if s.made == 1 {
		v.load.Prompts += int64(s.prompt)
		v.load.Held += int64(s.prompt)
	}
	if !finished || s.made < s.want {
		return false
	}
	v.load.Finished++
	v.load.Held -= int64(s.prompt + s.made)
	s.call.left--
	return s.call.left == 0
}

// Load returns the gauges.
func (v *Virtual) Load() Load {
	l := v.load
	l.Running, l.Waiting = len(v.sched.running), v.sched.waiting.len()
	l.KVUsage = float64(v.sched.pool.used()) / float64(len(v.sched.pool.refs))
	l.Preemptions = int64(v.sched.preemptions)
	return l
}
