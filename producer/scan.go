package producer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"

	"github.com/cespare/xxhash/v2"
)

// maxModels is how many models the lines of a job may name: each has a stream of its own at the broker.
const maxModels = 1000

// parsers is how many goroutines parse lines while one reads and hashes, and one keeps order.
const parsers = 2

// parsed is what a parser found in a line.
type parsed struct {
	hash   uint64 // of the text
	id     string // custom_id, where it can be used
	prefix uint64
	model  string
	wrong  string // what is wrong with the line; empty: it is valid
	alien  bool   // it does not even begin as a JSON object
	object bool   // it is, or may be, a JSON object
	nul    bool   // it has a NUL byte
}

// Scan reads the input once: it validates every line, finds those with the same custom_id, and notes where each lies
// and in which order they are enqueued. Where lines are invalid its error is an *InvalidInput, unless they are to be
// skipped. It calls progress, where not nil, with what it has read so far, from one goroutine.
//
// Memory is bounded: below 150 MB whatever the length of the input. Disk: 36 bytes a line, and the plain text of an
// input that cannot be read twice (compressed, or not a regular file).
func Scan(ctx context.Context, in Input, progress func(bytes, lines int64)) (*Dataset, error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(in.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make folder: %w; choose another --data", err)
	}
	src, err := in.open(ctx)
	if err != nil {
		return nil, err
	}
	s, err := newScan(in, src)
	if err == nil {
		s.progress = progress
		err = s.run(ctx)
	}
	if err != nil {
		if s != nil {
			s.d.drop()
		}
		src.drop()
		return nil, err
	}
	return s.d, nil
}

// scan is one pass over an input.
type scan struct {
	d        *Dataset
	split    splitter
	dups     sorter
	order    sorter
	models   map[string]uint32
	names    []string
	problems problems
	aliens   aliens
	twice    bitset // otherwise valid lines whose custom_id is on an earlier line
	progress func(bytes, lines int64)
}

func newScan(in Input, src *source) (*scan, error) {
	s := &scan{
		d:     &Dataset{in: in, rules: in.rules(), src: src},
		split: splitter{src: io.NewSectionReader(src.file, 0, math.MaxInt64), sum: sha256.New(), most: int(in.MaxPayload), limit: in.Limit},
		dups:  sorter{dir: in.Dir, limit: sortLimit}, order: sorter{dir: in.Dir, limit: sortLimit},
		models: map[string]uint32{},
	}
	var err error
	if s.d.table, err = newTable(in.Dir); err != nil {
		return s, err
	}
	s.d.order, err = newOrder(in.Dir)
	return s, err
}

func (s *scan) run(ctx context.Context) error {
	defer s.dups.close()
	defer s.order.close()
	if !s.d.in.SkipInvalid {
		if err := s.document(); err != nil {
			return err
		}
	}
	if err := s.lines(ctx); err != nil {
		return err
	}
	if err := s.d.table.flush(); err != nil {
		return err
	}
	if s.d.Lines == 0 {
		return fmt.Errorf("%s: %w", s.d.src.name, ErrEmpty)
	}
	if s.aliens.nul > 0 && s.foreign() { // a short one, and binary
		return s.notJSONL()
	}
	if err := s.duplicates(); err != nil {
		return err
	}
	s.problems.cut()
	if s.problems.total > 0 && !s.d.in.SkipInvalid {
		return &InvalidInput{Errors: s.problems.list, Total: s.problems.total, Lines: s.d.Lines}
	}
	if err := s.sort(); err != nil {
		return err
	}
	s.d.Problems, s.d.Invalid = s.problems.list, s.problems.total
	s.d.SHA256, s.d.Bytes = hex.EncodeToString(s.split.sum.Sum(nil)), s.split.at
	return s.d.src.keep(s.d.SHA256)
}

// lines reads, parses and notes all lines. Blocks go round: free → read → parsed → noted, in order → free.
func (s *scan) lines(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	const blocks = parsers + 3
	free, parse, inOrder := make(chan *block, blocks), make(chan *block, blocks), make(chan *block, blocks)
	for range blocks {
		free <- &block{done: make(chan struct{}, 1)}
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		defer close(parse)
		defer close(inOrder)
		if err := s.read(ctx, free, parse, inOrder); err != nil {
			cancel(err)
		}
	})
	for range parsers {
		wg.Go(func() {
			for b := range parse {
				s.parse(b)
				b.done <- struct{}{}
			}
		})
	}
	for b := range inOrder {
		<-b.done
		if ctx.Err() != nil {
			continue // free takes no more blocks than there are; the reader ends by ctx
		}
		if err := s.note(b); err != nil {
			cancel(err)
			continue
		}
		if cap(b.data) > 2*blockBytes { // do not keep the room that one long line took
			b.data = nil
		}
		free <- b
	}
	return context.Cause(ctx)
}

