package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/proto"
)

// Lease is a key that one process holds by writing it again and again, each time only if nobody else did.
// No clocks are compared: a lease is free when its key did not change for TTL on the clock of the one who wants it,
// or at once when its holder is a dead process of the same machine, or was released.
type Lease struct {
	KV   jetstream.KeyValue
	Key  string
	Self proto.Owner
	TTL  time.Duration // DefaultLeaseTTL where 0
	// Value renders what is written under the key while it is held by owner (the zero owner when it is let go).
	Value func(owner proto.Owner) ([]byte, error)
	// Holder reads the owner out of such a value.
	Holder func(value []byte) (proto.Owner, error)

	mu   sync.Mutex // guards rev and sent; Renew and Release may be called side by side
	rev  uint64
	sent time.Time // when the last writing that succeeded was begun: nobody else has waited for longer
}

// DefaultLeaseTTL is how long the holder of a lease may be silent.
const DefaultLeaseTTL = 6 * time.Second

// ErrLeaseLost is the cause with which the context of a lost lease ends.
var ErrLeaseLost = errors.New("lease lost: another process took it")

// ErrLeaseHeld is returned by Try when another process holds the lease.
var ErrLeaseHeld = errors.New("lease is held by another process")

func (l *Lease) ttl() time.Duration {
	if l.TTL == 0 {
		return DefaultLeaseTTL
	}
	return l.TTL
}

// Watch remembers since when a key has not changed. Its zero value has seen nothing.
type Watch struct {
	rev   uint64
	since time.Time
}

// stale says whether the key has been at rev for d.
func (w *Watch) stale(rev uint64, d time.Duration) bool {
	if w.rev != rev || w.since.IsZero() {
		w.rev, w.since = rev, time.Now()
	}
	return time.Since(w.since) >= d
}

// Try takes the lease if it is free, and else returns its holder and ErrLeaseHeld. To see that a holder fell silent
// it must be called again with the same Watch.
func (l *Lease) Try(ctx context.Context, w *Watch) (proto.Owner, error) {
	e, err := l.KV.Get(ctx, l.Key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return proto.Owner{}, l.put(l.Self, func(v []byte) (uint64, error) { return l.KV.Create(ctx, l.Key, v) })
	}
	if err != nil {
		return proto.Owner{}, fmt.Errorf("read lease %s: %w", l.Key, err)
	}
	holder, err := l.Holder(e.Value())
	if err != nil {
		return proto.Owner{}, fmt.Errorf("read lease %s: %w", l.Key, err)
	}
	if holder.ID != "" && holder.ID != l.Self.ID && !dead(holder, l.Self) && !w.stale(e.Revision(), l.ttl()) {
		return holder, ErrLeaseHeld
	}
	return holder, l.put(l.Self, func(v []byte) (uint64, error) { return l.KV.Update(ctx, l.Key, v, e.Revision()) })
}

func (l *Lease) put(owner proto.Owner, write func([]byte) (uint64, error)) error {
	v, err := l.Value(owner)
	if err != nil {
		return err
	}
	began := time.Now()
	rev, err := write(v)
	if err != nil {
		return fmt.Errorf("write lease %s: %w", l.Key, err)
	}
	l.mu.Lock()
	l.rev, l.sent = rev, began
	l.mu.Unlock()
	return nil
}

func (l *Lease) revision() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rev
}

// Renew writes the lease's present value. It returns ErrLeaseLost when another process holds it, and other errors
// when the broker does not answer. A broker that came back with an older or an empty disk has another revision or
// none: where the holder is still us, or nobody, we go on.
func (l *Lease) Renew(ctx context.Context) error { return l.write(ctx, l.Self) }

// write writes the lease as held by owner: us, or nobody. The revision that we know may be another one than the key
// has although the key is ours: after a broker that came back, and after a renewal whose answer we did not wait for.
func (l *Lease) write(ctx context.Context, owner proto.Owner) error {
	err := l.put(owner, func(v []byte) (uint64, error) { return l.KV.Update(ctx, l.Key, v, l.revision()) })
	var je jetstream.JetStreamError
	if err == nil || !errors.Is(err, jetstream.ErrKeyExists) && !errors.As(err, &je) {
		return err
	}
	e, gerr := l.KV.Get(ctx, l.Key)
	if errors.Is(gerr, jetstream.ErrKeyNotFound) {
		return l.put(owner, func(v []byte) (uint64, error) { return l.KV.Create(ctx, l.Key, v) })
	}
	if gerr != nil {
		return err
	}
	if holder, herr := l.Holder(e.Value()); herr != nil || holder.ID != l.Self.ID {
		return ErrLeaseLost
	}
	return l.put(owner, func(v []byte) (uint64, error) { return l.KV.Update(ctx, l.Key, v, e.Revision()) })
}

// left is how long the lease is surely ours: a TTL from the beginning of the last renewal, less an eighth for what
// lost must stop.
func (l *Lease) left() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Until(l.sent.Add(l.ttl() - l.ttl()/8))
}

// Keep renews the lease, which Try took, until ctx ends, and calls lost when it is not ours any more: because another
// process has it, or because it could not be renewed, before another may have it, also while a renewal is unanswered. In
// the second case Keep goes on trying, and calls regained when it succeeds.
func (l *Lease) Keep(ctx context.Context, lost func(error), regained func()) error {
	tick := time.NewTicker(l.ttl() / 4)
	defer tick.Stop()
	end := time.NewTimer(l.left())
	defer end.Stop()
	var (
		answer  = make(chan error, 1)
		asking  bool // a renewal is under way
		silent  bool // lost was called
		problem error
	)
	for {
		select {
		case <-ctx.Done():
			if asking {
				<-answer
			}
			return nil
		case <-tick.C:
			if !asking {
				asking = true
				go func() { answer <- l.renew(ctx) }()
			}
		case err := <-answer:
			asking = false
			if errors.Is(err, ErrLeaseLost) {
				lost(err)
				return err
			}
			problem = err
			left := l.left()
			if left <= 0 { // not renewed, or so late that it may be another's already
				continue
			}
			end.Reset(left)
			if silent {
				silent = false
				regained()
			}
		case <-end.C:
			if left := l.left(); left > 0 { // somebody called Renew
				end.Reset(left)
				continue
			}
			silent = true
			lost(fmt.Errorf("lease %s not renewed for nearly %s: %w", l.Key, l.ttl(), Plain(cmp.Or(problem, errUnanswered))))
		}
	}
}

var errUnanswered = errors.New("no answer")

// renew renews the lease once, with the time for it that lets the next one come before it is too late.
func (l *Lease) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, l.ttl()/3)
	defer cancel()
	return l.Renew(ctx)
}

// Release lets go of the lease so that another process need not wait.
func (l *Lease) Release(ctx context.Context) error {
	if err := l.write(ctx, proto.Owner{}); err != nil {
		return fmt.Errorf("release: %w", err)
	}
	return nil
}
