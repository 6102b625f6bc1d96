package sim

// blockPool is the KV cache: blocks of 16 tokens, handed out from a free list
// that is at the same time the least-recently-used order of the prefix cache.
// A free block keeps its content, and can be found by its hash, until it is
// handed out again. Owned by the scheduler; not safe for concurrent use.
type blockPool struct {
	caching bool
	refs    []int32  // users of a block; 0 = free
	hashes  []uint64 // hash of prefix and content, 0 = not to be found
	cached  map[uint64]int32
	// The free list: doubly linked over the blocks, with sentinel len(refs).
	next, prev []int32
	free       int
}

func newBlockPool(blocks int, caching bool) *blockPool {
	p := &blockPool{
		caching: caching,
		refs:    make([]int32, blocks),
		hashes:  make([]uint64, blocks),
		cached:  make(map[uint64]int32),
		next:    make([]int32, blocks+1),
		prev:    make([]int32, blocks+1),
		free:    blocks,
	}
	for i := range p.next {
		p.next[i] = int32((i + 1) % len(p.next))
		p.prev[i] = int32((i + blocks) % len(p.next))
	}
	return p
}

func (p *blockPool) used() int { return len(p.refs) - p.free }

// take hands out the block that was free for longest and forgets what it held.
// The caller has seen that one is free.
func (p *blockPool) take() int32 {
	b := p.next[len(p.refs)]
	p.unlink(b)
	if h := p.hashes[b]; h != 0 {
		delete(p.cached, h)
		p.hashes[b] = 0
	}
	p.refs[b] = 1
	return b
}

// hold adds a user to a block that lookup found.
func (p *blockPool) hold(b int32) {
	if p.refs[b] == 0 {
		p.unlink(b)
	}
	p.refs[b]++
}

// release takes a user away; a block without users goes to the end of the free list.
func (p *blockPool) release(b int32) {
	if p.refs[b]--; p.refs[b] > 0 {
		return
	}
	end := int32(len(p.refs))
	last := p.prev[end]
	p.next[last], p.prev[b] = b, last
	p.next[b], p.prev[end] = end, b
	p.free++
}

func (p *blockPool) unlink(b int32) {
	p.next[p.prev[b]], p.prev[p.next[b]] = p.next[b], p.prev[b]
	p.free--
}

// publish makes a full block findable. Of two blocks with one content the first stays.
func (p *blockPool) publish(b int32, hash uint64) {
	if !p.caching || p.hashes[b] != 0 {
		return
	}
	if _, there := p.cached[hash]; there {
		return
	}
	p.cached[hash], p.hashes[b] = b, hash
}

func (p *blockPool) lookup(hash uint64) (int32, bool) {
	b, ok := p.cached[hash]
	return b, ok
}
