package aggregator

import "slices"

// load is an amount of work.
type load struct {
	busy       float64 // request-µs: requests in flight, times how long
	requests   float64
	prompt     float64 // tokens
	completion float64
}

func (l *load) add(o load, share float64) {
	l.busy += o.busy * share
	l.requests += o.requests * share
	l.prompt += o.prompt * share
	l.completion += o.completion * share
}

// timeline adds up work over time, in µs of one clock. The work of a request is spread evenly over the time it took:
// its tokens, and itself as one request. Buckets double in width when there would be more than maxBuckets.
type timeline struct {
	width   int64 // µs of a bucket
	lo      int64 // buckets[0] begins at lo × width
	buckets []load
	// change is, for each bucket, by how much the work per µs differs from the one before, as far as work is meant
	// that fills whole buckets. It has one element more than buckets.
	change     []load
	begin, end int64 // of the first and last work, exactly
}

const (
	firstWidth = 1000
	maxBuckets = 2048
	farPast    = -1 << 52 // times beyond these are cut; they are nonsense of a worker
	farFuture  = 1 << 52
)

// spread adds work that went on evenly from at for d µs.
func (t *timeline) spread(at, d int64, work load) {
	at = min(max(at, farPast), farFuture)
	d = min(max(d, 1), farFuture)
	if t.width == 0 {
		t.width, t.begin, t.end = firstWidth, at, at+d
	}
	t.begin, t.end = min(t.begin, at), max(t.end, at+d)
	t.cover(at, at+d-1)
	first, last := t.index(at), t.index(at+d-1)
	if first == last {
		t.buckets[first].add(work, 1)
		return
	}
	perUS := 1 / float64(d)
	t.buckets[first].add(work, float64(t.start(first+1)-at)*perUS)
	t.buckets[last].add(work, float64(at+d-t.start(last))*perUS)
	if last > first+1 {
		t.change[first+1].add(work, perUS)
		t.change[last].add(work, -perUS)
	}
}

// index is the bucket of the time at; it may not be there.
func (t *timeline) index(at int64) int { return int(floorDiv(at, t.width) - t.lo) }

// start is where a bucket begins.
func (t *timeline) start(i int) int64 { return (t.lo + int64(i)) * t.width }

// cover makes sure that there are buckets for first and last.
func (t *timeline) cover(first, last int64) {
	for {
		lo, hi := floorDiv(first, t.width), floorDiv(last, t.width)
		if n := int64(len(t.buckets)); n > 0 {
			lo, hi = min(lo, t.lo), max(hi, t.lo+n-1)
		}
		if hi-lo < maxBuckets {
			t.grow(lo, int(hi-lo+1))
			return
		}
		t.double()
	}
}

func (t *timeline) grow(lo int64, n int) {
	if len(t.buckets) == 0 {
		t.lo, t.change = lo, make([]load, 1)
	}
	if before := int(t.lo - lo); before > 0 {
		t.buckets = slices.Insert(t.buckets, 0, make([]load, before)...)
		t.change = slices.Insert(t.change, 0, make([]load, before)...)
		t.lo = lo
	}
	if after := n - len(t.buckets); after > 0 {
		t.buckets = append(t.buckets, make([]load, after)...)
		t.change = append(t.change, make([]load, after)...)
	}
}

// settle moves what change says into the buckets.
func (t *timeline) settle() {
	var now load
	for i := range t.buckets {
		now.add(t.change[i], 1)
		t.buckets[i].add(now, float64(t.width))
		t.change[i] = load{}
	}
	if len(t.change) > 0 {
		t.change[len(t.buckets)] = load{}
	}
}

func (t *timeline) double() {
	t.settle()
	lo := floorDiv(t.lo, 2)
	var half []load
	for i, b := range t.buckets {
		k := int(floorDiv(t.lo+int64(i), 2) - lo)
		if k == len(half) {
			half = append(half, load{})
		}
		half[k].add(b, 1)
	}
	t.width, t.lo, t.buckets, t.change = t.width*2, lo, half, make([]load, len(half)+1)
}

// merge adds another timeline, whose times are at(time) on our clock. What it holds of a bucket is spread evenly.
func (t *timeline) merge(o *timeline, at func(int64) int64) {
	o.settle()
	for i, b := range o.buckets {
		if o.idle(b) {
			continue
		}
		from, to := at(max(o.start(i), o.begin)), at(min(o.start(i+1), o.end))
		t.spread(from, to-from, b)
	}
}

// idle says that nothing was in flight in a bucket, but for what rounding left there.
func (t *timeline) idle(b load) bool { return b.busy < 1e-9*float64(t.width) }

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}

// window is the steady part of a timeline.
type window struct {
	from, to int64 // µs
	work     load
}

// steady finds the steady window. The plateau is what is in flight at least during a quarter of the time in which
// anything is (the 75th percentile over time). The window goes from the first to the last time that 0.9 of it are in
// flight, at the width of a bucket, which is at most 1/1000 of the whole or 1 ms.
func (t *timeline) steady() (w window, plateau float64) {
	t.settle()
	var busy []float64
	for _, b := range t.buckets {
		if !t.idle(b) {
			busy = append(busy, b.busy)
		}
	}
	if len(busy) == 0 {
		return window{}, 0
	}
	slices.Sort(busy)
	level := busy[(len(busy)-1)*3/4]
	high := func(b load) bool { return b.busy >= 0.9*level }
	first := slices.IndexFunc(t.buckets, high)
	last := len(t.buckets) - 1
	for !high(t.buckets[last]) {
		last--
	}
	return t.window(first, last), level / float64(t.width)
}

// window is what buckets hold from the first to the last.
func (t *timeline) window(first, last int) (w window) {
	for _, b := range t.buckets[first : last+1] {
		w.work.add(b, 1)
	}
	w.from, w.to = max(t.start(first), t.begin), min(t.start(last+1), t.end)
	return w
}

// from is the part of a window that begins at a time or soon after it; empty if there is none.
func (t *timeline) from(w window, at int64) window {
	first, last := max(t.index(w.from), t.index(at-1)+1), t.index(w.to-1)
	if first > last {
		return window{}
	}
	return t.window(first, last)
}
