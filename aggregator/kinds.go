package aggregator

import (
	"cmp"
	"slices"
	"strings"
	"unicode"

	"millrace/proto"
)

// kinds counts failures by their kind: code, HTTP status, and message, but for what differs between two lines with the
// same mistake. Counts can be taken back.
type kinds struct {
	of       map[errorKind]*proto.ErrorCount // a kind stays once it is there, so that a failure is taken back where it was added
	messages map[errorKind]int               // of a code and status: kinds with a message of their own
}

type errorKind struct {
	code   string
	status int64
	alike  string // see there
	rest   bool   // all messages beyond maxMessages, or all kinds beyond maxKinds
}

// Bounds of what is told apart: kinds of errors, or models; messages of one code and status; bytes of a message. The
// kinds and models beyond are counted under otherKind.
const (
	maxKinds    = 1000
	maxMessages = 10
	maxAlike    = 300
	otherKind   = "other"
)

// add takes a failure in with sign 1 and takes it back with sign -1.
func (k *kinds) add(r *proto.Result, sign int64) {
	if k.of == nil {
		k.of, k.messages = map[errorKind]*proto.ErrorCount{}, map[errorKind]int{}
	}
	key := k.key(r)
	e := k.of[key]
	if e == nil {
		e = &proto.ErrorCount{Code: key.code, Status: key.status, Mixed: key.rest}
		k.of[key] = e
		if key.alike != "" {
			k.messages[errorKind{code: key.code, status: key.status}]++
		}
	}
	if e.Count == 0 {
		e.CustomID, e.Line, e.Message = r.CustomID, r.Line, r.Message
	}
	e.Count += sign
}

// key is the kind that r is counted under.
func (k *kinds) key(r *proto.Result) errorKind {
	key := errorKind{code: r.Code, status: r.Status}
	if proto.EndedWithJob(r.Code) {
		return key
	}
	all := key
	key.alike = alike(r.Message)
	if k.of[key] == nil && k.messages[all] >= maxMessages {
		key.alike, key.rest = "", true
	}
	if k.of[key] == nil && len(k.of) >= maxKinds {
		return errorKind{code: otherKind, rest: true}
	}
	return key
}

// list returns what is counted, the most frequent first.
func (k *kinds) list() []proto.ErrorCount {
	var out []proto.ErrorCount
	for _, e := range k.of {
		if e.Count > 0 {
			out = append(out, *e)
		}
	}
	slices.SortFunc(out, func(a, b proto.ErrorCount) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Code, b.Code), cmp.Compare(a.Status, b.Status), cmp.Compare(a.Message, b.Message))
	})
	return out
}

// alike removes from a message what differs between two lines with the same mistake: words with a digit, as numbers and
// the ids of requests are, and what vLLM repeats of the line ('input': …, to the end of that row). Quoted text stays: it
// names the field that is wrong.
func alike(message string) string {
	var b strings.Builder
	for row := range strings.Lines(message) {
		row, _, _ = strings.Cut(row, "'input': ")
		for row != "" && b.Len() < maxAlike {
			n := strings.IndexFunc(row, func(c rune) bool { return !inWord(c) })
			if n < 0 {
				n = len(row)
			}
			word := row[:n]
			if strings.ContainsAny(word, "0123456789") {
				word = "#"
			}
			b.WriteString(word)
			row = row[n:]
			n = strings.IndexFunc(row, inWord)
			if n < 0 {
				n = len(row)
			}
			b.WriteString(row[:n])
			row = row[n:]
		}
	}
	return proto.Truncate(strings.ReplaceAll(b.String(), "#.#", "#"), maxAlike)
}

func inWord(c rune) bool { return c == '-' || c == '_' || unicode.IsLetter(c) || unicode.IsDigit(c) }
