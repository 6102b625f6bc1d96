package sim

import (
	"context"
	"errors"
	"hash/maphash"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ErrEngineDead is what Run returns after the engine was killed.
var ErrEngineDead = errors.New("simulated engine is dead")

// Engine is one simulated vLLM server. Its handler may be used by any number of
// goroutines; one goroutine, that of Run, owns the scheduler.
type Engine struct {
	cfg         Config
	fingerprint string
	hashSeed    maphash.Seed
	start       time.Time

	faults   atomic.Pointer[armed]
	arrivals atomic.Uint64 // well-formed requests so far
	inbox    inbox
	gate     gate
	stats    *stats

	running  atomic.Bool   // Run was called
	kill     chan struct{} // closed by Kill
	killOnce sync.Once
	dead     chan struct{} // closed when Run has ended
	aborting atomic.Bool   // ends all requests with "abort"

	// Owned by Run.
	sched *scheduler
	due   time.Time // when the current step ends
}

// New returns an engine that does nothing until Run, Serve or ListenAndServe.
func New(cfg Config) (*Engine, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	e := &Engine{
		cfg:         cfg,
		fingerprint: "vllm-" + cfg.Version + "-" + hex8(hash64(strings.Join(cfg.Models, "\n"))),
		hashSeed:    maphash.MakeSeed(),
		start:       time.Now(),
		stats:       newStats(cfg),
		kill:        make(chan struct{}),
		dead:        make(chan struct{}),
		sched:       newScheduler(cfg),
	}
	e.inbox.kick = make(chan struct{}, 1)
	e.gate.limit = cfg.MaxQueued
	e.faults.Store(cfg.Faults.arm(0))
	if cfg.Faults.Crash {
		e.Kill()
	}
	return e, nil
}

// Kill makes the engine die as by kill -9 of EngineCore: every request in flight
// and every later one gets HTTP 500, /health says 503, and Serve closes the port
// Config.DeathTime later. It does not wait.
func (e *Engine) Kill() { e.killOnce.Do(func() { close(e.kill) }) }

// Run schedules requests until ctx ends, then returns nil, or until the engine
// is killed, then returns ErrEngineDead. Either way what is in flight is answered
// with HTTP 500, and the engine is dead afterwards. Run may be called once.
func (e *Engine) Run(ctx context.Context) error {
	if !e.running.CompareAndSwap(false, true) {
		return errors.New("run simulated engine: it runs already, or has run")
	}
	defer e.die()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var p plan
	for e.awaitWork(ctx) {
		e.sched.schedule(&p, e.now())
		if p.poisoned {
			e.Kill()
			return ErrEngineDead
		}
		if !e.pace(ctx, timer, stepTime(e.cfg, &p)) {
			break
		}
		e.endStep(&p)
	}
	if ctx.Err() != nil {
		return nil
	}
	return ErrEngineDead
}

// awaitWork takes in what has arrived and waits, if need be, until there is
// something to schedule. It reports false when the engine has to stop.
func (e *Engine) awaitWork(ctx context.Context) bool {
	for {
		select {
		case <-e.kill:
			return false
		case <-ctx.Done():
			return false
		default:
		}
		if !e.faults.Load().stand() || e.aborting.Load() {
			e.takeIn()
			if e.sched.busy() {
				return true
			}
		}
		select {
		case <-e.inbox.kick:
			e.due = time.Now()
		case <-e.kill:
		case <-ctx.Done():
		}
	}
}

// takeIn moves what came since the last step from the inbox to the scheduler.
func (e *Engine) takeIn() {
	calls, gone := e.inbox.take()
	for _, c := range calls {
		e.sched.add(c)
	}
	if len(gone) > 0 {
		for _, c := range gone {
			c.gone = true
		}
		e.sched.dropGone()
	}
	if e.aborting.Load() {
		e.abortAll()
	}
	if (len(gone) > 0 || e.aborting.Load()) && !e.sched.busy() {
		e.stats.gauges(e.sched) // vLLM runs an empty step then
	}
}

// abortAll ends everything with what it has.
func (e *Engine) abortAll() {
	all := append(append([]*sequence(nil), e.sched.running...), e.sched.waiting.all()...)
	for _, s := range all {
		s.reason, s.want = finishAbort, s.made
		s.call.gone = true
	}
	e.sched.dropGone()
	for _, s := range all {
		e.settle(s)
	}
}

// stepTime is the model of how long a step takes.
func stepTime(c Config, p *plan) time.Duration {
	d := c.StepTime + time.Duration(p.decodes)*c.DecodeTime + time.Duration(p.prefill)*c.PrefillTime
	if c.GraphTokens > 0 && p.decodes+p.prefill > c.GraphTokens {
		d += c.EagerTime
	}
	return d
}

// maxLag is how far the clock of the steps may stay behind real time and still
// catch up. It hides the grain of timers, not a machine that is too slow.
const maxLag = 20 * time.Millisecond

// pace waits for the end of a step of length d. It reports false when the engine
// was told to stop meanwhile.
func (e *Engine) pace(ctx context.Context, timer *time.Timer, d time.Duration) bool {
	if d == 0 {
		return true
	}
	now := time.Now()
	if now.Sub(e.due) > maxLag {
		e.due = now
	}
	e.due = e.due.Add(d)
	wait := e.due.Sub(now)
	if wait <= 0 {
		return true
	}
	timer.Reset(wait)
	select {
	case <-timer.C:
		return true
	case <-e.kill:
	case <-ctx.Done():
	}
	return false
}

// endStep makes the results of a step known: metrics first, so that a client
// that has its answer finds it counted.
func (e *Engine) endStep(p *plan) {
	finished := e.sched.advance(p)
	e.stats.step(e.now(), p, e.sched)
	if !finished {
		return
	}
	for _, s := range p.seqs {
		if s.emitted && s.made == s.want {
			e.settle(s)
		}
	}
}

// settle counts s as finished and wakes the handler after the last of its call.
func (e *Engine) settle(s *sequence) {
	if s.call.left--; s.call.left == 0 {
		e.stats.call(s.call)
		close(s.call.done)
	}
}

// die fails everything that the engine still holds and will ever get.
func (e *Engine) die() {
	calls, _ := e.inbox.close()
	for _, s := range append(e.sched.running, e.sched.waiting.all()...) {
		calls = append(calls, s.call)
	}
	for _, c := range calls {
		if c.left > 0 {
			c.left, c.died = 0, true
			close(c.done)
		}
	}
	close(e.dead)
}

// now is the time in ns since the start of the engine.
func (e *Engine) now() int64 { return int64(time.Since(e.start)) }

func (e *Engine) isDead() bool {
	select {
	case <-e.kill:
		return true
	case <-e.dead:
		return true
	default:
		return false
	}
}

func (e *Engine) aliases() string { return strings.Join(e.cfg.Models, ", ") }

// inbox is how handlers reach the loop.
type inbox struct {
	mu     sync.Mutex
	calls  []*call
	gone   []*call
	closed bool
	kick   chan struct{} // one token: something changed
}

func (b *inbox) wake() {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

// submit reports false when the engine is dead.
func (b *inbox) submit(c *call) bool {
	b.mu.Lock()
	open := !b.closed
	if open {
		b.calls = append(b.calls, c)
	}
	b.mu.Unlock()
	b.wake()
	return open
}

// leave says that nobody waits for c any more.
func (b *inbox) leave(c *call) {
	b.mu.Lock()
	b.gone = append(b.gone, c)
	b.mu.Unlock()
	b.wake()
}

func (b *inbox) take() (calls, gone []*call) {
	b.mu.Lock()
	defer b.mu.Unlock()
	calls, gone = b.calls, b.gone
	b.calls, b.gone = nil, nil
	return calls, gone
}

func (b *inbox) close() (calls, gone []*call) {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	return b.take()
}

// gate counts the requests inside, limits them, and tells when the last has left.
type gate struct {
	mu      sync.Mutex
	limit   int // sequences; 0 = none
	held    int // sequences inside
	calls   int
	drained chan struct{} // made by drain, closed when calls is 0
}

type entry int

const (
	entryOpen entry = iota
	entryBusy
	entryStopping
)

func (g *gate) enter(seqs int) entry {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.drained != nil:
		return entryStopping
	case g.limit > 0 && g.held+seqs > g.limit:
		return entryBusy
	}
	g.held += seqs
	g.calls++
	return entryOpen
}

func (g *gate) leave(seqs int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held -= seqs
	if g.calls--; g.calls == 0 && g.drained != nil {
		close(g.drained)
	}
}

// drain lets nobody in any more. The channel is closed when all have left.
func (g *gate) drain() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.drained == nil {
		g.drained = make(chan struct{})
		if g.calls == 0 {
			close(g.drained)
		}
	}
	return g.drained
}
