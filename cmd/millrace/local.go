package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"millrace/broker"
	"millrace/proto"
)

// endpoint is how other commands of the same user find the broker inside a `millrace run`.
type endpoint struct {
	URL   string `json:"url"`
	Token string `json:"token"`
	PID   int    `json:"pid"`

	Output string `json:"output"` // where its results go; empty: an older program wrote this
}

func endpointFile(dir string) string { return filepath.Join(dir, "endpoint.json") }

func (e endpoint) write(dir string) error {
	b, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("write endpoint: %w", err)
	}
	if err := os.WriteFile(endpointFile(dir), b, 0o600); err != nil {
		return fmt.Errorf("write endpoint: %w", err)
	}
	return nil
}

// access reaches the broker of a run, which never comes back at the same place.
func (e endpoint) access() broker.Access {
	return broker.Access{URL: e.URL, Token: e.Token, Ends: true}
}

func readEndpoint(dir string) (endpoint, error) {
	var e endpoint
	b, err := os.ReadFile(endpointFile(dir))
	if err != nil {
		return e, err
	}
	return e, json.Unmarshal(b, &e)
}

// brokers are what a command that asks or tells is connected to: one that was named, or each `millrace run` of this user
// on this machine, or the one at the usual place.
type brokers struct {
	conns []*broker.Conn
	named bool                    // its user named it
	runs  bool                    // they are runs, which end
	at    map[string]*broker.Conn // which of them has a job, by its id; set by jobs
}

func (b *brokers) close() {
	for _, c := range b.conns {
		c.Close()
	}
}

// control connects a command that asks or tells.
func (a *app) control(ctx context.Context) (*brokers, error) {
	acc, named, err := a.nats.access()
	if err != nil {
		return nil, err
	}
	if !named {
		if b := a.runs(ctx); len(b.conns) > 0 {
			return b, nil
		}
		if !listens(ctx, a.nats.usually()) {
			return nil, &nobody{data: a.data, runs: a.kept()}
		}
	}
	b, err := a.reach(ctx, acc)
	if err != nil {
		return nil, err
	}
	b.named = named
	return b, nil
}

// reach connects to one broker.
func (a *app) reach(ctx context.Context, acc broker.Access) (*brokers, error) {
	conn, err := a.connectTo(ctx, acc, "control", controlWait)
	if err != nil {
		return nil, err
	}
	return &brokers{conns: []*broker.Conn{conn}}, nil
}

// runs connects to all runs. A run is known by its endpoint: nobody else listens there with its token. The locks of
// the folders are left alone, a run that starts would find its own taken.
func (a *app) runs(ctx context.Context) *brokers {
	es := a.endpoints(ctx)
	conns := make([]*broker.Conn, len(es))
	var wg sync.WaitGroup
	for i, e := range es {
		wg.Go(func() {
			if c, err := a.connectTo(ctx, e.access(), "control", time.Second); err == nil {
				conns[i] = c
			}
		})
	}
	wg.Wait()
	return &brokers{conns: slices.DeleteFunc(conns, func(c *broker.Conn) bool { return c == nil }), runs: true}
}

// endpoints are those where somebody listens.
func (a *app) endpoints(ctx context.Context) (es []endpoint) {
	dirs, _ := os.ReadDir(a.runDir("")) // where there is none, nothing runs
	for _, dir := range dirs {
		if e, err := readEndpoint(a.runDir(dir.Name())); err == nil && listens(ctx, e.URL) {
			es = append(es, e)
		}
	}
	return es
}

// listens says whether anybody does, or may: who takes long to answer is not gone.
func listens(ctx context.Context, addr string) bool {
	u, err := url.Parse(addr)
	if err != nil {
		return false
	}
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return os.IsTimeout(err) || ctx.Err() != nil
	}
	conn.Close()
	return true
}

// each calls do for each broker. Runs that end meanwhile are passed over.
func (b *brokers) each(do func(*broker.Conn) error) error {
	for _, c := range b.conns {
		if err := do(c); err != nil && (!b.runs || c.NC.IsConnected()) {
			return err
		}
	}
	return nil
}

// jobs lists the jobs of all brokers, the newest first.
func (b *brokers) jobs(ctx context.Context) (all []broker.JobView, err error) {
	b.at = map[string]*broker.Conn{}
	err = b.each(func(c *broker.Conn) error {
		js, err := broker.Jobs(ctx, c.JS)
		for _, v := range js {
			b.at[v.Job.ID] = c
		}
		all = append(all, js...)
		return err
	})
	slices.SortStableFunc(all, func(x, y broker.JobView) int { return cmp.Compare(y.Job.CreatedMS, x.Job.CreatedMS) })
	return all, err
}

// workers are those of each broker as people are shown them; of one that does not tell, none are known.
func (b *brokers) workers(ctx context.Context) map[*broker.Conn][]proto.Worker {
	all := map[*broker.Conn][]proto.Worker{}
	_ = b.each(func(c *broker.Conn) error {
		if beats, err := broker.Beats(ctx, c.JS); err == nil {
			all[c] = seen(beats)
		}
		return nil
	})
	return all
}

func seen(beats []broker.Beat) []proto.Worker {
	ws := []proto.Worker{}
	for i := range beats {
		ws = append(ws, beats[i].Seen())
	}
	return ws
}

// fold sets Unfolded of the jobs without a producer; the producers of the others note by themselves that no aggregator answers.
func (b *brokers) fold(ctx context.Context, jobs []broker.JobView) {
	none := map[*broker.Conn]bool{}
	for i := range jobs {
		v := &jobs[i]
		c := b.at[v.Job.ID]
		if c == nil || v.State() != broker.StateOrphaned {
			continue
		}
		if _, asked := none[c]; !asked {
			none[c] = errors.Is(broker.Folding(ctx, c), broker.ErrNoAggregator)
		}
		v.Unfolded = none[c]
	}
}

// lookup finds the job whose id or name is what, or the only one whose id begins so, and the broker that has it. Where
// no run has it, the broker at the usual place may. The error is an over where it is a run that no process has any more.
func (a *app) lookup(ctx context.Context, what string) (*brokers, broker.JobView, error) {
	b, err := a.control(ctx)
	if err != nil {
		return nil, broker.JobView{}, nobodyHas(what, err)
	}
	all, err := b.jobs(ctx)
	if _, none := broker.Choose(all, what); err == nil && b.runs && errors.Is(none, broker.ErrNoJob) && listens(ctx, a.nats.usually()) {
		b.close()
		acc, _, _ := a.nats.access() // it was resolved before
		if b, err = a.reach(ctx, acc); err != nil {
			return nil, broker.JobView{}, fmt.Errorf("no run that is at work here is %q: %w", what, err)
		}
		all, err = b.jobs(ctx)
	}
	var v broker.JobView
	if err == nil {
		v, err = a.choose(all, what, b.named)
	}
	b.leave(v.Job.ID)
	return b, v, err
}

// find is lookup for whom the broker's connection is enough.
func (a *app) find(ctx context.Context, what string) (*broker.Conn, broker.JobView, error) {
	b, v, err := a.lookup(ctx, what)
	if err != nil {
		return nil, v, err
	}
	return b.conns[0], v, nil
}

// leave closes the connections to others than the broker of a job; where it has none, all.
func (b *brokers) leave(id string) {
	b.conns = slices.DeleteFunc(b.conns, func(c *broker.Conn) bool {
		other := c != b.at[id]
		if other {
			c.Close()
		}
		return other
	})
}
