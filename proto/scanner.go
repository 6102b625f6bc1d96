package proto

import "bytes"

// RereadLine reads a text again that ParseLine took for a line, several times as fast: it looks for what a request needs
// and believes the rest. What it returns is what ParseLine did, but for PrefixKey, which stays 0. It is false where only
// ParseLine can tell, which is rare: of escapes in names, ids and models. Of a text that is no line it says anything.
func RereadLine(b []byte) (Line, bool) {
	var l Line
	s := scanner{b: b}
	ok := s.members(func(name []byte) (ok bool) {
		switch string(name) {
		case "custom_id":
			l.CustomID, ok = s.text()
		case "url":
			l.URL, ok = s.text()
		case "body":
			ok = s.body(&l)
		default:
			ok = s.skip()
		}
		return ok
	})
	return l, ok && l.Body != nil
}

// scanner finds its way through JSON that is known to be valid. at is always a place in b, or its end.
type scanner struct {
	b  []byte
	at int
}

// peek returns the next byte behind white space; 0: there is none.
func (s *scanner) peek() byte {
	for s.at < len(s.b) {
		switch c := s.b[s.at]; c {
		case ' ', '\t', '\r', '\n':
			s.at++
		default:
			return c
		}
	}
	return 0
}

// members calls value at the value of each member of an object, and goes behind the object.
func (s *scanner) members(value func(name []byte) bool) bool {
	if s.peek() != '{' {
		return false
	}
	for {
		s.at++
		c := s.peek()
		if c == '}' { // of an empty object
			s.at++
			return true
		}
		name, plain := s.quoted()
		if !plain || s.peek() != ':' {
			return false
		}
		s.at++
		if s.peek(); !value(name) {
			return false
		}
		switch s.peek() {
		case ',':
		case '}':
			s.at++
			return true
		default:
			return false
		}
	}
}

// quoted goes behind a string and returns what is between its quotes, if it is a string without escapes.
func (s *scanner) quoted() ([]byte, bool) {
	from := s.at + 1
	if s.peekHere() != '"' || !s.skipString() {
		return nil, false
	}
	v := s.b[from : s.at-1]
	return v, bytes.IndexByte(v, '\\') < 0
}

func (s *scanner) text() (string, bool) {
	v, ok := s.quoted()
	return string(v), ok
}

func (s *scanner) peekHere() byte {
	if s.at < len(s.b) {
		return s.b[s.at]
	}
	return 0
}

// skipString goes from the quote that begins a string behind the one that ends it.
func (s *scanner) skipString() bool {
	for i := s.at + 1; ; {
		n := bytes.IndexByte(s.b[i:], '"')
		if n < 0 {
			return false
		}
		i += n
		escapes := 0
		for s.b[i-1-escapes] == '\\' { // a quote is before them
			escapes++
		}
		i++
		if escapes%2 == 0 {
			s.at = i
			return true
		}
	}
}

// skip goes behind a value.
func (s *scanner) skip() bool {
	for depth := 0; s.at < len(s.b); {
		switch s.b[s.at] {
		case '"':
			if !s.skipString() {
				return false
			}
			if depth == 0 {
				return true
			}
			continue
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 { // behind a number, true, false or null, as a comma is
				return true
			}
			if depth--; depth == 0 {
				s.at++
				return true
			}
		case ',':
			if depth == 0 {
				return true
			}
		}
		s.at++
	}
	return false
}

func (s *scanner) body(l *Line) bool {
	from := s.at
	l.modelAt, l.empty = 1, true
	ok := s.members(func(name []byte) (ok bool) {
		l.empty = false
		if string(name) != "model" {
			return s.skip()
		}
		l.modelFrom = s.at - from
		l.Model, ok = s.text()
		l.modelTo = s.at - from
		return ok
	})
	l.Body = s.b[from:s.at]
	return ok
}

// number goes behind a count of tokens. It is false for what is not one, or is written in another way.
func (s *scanner) number(n *int64) bool {
	*n = 0
	from := s.at
	for s.at < len(s.b) && s.b[s.at] >= '0' && s.b[s.at] <= '9' {
		*n = 10**n + int64(s.b[s.at]-'0')
		s.at++
	}
	digits := s.at - from
	switch s.peekHere() {
	case '.', 'e', 'E':
		return false
	}
	return digits > 0 && digits < 18
}

// quickUsage is ReadUsage for a valid body whose usage is written as engines do. It is false for any other.
func quickUsage(body []byte) (u Usage, ok bool) {
	s := scanner{b: body}
	ok = s.members(func(name []byte) bool {
		switch {
		case string(name) != "usage":
			return s.skip()
		case u.Counted: // twice
			return false
		}
		u.Counted = true
		return s.members(func(name []byte) bool {
			switch string(name) {
			case "prompt_tokens":
				return s.number(&u.Prompt)
			case "completion_tokens":
				return s.number(&u.Completion)
			case "prompt_tokens_details":
				return s.cached(&u.Cached)
			case "input_tokens", "output_tokens", "input_tokens_details":
				return false
			}
			return s.skip()
		})
	})
	return u, ok
}

func (s *scanner) cached(n *int64) bool {
	if s.peekHere() == 'n' {
		*n = 0
		return s.skip()
	}
	return s.members(func(name []byte) bool {
		if string(name) == "cached_tokens" {
			return s.number(n)
		}
		return s.skip()
	})
}
