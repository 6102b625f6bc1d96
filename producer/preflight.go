package producer

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"

	"millrace/broker"
	"millrace/proto"
)

// resultBytes is what the result of a line is expected to take: a chat answer of a few hundred tokens.
const resultBytes = 2048

// need is what one folder will have to hold.
type need struct {
	dir, flag, what string
	bytes           int64
}

// Preflight compares what a job will write with the free space of the disks it goes to. Folders go by the flag that
// chooses them: "--data" holds the queue, results on their way and the aggregator's spool, all others hold output.
// Folders on one disk are added up. It is an estimate: how long answers are, nobody knows.
func Preflight(job *proto.Job, folders map[string]string) error {
	type disk struct {
		free, sum  int64
		parts      []string
		dir, flags string
	}
	var disks []*disk
	ids := map[uint64]*disk{}
	for _, n := range needs(job, folders) {
		v := ids[device(n.dir)]
		if v == nil {
			free, err := broker.FreeBytes(n.dir)
			if err != nil {
				return err
			}
			v = &disk{free: free, dir: n.dir}
			ids[device(n.dir)] = v
			disks = append(disks, v)
		}
		v.sum += n.bytes
		v.parts = append(v.parts, n.what+" "+broker.Size(n.bytes))
		if !strings.Contains(v.flags, n.flag) {
			v.flags = strings.TrimPrefix(v.flags+" or "+n.flag, " or ")
		}
	}
	for _, v := range disks {
		if v.sum > v.free {
			return fmt.Errorf("the job needs about %s on the disk of %s (%s), %s are free; make room or choose another %s",
				broker.Size(v.sum), v.dir, strings.Join(v.parts, ", "), broker.Size(v.free), v.flags)
		}
	}
	return nil
}

func needs(job *proto.Job, folders map[string]string) []need {
	lines := max(job.Lines, 1)
	queue := min(job.Bytes, job.Bytes/lines*defaultWindow) * 5 / 4
	results := lines * resultBytes
	var all []need
	for _, flag := range slices.Sorted(maps.Keys(folders)) {
		if flag != "--data" {
			all = append(all, need{folders[flag], flag, "output", results})
			continue
		}
		all = append(all, need{folders[flag], flag, "queue", queue},
			need{folders[flag], flag, "results on their way", results / 10}, // dropped behind the aggregator's checkpoint
			need{folders[flag], flag, "results", results})
	}
	return all
}

// device tells disks apart; folders that are not there yet are on the disk of the one they will be made in.
func device(dir string) uint64 {
	for {
		var st syscall.Stat_t
		if syscall.Stat(dir, &st) == nil {
			return uint64(st.Dev) // its type depends on the system
		}
		up := strings.TrimRight(dir, "/")
		if i := strings.LastIndexByte(up, '/'); i > 0 {
			dir = up[:i]
		} else {
			return 0
		}
	}
}
