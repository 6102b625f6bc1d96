package producer

import (
	"bufio"
	"cmp"
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// entry is what the sorter sorts: by group, key and index.
type entry struct {
	key   uint64
	index uint32
	group uint32
}

const entryBytes = 16

func (e entry) compare(o entry) int {
	return cmp.Or(cmp.Compare(e.group, o.group), cmp.Compare(e.key, o.key), cmp.Compare(e.index, o.index))
}

// sorter sorts any number of entries in bounded memory: up to limit of them in memory, more in sorted runs on disk
// that are merged. Its temporary file has no name, so that nothing is left of it when the process dies.
type sorter struct {
	dir   string
	limit int
	buf   []entry
	file  *os.File
	ends  []int64 // where the runs end in the file
}

// sortLimit is how many entries are sorted in memory: 16 MiB of them.
const sortLimit = 1 << 20

func (s *sorter) add(e entry) error {
	s.buf = append(s.buf, e)
	if len(s.buf) < s.limit {
		return nil
	}
	return s.spill()
}

func (s *sorter) spill() (err error) {
	if s.file == nil {
		if s.file, err = nameless(s.dir, "sort"); err != nil {
			return err
		}
	}
	slices.SortFunc(s.buf, entry.compare)
	w := bufio.NewWriterSize(s.file, 1<<16)
	var b [entryBytes]byte
	for _, e := range s.buf {
		binary.LittleEndian.PutUint64(b[0:], e.key)
		binary.LittleEndian.PutUint32(b[8:], e.index)
		binary.LittleEndian.PutUint32(b[12:], e.group)
		_, _ = w.Write(b[:]) // the error sticks until Flush
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("write sort run: %w", err)
	}
	s.ends = append(s.ends, s.end()+int64(len(s.buf))*entryBytes)
	s.buf = s.buf[:0]
	return nil
}

func (s *sorter) end() int64 {
	if len(s.ends) == 0 {
		return 0
	}
	return s.ends[len(s.ends)-1]
}

// each calls yield for every entry in order, and ends the sorter: it holds nothing afterwards.
func (s *sorter) each(yield func(entry) error) error {
	defer s.close()
	if s.file != nil {
		return s.merge(yield)
	}
	slices.SortFunc(s.buf, entry.compare)
	for _, e := range s.buf {
		if err := yield(e); err != nil {
			return err
		}
	}
	return nil
}

func (s *sorter) merge(yield func(entry) error) error {
	if err := s.spill(); err != nil {
		return err
	}
	s.buf = nil
	var h runs
	from := int64(0)
	for _, end := range s.ends {
		r := &sortRun{r: bufio.NewReaderSize(io.NewSectionReader(s.file, from, end-from), 1<<16)}
		from = end
		if ok, err := r.next(); err != nil {
			return err
		} else if ok {
			h = append(h, r)
		}
	}
	heap.Init(&h)
	for len(h) > 0 {
		if err := yield(h[0].at); err != nil {
			return err
		}
		ok, err := h[0].next()
		if err != nil {
			return err
		}
		if ok {
			heap.Fix(&h, 0)
		} else {
			heap.Pop(&h)
		}
	}
	return nil
}

func (s *sorter) close() {
	s.buf = nil
	if s.file != nil {
		s.file.Close() // it has no name and is only read
	}
	s.file, s.ends = nil, nil
}

// sortRun reads one sorted run.
type sortRun struct {
	r  *bufio.Reader
	at entry
}

func (r *sortRun) next() (bool, error) {
	var b [entryBytes]byte
	if _, err := io.ReadFull(r.r, b[:]); errors.Is(err, io.EOF) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("read sort run: %w", err)
	}
	r.at = entry{binary.LittleEndian.Uint64(b[0:]), binary.LittleEndian.Uint32(b[8:]), binary.LittleEndian.Uint32(b[12:])}
	return true, nil
}

// runs is a heap of runs by the entry they are at.
type runs []*sortRun

func (h runs) Len() int           { return len(h) }
func (h runs) Less(i, j int) bool { return h[i].at.compare(h[j].at) < 0 }
func (h runs) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *runs) Push(v any)        { *h = append(*h, v.(*sortRun)) }
func (h *runs) Pop() any {
	old := *h
	v := old[len(old)-1]
	*h = old[:len(old)-1]
	return v
}

// nameless makes a temporary file that goes away with the process, however it ends.
func nameless(dir, what string) (*os.File, error) {
	f, err := os.CreateTemp(dir, what+"-*.tmp")
	if err != nil {
		return nil, fmt.Errorf("make temporary file: %w; choose another --data", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("hide temporary file: %w", err)
	}
	return f, nil
}
