package broker_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"millrace/broker"
	"millrace/proto"
)

// slowKV is a bucket of one key whose writer gets no answer, or a late one, while what it wrote is there at once. Its
// clock is that of a synctest bubble.
type slowKV struct {
	jetstream.KeyValue
	mu    sync.Mutex
	value []byte
	rev   uint64
	n     uint64 // writings of the slow one so far
	// answers says how long the first, the second … writing waits for its answer; the last goes for all that follow.
	answers []time.Duration
	// Writings from the from-th to the to-th do not reach the broker.
	from, to uint64
}

// never is how long an answer takes that ends with its context.
const never = time.Duration(-1)

type slowEntry struct {
	jetstream.KeyValueEntry
	value []byte
	rev   uint64
}

func (e slowEntry) Value() []byte    { return e.value }
func (e slowEntry) Revision() uint64 { return e.rev }

func (k *slowKV) Get(context.Context, string) (jetstream.KeyValueEntry, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.rev == 0 {
		return nil, jetstream.ErrKeyNotFound
	}
	return slowEntry{value: k.value, rev: k.rev}, nil
}

func (k *slowKV) Create(ctx context.Context, key string, v []byte, _ ...jetstream.KVCreateOpt) (uint64, error) {
	return k.Update(ctx, key, v, 0)
}

func (k *slowKV) Update(ctx context.Context, _ string, v []byte, rev uint64) (uint64, error) {
	k.mu.Lock()
	k.n++
	n := k.n
	if n < k.from || n > k.to {
		if rev != k.rev {
			k.mu.Unlock()
			return 0, jetstream.ErrKeyExists
		}
		k.value, k.rev = v, k.rev+1
		rev = k.rev
	}
	k.mu.Unlock()
	wait := k.answers[min(int(n), len(k.answers))-1]
	if wait == never {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	time.Sleep(wait) // of the bubble
	return rev, nil
}

// rivalKV is the same key as another process sees it, with answers at once.
type rivalKV struct{ *slowKV }

func (k rivalKV) Update(_ context.Context, _ string, v []byte, rev uint64) (uint64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if rev != k.rev {
		return 0, jetstream.ErrKeyExists
	}
	k.value, k.rev = v, k.rev+1
	return k.rev, nil
}

func leaseOf(kv jetstream.KeyValue, self proto.Owner) *broker.Lease {
	return &broker.Lease{KV: kv, Key: proto.LeaseKey, Self: self,
		Value: func(o proto.Owner) ([]byte, error) { return o.Encode() },
		Holder: func(v []byte) (proto.Owner, error) {
			var o proto.Owner
			return o, o.Decode(v)
		}}
}

// TestLeaseEndsBeforeARivals: however late answers come, or whether they come at all, a holder knows that it may not be
// one any more before another process can take the lease.
func TestLeaseEndsBeforeARivals(t *testing.T) {
	const slow, all = 1900 * time.Millisecond, 1 << 20
	for name, kv := range map[string]*slowKV{
		"silence from the start":             {answers: []time.Duration{0, never}, from: 2, to: all},
		"silence after a slow start":         {answers: []time.Duration{slow, never}, from: 2, to: all},
		"silence after slow ones":            {answers: []time.Duration{0, slow, slow, never}, from: 4, to: all},
		"one that hangs, whatever its time":  {answers: []time.Duration{0, 0, time.Hour}, from: 3, to: all},
		"answers that come after their time": {answers: []time.Duration{0, time.Hour}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				a, b := leaseOf(kv, owner("a")), leaseOf(rivalKV{kv}, owner("b"))
				// The rival looks all the time, from before the lease was taken.
				lost, taken := make(chan struct{}), make(chan struct{})
				go func() {
					defer close(taken)
					var w broker.Watch
					for {
						kv.mu.Lock()
						there := kv.rev > 0
						kv.mu.Unlock()
						if there {
							if _, err := b.Try(ctx, &w); err == nil {
								break
							} else if !errors.Is(err, broker.ErrLeaseHeld) {
								t.Error(err)
								break
							}
						}
						time.Sleep(time.Millisecond) // of the bubble
					}
					select {
					case <-lost:
					default:
						t.Error("another took the lease before its holder knew")
					}
				}()
				var w broker.Watch
				if _, err := a.Try(ctx, &w); err != nil {
					t.Fatal(err)
				}
				over := make(chan struct{})
				var once sync.Once
				go func() {
					defer close(over)
					_ = a.Keep(ctx, func(error) { once.Do(func() { close(lost) }) }, func() {})
				}()
				<-taken
				cancel()
				<-over
			})
		})
	}
}

// TestLeaseRegained: a holder that was not answered for a while and that nobody followed goes on.
func TestLeaseRegained(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kv := &slowKV{answers: []time.Duration{0, never, never, never, never, 0}, from: 2, to: 5}
		ctx, cancel := context.WithCancel(t.Context())
		a := leaseOf(kv, owner("a"))
		var w broker.Watch
		if _, err := a.Try(ctx, &w); err != nil {
			t.Fatal(err)
		}
		var calls []string
		err := a.Keep(ctx, func(err error) {
			calls = append(calls, "lost")
			if errors.Is(err, broker.ErrLeaseLost) {
				t.Error(err)
			}
		}, func() {
			calls = append(calls, "regained")
			cancel()
		})
		if err != nil || len(calls) != 2 || calls[0] != "lost" || calls[1] != "regained" {
			t.Errorf("%v, %v", calls, err)
		}
	})
}

// TestLeaseOfNamesake: where a system does not tell its boot, a process of another machine of the same name is not taken
// for a dead one of ours.
func TestLeaseOfNamesake(t *testing.T) {
	c := start(t, &broker.Server{})
	for _, host := range []string{"", "/", "mac", "mac/", "mac//"} {
		theirs := proto.Owner{ID: "theirs" + host, Host: host, PID: 1<<22 + 1} // above Linux' largest PID
		var w broker.Watch
		l := lease(t, c, theirs, time.Hour)
		if _, err := l.Try(t.Context(), &w); err != nil {
			t.Fatal(err)
		}
		ours := proto.Owner{ID: "ours", Host: host, PID: 1}
		if _, err := lease(t, c, ours, time.Hour).Try(t.Context(), &w); !errors.Is(err, broker.ErrLeaseHeld) {
			t.Errorf("host %q: %v", host, err)
		}
		if err := l.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
