package producer

import "fmt"

// duplicates finds the lines whose custom_id is on an earlier line. Only lines whose ids have the same hash are read
// again and compared.
func (s *scan) duplicates() error {
	var same []uint32 // lines whose ids have the hash key, in order
	var key uint64
	err := s.dups.each(func(e entry) error {
		if len(same) > 0 && e.key != key {
			if err := s.compare(same); err != nil {
				return err
			}
			same = same[:0]
		}
		key = e.key
		same = append(same, e.index)
		return nil
	})
	if err != nil {
		return err
	}
	return s.compare(same)
}

// compare reads the ids of lines that look the same.
func (s *scan) compare(lines []uint32) error {
	if len(lines) < 2 {
		return nil
	}
	first := map[string]uint32{} // one entry, but for two ids with one hash
	var w scratch
	for _, i := range lines {
		r, err := s.d.table.get(int64(i))
		if err != nil {
			return err
		}
		text, err := s.d.text(r, &w)
		if err != nil {
			return err
		}
		_, id, _ := s.d.rules.parse(text)
		before, ok := first[id]
		if !ok {
			first[id] = i
			continue
		}
		if err := s.twin(i, before, r, id); err != nil {
			return err
		}
	}
	return nil
}

// twin marks a line as the duplicate of one before it.
func (s *scan) twin(i, before uint32, r record, id string) error {
	b, err := s.d.table.get(int64(before))
	if err != nil {
		return err
	}
	if r.flags&flagInvalid == 0 { // else it is listed already
		s.twice.set(int64(i), s.d.Lines)
		s.problems.add(LineProblem{Line: r.line, Message: duplicateOf(id, b.line)})
	}
	r.flags |= flagInvalid | flagDuplicate
	r.ref = before
	return s.d.table.set(int64(i), r)
}

func duplicateOf(id string, line int64) string {
	return fmt.Sprintf("custom_id %q is on line %d already", id, line)
}
