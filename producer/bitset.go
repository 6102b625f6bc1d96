package producer

import "math/bits"

// bitset is a set of lines. The zero value is empty.
type bitset []uint64

// set adds i, which is below n.
func (b *bitset) set(i, n int64) {
	if *b == nil {
		*b = make(bitset, (n+63)/64)
	}
	(*b)[i>>6] |= 1 << (i & 63)
}

// fill adds from..to-1, which are below n.
func (b *bitset) fill(from, to, n int64) {
	for ; from < to && from&63 != 0; from++ {
		b.set(from, n)
	}
	for ; to-from >= 64; from += 64 {
		b.set(from, n)
		(*b)[from>>6] = ^uint64(0)
	}
	for ; from < to; from++ {
		b.set(from, n)
	}
}

func (b bitset) has(i int64) bool { return b != nil && b[i>>6]&(1<<(i&63)) != 0 }

// all is an iterator over the set, in order.
func (b bitset) all(yield func(int64) bool) {
	for w, word := range b {
		for word != 0 {
			i := bits.TrailingZeros64(word)
			word &= word - 1
			if !yield(int64(w)<<6 + int64(i)) {
				return
			}
		}
	}
}

func (b bitset) count() (n int64) {
	for _, w := range b {
		n += int64(bits.OnesCount64(w))
	}
	return n
}
