package vllm

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"

	"github.com/go-json-experiment/json"
)

// record says on disk which processes are ours, so that those of a millrace that was killed are found at the next start.
type record struct {
	name string

	Host    string         `json:"host"` // names the machine, its boot and the scope of process ids
	Group   int            `json:"group"`
	Members map[int]string `json:"members"` // process ids, and when each began
}

const recordName = "engine.json"

// see writes down who is of the server now, where that has changed. The group must be ours.
func (r *record) see() {
	all, err := processes()
	if err != nil {
		return // an orphan would not be found; nothing else depends on it
	}
	now := map[int]string{}
	for _, p := range family(all, r.Group, true, r.Members) { // who left the group is not found by its parent when that has gone
		now[p.id] = p.start
	}
	if maps.Equal(now, r.Members) {
		return
	}
	r.Members = now
	b, err := json.Marshal(r)
	if err != nil {
		return
	}
	if os.WriteFile(r.name+".part", b, 0o600) == nil {
		_ = os.Rename(r.name+".part", r.name) // see above
	}
}

func (r *record) remove() { _ = os.Remove(r.name) } // one that stays names processes that are gone

// EndOrphan ends what a dead millrace has left of the server whose folder this was: the caller has it alone. Host is that
// of this process. It says how many processes it ended.
//
// A process is ours when one of that id, which began at that time, was. Where one of them is still in the group that the
// server had, the group is the same one, since a number is not given away while it is in use; so all of it is ours.
func EndOrphan(dir, host string) (n int, err error) {
	name := filepath.Join(dir, recordName)
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read record of an engine: %w", err)
	}
	var r record
	defer func() {
		if err == nil { // what does not go is tried again
			_ = os.Remove(name)
		}
	}()
	if json.Unmarshal(b, &r) != nil || r.Host == "" || r.Host != host || r.Group <= 1 {
		return 0, nil // of another boot, or nobody can tell
	}
	all, err := processes()
	if err != nil {
		return 0, err
	}
	n = len(family(all, r.Group, false, r.Members))
	if left := endGroup(r.Group, false, r.Members); len(left) > 0 {
		return n, fmt.Errorf("end an engine that a killed millrace left: processes %v do not go; see why (ps -o pid,stat,user,wchan)", left)
	}
	return n, nil
}
