package worker

import (
	"bytes"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"millrace/proto"
)

// limit decides how many requests the engine may have at once: as many as its KV cache holds to the end of their
// outputs.
//
//	need  = running mean over finished lines of (prompt - cached + completion tokens)
//	limit = KV tokens / need, from 8 to 256 (1,024 on a large card), times what back-pressure leaves of it
//
// Before the first line has finished, need is guessed from the bodies; before the first body, it is the context of
// the model. An engine that tells no capacity gets 64. All methods may be called from any goroutine.
type limit struct {
	fixed int // by the user; 0: find out

	mu      sync.Mutex
	kv      int64
	maxLen  int64
	need    float64 // tokens, running mean over finished lines
	done    int     // lines in need, up to needLines
	guess   float64 // tokens, mean over bodies
	guesses int
	base    int     // before back-pressure
	share   float64 // of base that back-pressure leaves
	changed time.Time
	busy    int // answers that said "too much", since counted
	served  int // lines that were answered well, since counted
	counted time.Time
	flooded bool // the second before, more answers said "too much" than were good
}

const (
	blindLimit  = 64      // of an engine without metrics
	minLimit    = 8       // of any engine, but for back-pressure
	smallSeqs   = 256     // vLLM's max_num_seqs on most cards
	largeSeqs   = 1024    // the same from 70 GiB on
	largeKV     = 250_000 // tokens of KV cache that only a large card has
	needLines   = 256     // lines that the running mean remembers
	guessBodies = 64      // bodies that are looked into before a line has finished
	noMaxTokens = 512     // output tokens expected of a body that sets no limit
)

func newLimit(fixed int) *limit { return &limit{fixed: fixed, base: max(fixed, 1), share: 1} }

// get returns the limit, at least 1.
func (l *limit) get() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return max(1, int(float64(l.base)*l.share))
}

// observe takes what a probe found. It is called every few seconds and moves the limit.
func (l *limit) observe(st Status, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kv, l.maxLen = st.Gauges.KVTokens, st.MaxLen
	l.move(l.target(), l.done > 0)
	if l.share < 1 && now.Sub(l.changed) >= 5*time.Second {
		l.share, l.changed = min(1, l.share*1.25), now
	}
}

// target is where base should be.
func (l *limit) target() int {
	if l.fixed > 0 {
		return l.fixed
	}
	if l.kv <= 0 {
		return blindLimit
	}
	seqs := smallSeqs
	if l.kv >= largeKV {
		seqs = largeSeqs
	}
	return min(max(int(float64(l.kv)/l.tokens()), minLimit), seqs)
}

// tokens is how many tokens a line holds at its end, as far as is known.
func (l *limit) tokens() float64 {
	switch {
	case l.done > 0:
		return max(l.need, 1)
	case l.guesses > 0:
		return max(l.guess, 1)
	case l.maxLen > 0:
		return float64(l.maxLen)
	}
	return 4096
}

// move brings base to target, slowly: by at most a quarter at once.
func (l *limit) move(target int, slowly bool) {
	if slowly {
		target = min(max(target, l.base*3/4), l.base+max(1, l.base/4))
	}
	l.base = target
}

// finished takes what a line held. Lines whose engine counts nothing do not tell.
func (l *limit) finished(u proto.Usage) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.served++
	if !u.Counted {
		return
	}
	l.done = min(l.done+1, needLines)
	l.need += (float64(u.Prompt-u.Cached+u.Completion) - l.need) / float64(l.done)
}

// expects looks into a body as long as no line has finished. It says whether the limit may have moved.
func (l *limit) expects(body []byte) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fixed > 0 || l.done > 0 || l.guesses >= guessBodies {
		return false
	}
	tokens := float64(len(body)/4 + maxTokens(body))
	if l.maxLen > 0 {
		tokens = min(tokens, float64(l.maxLen))
	}
	l.guesses++
	l.guess += (tokens - l.guess) / float64(l.guesses)
	if l.kv > 0 {
		l.move(l.target(), false)
	}
	return true
}

// refused is called for each answer that says "too much". At most once a second it takes a third away; more than half
// only while more answers say so than are good: an engine that has too much refuses whatever comes next, at once, while one
// that refuses now and then does so whatever the limit is.
func (l *limit) refused(now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if since := now.Sub(l.counted); since >= time.Second {
		l.flooded = l.busy > l.served && since < 5*time.Second
		l.busy, l.served, l.counted = 0, 0, now
	}
	l.busy++
	if now.Sub(l.changed) < time.Second {
		return
	}
	l.changed = now
	least := 0.5
	if l.flooded {
		least = 1 / float64(max(l.base, 1))
	}
	l.share = min(l.share, max(l.share*2/3, least))
}

// maxTokens finds how long an answer a body asks for, over all its choices.
func maxTokens(body []byte) int {
	d := jsontext.NewDecoder(bytes.NewBuffer(body), lenient) // in place, see readReply
	if t, err := d.ReadToken(); err != nil || t.Kind() != '{' {
		return noMaxTokens
	}
	tokens, n := noMaxTokens, 1
	for d.PeekKind() == '"' {
		name, err := d.ReadToken()
		if err != nil {
			break
		}
		to := &n
		switch name.String() {
		case "max_tokens", "max_completion_tokens", "max_output_tokens":
			to = &tokens
		case "n":
		default:
			to = nil
		}
		v, err := d.ReadValue()
		if err != nil {
			break
		}
		if i, err := strconv.Atoi(string(v)); err == nil && to != nil && i > 0 {
			*to = min(i, 1<<20)
		}
	}
	return tokens * min(n, 128)
}
