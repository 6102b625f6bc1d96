package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// kept is what the folder of a `millrace run` that is over tells without its broker.
type kept struct {
	memo
	dir   string
	when  time.Time // its memo was written
	later string    // the fresh run for which this one, which was halted, was given up; empty: it was not
}

// kept lists the runs whose folders are here, the newest first.
func (a *app) kept() (all []kept) {
	dirs, _ := os.ReadDir(a.runDir("")) // where there is none, nothing is kept
	for _, e := range dirs {
		d := a.runDir(e.Name())
		m, err := readMemo(d)
		st, serr := os.Stat(filepath.Join(d, memoFile))
		if err != nil || serr != nil || strings.HasPrefix(e.Name(), ".") { // which is half removed
			continue
		}
		k := kept{memo: m, dir: d, when: st.ModTime()}
		if next := nextRun(m.Job); m.Halted && !m.Finished && exists(filepath.Join(a.runDir(next), memoFile)) {
			k.later = next
		}
		all = append(all, k)
	}
	slices.SortFunc(all, func(x, y kept) int { return cmp.Or(y.when.Compare(x.when), strings.Compare(x.Job, y.Job)) })
	return all
}

// nextRun is the id of the run that --again would make of the job after this one.
func nextRun(id string) string {
	if at := strings.LastIndex(id, "-r"); at > 0 {
		if n, err := strconv.ParseInt(id[at+len("-r"):], 10, 64); err == nil {
			return proto.RunID(id[:at], n+1)
		}
	}
	return proto.RunID(id, 2)
}

// verify compares the files of a finished run with its manifest, as long as they are its own.
func (k *kept) verify() ([]string, error) {
	_, err := manifestOf(k.Manifest, k.Job)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, missing(k.Job, k.Manifest)
	}
	if err != nil {
		return nil, fmt.Errorf("verify job %s: %w", k.Job, err)
	}
	_, reasons, err := aggregator.Verify(k.Manifest)
	return reasons, err
}

// manifest reads that of a finished run; nil: there is none where it was.
func (k *kept) manifest() *aggregator.Manifest {
	m, err := manifestOf(k.Manifest, k.Job)
	if err != nil || !k.Finished {
		return nil
	}
	return m
}

// state says how the run stands, and where its results are or will be.
func (k *kept) state() (state, where string) {
	m := k.manifest()
	switch {
	case k.later != "":
		return "given up", "for " + k.later
	case !k.Finished && k.Halted:
		return "halted", cmp.Or(k.Output, k.Manifest)
	case !k.Finished:
		return "interrupted", cmp.Or(k.Output, k.Manifest)
	case m == nil:
		return "finished", "gone from " + filepath.Dir(k.Manifest)
	}
	return shown(broker.StateFinished, outcome(progressOf(m))), m.Paths(k.Manifest).Output
}

// choose finds the job that is what among jobs of brokers and, unless a broker was named, the runs on this machine that are
// kept: that it is one of these is an over.
func (a *app) choose(jobs []broker.JobView, what string, named bool) (broker.JobView, error) {
	v, err := broker.Choose(jobs, what)
	if named || err == nil && (v.Job.ID == what || v.Job.Name == what) {
		return v, err
	}
	k, v, err := chooseKept(a.kept(), what, jobs...)
	if k != nil {
		err = left(k)
	}
	return v, err
}

// chooseKept finds a run as a job at a broker is found, and beside jobs that are there. Those that were given up are found
// by their whole id alone. It is nil where the job is none of runs.
func chooseKept(runs []kept, what string, jobs ...broker.JobView) (*kept, broker.JobView, error) {
	at := map[string]*kept{}
	for _, v := range jobs {
		at[v.Job.ID] = nil
	}
	for i := range runs {
		k := &runs[i]
		if _, there := at[k.Job]; !there && (k.later == "" || k.Job == what) {
			at[k.Job] = k
			jobs = append(jobs, broker.JobView{Job: proto.Job{ID: k.Job, Name: k.Name}})
		}
	}
	v, err := broker.Choose(jobs, what)
	if err != nil {
		return nil, v, err
	}
	return at[v.Job.ID], v, nil
}

// keptFor is the run that is kept here and that what means, where err is what looking for it gave: one that is over; and
// where the broker at the usual place, which nobody named, does not let us in, shut says so, and there may be one there
// that is meant as well.
func (a *app) keptFor(what string, err error) (k *kept, shut bool) {
	var gone *over
	if errors.As(err, &gone) {
		return gone.kept, false
	}
	if _, named, aerr := a.nats.access(); named || aerr != nil || !errors.Is(err, nats.ErrAuthorization) {
		return nil, false
	}
	k, _, _ = chooseKept(a.kept(), what)
	return k, k != nil
}