func (s *scan) read(ctx context.Context, free <-chan *block, to ...chan<- *block) error {
	for {
		var b *block
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case b = <-free:
		}
		err := s.split.next(b)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, c := range to {
			c <- b // has room for all blocks
		}
	}
}

func (s *scan) parse(b *block) {
	b.parsed = b.parsed[:0]
	for _, sp := range b.spans {
		if sp.to == 0 {
			wrong := s.d.rules.tooLong(sp.size + s.d.rules.reserve)
			b.parsed = append(b.parsed, parsed{hash: sp.hash, wrong: wrong, object: true})
			continue
		}
		text := b.data[sp.from:sp.to]
		l, id, wrong := s.d.rules.parse(text)
		p := parsed{hash: xxhash.Sum64(text), id: id, prefix: l.PrefixKey, model: s.d.rules.model(&l), wrong: wrong, object: true}
		if wrong != "" {
			p.nul = bytes.IndexByte(text, 0) >= 0
			text = bytes.TrimLeft(text, " \t\r\ufeff")
			p.alien = !bytes.HasPrefix(text, []byte("{"))
			p.object = !p.alien && json.Valid(text)
		}
		b.parsed = append(b.parsed, p)
	}
}

// foreign says whether what was read so far is no JSONL at all, unless its lines are to end as error lines even so.
func (s *scan) foreign() bool { return !s.d.in.SkipInvalid && s.aliens.all(s.d.Lines) }

func (s *scan) notJSONL() error {
	what := ""
	if s.aliens.nul > 0 {
		what = ", and there are NUL bytes: it is binary, or no UTF-8"
	}
	return badFile("%s is not JSONL: none of its first %s lines is a JSON object%s; give a file with one JSON object a line",
		s.d.src.name, commas(s.d.Lines), what)
}

// note writes down the lines of a block.
func (s *scan) note(b *block) error {
	for i, sp := range b.spans {
		if err := s.noteLine(sp, &b.parsed[i]); err != nil {
			return err
		}
		if s.aliens.add(&b.parsed[i]); s.d.Lines == aliensFrom && s.foreign() {
			return s.notJSONL()
		}
	}
	if s.progress != nil {
		s.progress(b.bytes, s.d.Lines)
	}
	return nil
}

func (s *scan) noteLine(sp span, p *parsed) error {
	if s.d.Lines == math.MaxUint32 {
		return fmt.Errorf("input has more than %s lines; split it", commas(math.MaxUint32))
	}
	index := uint32(s.d.Lines)
	s.d.Lines++
	r := record{offset: sp.offset, hash: p.hash, line: sp.line, length: uint32(min(sp.size, math.MaxUint32))}
	if sp.to == 0 {
		r.flags |= flagLong
	}
	if p.wrong == "" {
		r.ref, p.wrong = s.model(p.model)
	}
	e := entry{group: r.ref, key: p.prefix, index: index}
	if s.d.in.InputOrder {
		e.key = 0
	}
	if p.wrong != "" {
		r.flags |= flagInvalid
		e = entry{group: math.MaxUint32, index: index}
		s.problems.add(LineProblem{sp.line, p.id, p.wrong})
	}
	if err := s.d.table.add(r); err != nil {
		return err
	}
	if p.id != "" {
		if err := s.dups.add(entry{key: xxhash.Sum64String(p.id), index: index}); err != nil {
			return err
		}
	}
	return s.order.add(e)
}

// model returns the number of a model, or what is wrong with naming it.
func (s *scan) model(name string) (uint32, string) {
	n, ok := s.models[name]
	if ok {
		return n, ""
	}
	if len(s.names) == maxModels {
		return 0, fmt.Sprintf("names the model %q, one more than the %s that a job may have", name, commas(maxModels))
	}
	n = uint32(len(s.names))
	s.models[name] = n
	s.names = append(s.names, name)
	return n, ""
}

// sort writes the order of the lines. Duplicates were sorted in before they were known as such; they move to the end.
func (s *scan) sort() error {
	o := s.d.order
	err := s.order.each(func(e entry) error {
		switch {
		case s.twice.has(int64(e.index)):
			return nil
		case e.group == math.MaxUint32:
			return o.add("", e.index)
		}
		return o.add(s.names[e.group], e.index)
	})
	if err != nil {
		return err
	}
	for i := range s.twice.all {
		if err := o.add("", uint32(i)); err != nil {
			return err
		}
	}
	return o.flush()
}
