package broker

import (
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

	mu  sync.Mutex // guards rev; Renew and Release may be called side by side
	rev uint64
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
	rev, err := write(v)
	if err != nil {
		return fmt.Errorf("write lease %s: %w", l.Key, err)
	}
	l.mu.Lock()
	l.rev = rev
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

// Keep renews the lease until ctx ends, and calls lost when it is not ours any more: because another process has
// it, or because it could not be renewed for TTL, after which another may have it. In the second case Keep goes on
// trying, and calls regained when it succeeds.
func (l *Lease) Keep(ctx context.Context, lost func(error), regained func()) error {
	last, silent := time.Now(), false
	tick := time.NewTicker(l.ttl() / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		rctx, cancel := context.WithTimeout(ctx, l.ttl()/3)
		err := l.Renew(rctx)
		cancel()
		switch {
		case err == nil:
			last = time.Now()
			if silent {
				silent = false
				regained()
			}
		case errors.Is(err, ErrLeaseLost):
			lost(err)
			return err
		case time.Since(last) > l.ttl() && !silent && ctx.Err() == nil:
			silent = true
			lost(fmt.Errorf("lease %s not renewed for %s: %w", l.Key, l.ttl(), err))
		}
	}
}

// Release lets go of the lease so that another process need not wait.
func (l *Lease) Release(ctx context.Context) error {
	if err := l.write(ctx, proto.Owner{}); err != nil {
		return fmt.Errorf("release: %w", err)
	}
	return nil
}