// keptToRead is keptFor for a command that changes nothing.
func (a *app) keptToRead(what string, err error) *kept {
	k, shut := a.keptFor(what, err)
	if shut {
		fmt.Fprintf(a.std.err, "note: this is job %s as it is kept here; the broker was not asked: %v\n", k.Job, err)
	}
	return k
}

// over is the error of a command for a run that no process has any more. It is broker.ErrUnreachable.
type over struct{ *kept }

func (k *over) Error() string {
	state, where := k.state()
	again := fmt.Sprintf("millrace run %s …, with results in %s; millrace rm --force %s forgets it", k.Input, where, k.Job)
	switch {
	case k.later != "":
		return fmt.Sprintf("job %s was given up for a fresh run of all its lines, %s; millrace results %s prints what there is of it; millrace rm --force %s forgets it", k.Job, k.later, k.Job, k.Job)
	case !k.Finished && k.Halted:
		return fmt.Sprintf("job %s was halted, too many lines failed; millrace results %s --errors prints them. Mend the cause: the same command goes on with the lines that have not ended, and with --again it runs all lines anew: %s", k.Job, k.Job, again)
	case !k.Finished:
		return fmt.Sprintf("job %s was interrupted, and no process runs it; millrace results %s prints what there is so far; the same command continues it: %s", k.Job, k.Job, again)
	case k.manifest() == nil:
		return fmt.Sprintf("job %s is finished, and its files are %s; the same command with --again runs all lines anew, millrace rm %s forgets it", k.Job, where, k.Job)
	}
	return fmt.Sprintf("job %s is %s, and no process has it any more; its results are %s, its manifest %s; millrace rm %s forgets it", k.Job, state, where, k.Manifest, k.Job)
}

func (k *over) Unwrap() error { return broker.ErrUnreachable }

// nobody is the error of a command that asks or tells, where no run is at work and no broker at the usual place. It is
// broker.ErrUnreachable, and what wanted is.
type nobody struct {
	data   string
	runs   []kept
	wanted error // why none of the runs is the one that was asked for; nil: none was
}

func (n *nobody) Error() string {
	s := fmt.Sprintf("no `millrace run` is at work with --data %s, and no broker answers at %s; --nats names another", n.data, defaultNATS)
	if len(n.runs) == 0 {
		s += "; no runs are kept there"
	}
	if n.wanted != nil {
		return fmt.Sprintf("%v (%s)", n.wanted, s)
	}
	return s
}

func (n *nobody) Unwrap() []error {
	if n.wanted == nil {
		return []error{broker.ErrUnreachable}
	}
	return []error{broker.ErrUnreachable, n.wanted}
}

// keptMost is how many runs are listed.
const keptMost = 20

// list tells of the runs that are kept, where none of them was asked for.
func (n *nobody) list() string {
	if len(n.runs) == 0 || n.wanted != nil {
		return ""
	}
	var b strings.Builder
	fmt.Fprintln(&b, "Runs that are kept there; the same command continues one that was interrupted or halted, and shows one that is finished:")
	tw := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "  JOB\tNAME\tSTATE\tSINCE\tOUTPUT")
	for _, k := range n.runs[:min(keptMost, len(n.runs))] {
		state, where := k.state()
		fmt.Fprintf(tw, "  %s\t%s\t%s\t%s\t%s\n", k.Job, k.Name, state, k.when.Format("2006-01-02 15:04"), where)
	}
	_ = tw.Flush() // to memory
	if more := len(n.runs) - keptMost; more > 0 {
		fmt.Fprintf(&b, "  … and %d older\n", more)
	}
	return b.String()
}

// keptRow is what `status --json` prints of a run that is kept.
type keptRow struct {
	ID       string    `json:"id"`
	Name     string    `json:"name,omitempty"`
	State    string    `json:"state"`
	Since    time.Time `json:"since"`
	Input    string    `json:"input"`
	SHA256   string    `json:"sha256"`
	Output   string    `json:"output,omitempty"` // where its results are, were or will be
	Manifest string    `json:"manifest"`
}

// keptRows are the runs of which err tells, as a nobody or an over; told says whether it is one.
func keptRows(err error) (rows []keptRow, told bool) {
	var n *nobody
	var one *over
	var runs []kept
	switch {
	case errors.As(err, &one):
		runs = []kept{*one.kept}
	case !errors.As(err, &n):
		return nil, false
	case n.wanted == nil:
		runs = n.runs
	}
	for _, k := range runs {
		state, _ := k.state()
		rows = append(rows, keptRow{k.Job, k.Name, state, k.when, k.Input, k.SHA256, k.Output, k.Manifest})
	}
	return rows, true
}

// nobodyHas is the error of a command for a job, where err is that nobody is there.
func nobodyHas(job string, err error) error {
	var n *nobody
	if !errors.As(err, &n) {
		return err
	}
	k, _, wanted := chooseKept(n.runs, job)
	if k != nil {
		return left(k)
	}
	n.wanted = wanted
	return n
}
