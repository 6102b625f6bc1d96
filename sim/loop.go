package sim

import (
	"container/heap"
	"time"
)

// Loop is a client of a Virtual engine: it keeps a number of requests in flight until all have ended.
type Loop struct {
	Requests []Request // their IDs are set to their places
	InFlight func() int
	// Burst, where it is not nil, is how many have to have ended before others are sent, as long as there are so many.
	Burst func() int
	// Turn is from the end of a request to the arrival of the one that takes its place. The frontend takes requests one
	// after another, Spacing apart.
	Turn, Spacing time.Duration

	// All three may be nil. Look is called after a step, and again after as long as it says.
	Sent  func(r *Request)
	Ended func(r *Request, took time.Duration)
	Look  func(inFlight int) time.Duration
}

// Figures are what came of a Loop.
type Figures struct {
	Rate        float64 // output tokens a second
	Running     float64 // requests, mean over time
	MostRunning int
	Preemptions int64
}

// Run sends the requests to v and returns when all have ended.
func (l *Loop) Run(v *Virtual) Figures {
	var (
		way    arrivals
		out    Figures
		area   float64
		sent   = make([]time.Duration, 0, len(l.Requests))
		free   time.Duration // of the frontend
		look   time.Duration
		inside int
	)
	fill := func() {
		if l.Burst != nil && l.InFlight()-inside < min(l.Burst(), len(l.Requests)-len(sent)) {
			return
		}
		for len(sent) < len(l.Requests) && inside < l.InFlight() {
			r := &l.Requests[len(sent)]
			r.ID = len(sent)
			if l.Sent != nil {
				l.Sent(r)
			}
			free = max(free+l.Spacing, v.Now()+l.Turn)
			heap.Push(&way, arrival{free, r})
			sent = append(sent, v.Now())
			inside++
		}
	}
	fill()
	for done := 0; done < len(l.Requests); {
		for len(way) > 0 && way[0].at <= v.Now() {
			v.Submit(*heap.Pop(&way).(arrival).req)
		}
		before := v.Now()
		ended, ok := v.Step()
		if !ok {
			v.Wait(way[0].at)
			continue
		}
		load := v.Load()
		area += float64(load.Running) * (v.Now() - before).Seconds()
		out.MostRunning = max(out.MostRunning, load.Running)
		done += len(ended)
		inside -= len(ended)
		for _, id := range ended {
			if l.Ended != nil {
				l.Ended(&l.Requests[id], v.Now()-sent[id])
			}
		}
		if l.Look != nil && v.Now() >= look {
			look = v.Now() + l.Look(inside)
		}
		fill()
	}
	load, wall := v.Load(), v.Now().Seconds()
	out.Rate, out.Running, out.Preemptions = float64(load.Generated)/wall, area/wall, load.Preemptions
	return out
}

// arrival is a request on its way to the engine.
type arrival struct {
	at  time.Duration
	req *Request
}

type arrivals []arrival

func (a arrivals) Len() int           { return len(a) }
func (a arrivals) Less(i, j int) bool { return a[i].at < a[j].at }
func (a arrivals) Swap(i, j int)      { a[i], a[j] = a[j], a[i] }
func (a *arrivals) Push(x any)        { *a = append(*a, x.(arrival)) }
func (a *arrivals) Pop() any {
	old := *a
	x := old[len(old)-1]
	*a = old[:len(old)-1]
	return x
}
