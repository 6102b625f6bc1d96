package aggregator

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"millrace/proto"
)

// Verify reads the files that a manifest names and recomputes what it says of them: SHA-256, bytes, lines, tokens;
// that every line can be read, that every index of the input is there once over both files (a line's id is made from
// it), and that no custom_id is there twice; and that the numbers in the manifest agree with those and with each other.
// What differs is returned as reasons; none means VALID. The error is about the manifest itself.
//
// Not to be had from the files, and so not verified: all times and what is made of them (durations, rates, windows),
// cached and wasted tokens, attempts, answers cut at the context (what a line asked for is not in them), the parts of models and workers beyond their sums, engines, and the input, which
// is not read: its SHA-256 in the manifest is that of its plain lines.
func Verify(manifest string) (*Manifest, []string, error) {
	return VerifyContext(context.Background(), manifest)
}

// VerifyContext is Verify, broken off when ctx ends; the error is its cause then.
func VerifyContext(ctx context.Context, manifest string) (*Manifest, []string, error) {
	m, err := ReadManifest(manifest)
	if err != nil {
		return nil, nil, err
	}
	a := audit{expect: m.Input.Lines}
	output, err := a.file(ctx, beside(manifest, m.Files.Output.Name), true)
	a.unread("output file", m.Files.Output.Name, manifest, err)
	failed, err := a.file(ctx, beside(manifest, m.Files.Errors.Name), false)
	a.unread("error file", m.Files.Errors.Name, manifest, err)
	if ctx.Err() != nil {
		return nil, nil, context.Cause(ctx)
	}
	if output != nil {
		a.compare("output file", m.Files.Output, *output)
	}
	if failed != nil {
		a.compare("error file", m.Files.Errors, *failed)
	}
	a.counts(m)
	a.statistics(m)
	if output != nil && failed != nil { // else most are missing, and why is said
		a.indexes(m.Job.ID, m.Input.Lines)
	}
	if err := a.twice(ctx); err != nil {
		a.say("%v", err)
	}
	if !m.Valid {
		a.say("the manifest itself says %s: %s", m.Verdict, first(m.Reasons))
	}
	return m, a.reasons, nil
}

func first(s []string) string {
	if len(s) == 0 {
		return "no reason given"
	}
	return s[0]
}

// audit reads the files of a job and collects what is wrong with them.
type audit struct {
	reasons []string
	seed    maphash.Seed
	ids     []uint64 // hashes of all custom_ids
	lines   []uint64 // the first 64 bits of all lines' ids
	files   []string
	expect  int64 // lines; only to make room for them at once
}

// shortestLine is less than any line of the files takes, in bytes.
const shortestLine = 64

// maxReasons bounds what is listed of one kind.
const maxReasons = 10

func (a *audit) say(format string, args ...any) {
	a.reasons = append(a.reasons, fmt.Sprintf(format, args...))
}

// unread says why one of the files could not be read, if so.
func (a *audit) unread(what, name, manifest string, err error) {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		a.say("%s %s: no such file beside the manifest, in %s; bring it back there", what, name, filepath.Dir(manifest))
	case err != nil:
		a.say("%s %s cannot be read: %v", what, name, err)
	}
}

// file reads one of the files. A file that cannot be read is an error; a line that cannot is a reason.
func (a *audit) file(ctx context.Context, path string, output bool) (*FileFacts, error) {
	if a.files == nil {
		a.seed = maphash.MakeSeed()
	}
	if st, err := os.Stat(path); err == nil { // so that they do not grow by copying; the manifest may lie
		room := int(min(a.expect-int64(len(a.lines)), st.Size()/shortestLine))
		a.ids, a.lines = slices.Grow(a.ids, max(room, 0)), slices.Grow(a.lines, max(room, 0))
	}
	a.files = append(a.files, path)
	f := new(FileFacts)
	sum := sha256.New()
	bad := 0
	err := eachLine(ctx, path, func(line []byte) {
		sum.Write(line)
		f.Lines++
		f.Bytes += int64(len(line))
		if err := a.line(f, line, output); err != nil {
			if bad++; bad <= maxReasons {
				a.say("%s:%d: %v", path, f.Lines, err)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	f.SHA256 = hex.EncodeToString(sum.Sum(nil))
	return f, nil
}

func (a *audit) line(f *FileFacts, line []byte, output bool) error {
	if line[len(line)-1] != '\n' {
		return errors.New("the last line is cut off")
	}
	l, err := proto.ParseOutput(line)
	if err != nil {
		return err
	}
	id, err := lineBits(l.ID)
	if err != nil {
		return err
	}
	a.lines = append(a.lines, id)
	if l.CustomID == nil {
		f.NullIDs++
	} else {
		a.ids = append(a.ids, maphash.String(a.seed, *l.CustomID))
	}
	answered := l.Response != nil && l.Error == nil
	if output && !(answered && l.Response.StatusCode/100 == 2) {
		return errors.New("the line is no answer of an engine")
	}
	if !answered && l.Error == nil {
		return errors.New("the line has neither a response nor an error")
	}
	if !output && answered && l.Response.StatusCode/100 == 2 {
		return errors.New("the line is the answer of an engine")
	}
	if l.Response == nil {
		f.WithoutUsage++
		return nil
	}
	u := proto.ReadUsage(l.Response.Body)
	if !u.Counted {
		f.WithoutUsage++
	}
	f.PromptTokens += u.Prompt
	f.CompletionTokens += u.Completion
	return nil
}

// compare says in what a file differs from what the manifest says of it.
func (a *audit) compare(what string, want, got FileFacts) {
	if want.SHA256 != got.SHA256 {
		a.say("%s %s: its SHA-256 is %s, the manifest says %s", what, want.Name, got.SHA256, want.SHA256)
	}
	for _, c := range []struct {
		name      string
		want, got int64
	}{
		{"lines", want.Lines, got.Lines},
		{"bytes", want.Bytes, got.Bytes},
		{"lines without a custom_id", want.NullIDs, got.NullIDs},
		{"prompt tokens", want.PromptTokens, got.PromptTokens},
		{"completion tokens", want.CompletionTokens, got.CompletionTokens},
		{"lines without usage", want.WithoutUsage, got.WithoutUsage},
	} {
		if c.want != c.got {
			a.say("%s %s: it has %d %s, the manifest says %d", what, want.Name, c.got, c.name, c.want)
		}
	}
}

// counts checks that the numbers in the manifest agree with each other.
func (a *audit) counts(m *Manifest) {
	if n := m.Files.Output.Lines; n != m.Counts.OK {
		a.say("%s ended ok, the output file has %d", proto.Count(m.Counts.OK, "line"), n)
	}
	if n := m.Files.Errors.Lines; n != m.Counts.Failed {
		a.say("%s failed, the error file has %d", proto.Count(m.Counts.Failed, "line"), n)
	}
	if n := m.Counts.OK + m.Counts.Failed; n != m.Input.Lines {
		a.say("the input has %s, %d ended", proto.Count(m.Input.Lines, "line"), n)
	}
}

// statistics checks that they agree with the counts and the files.
func (a *audit) statistics(m *Manifest) {
	s := m.Statistics
	var models ModelCount
	for _, c := range m.Counts.ByModel {
		models.OK += c.OK
		models.Failed += c.Failed
	}
	var parts Figures
	for _, p := range s.ByModel {
		parts.Completed += p.Completed
		parts.Failed += p.Failed
		parts.Attempts += p.Attempts
		parts.InputTokens += p.InputTokens
		parts.OutputTokens += p.OutputTokens
		parts.CachedTokens += p.CachedTokens
		parts.WithoutUsage += p.WithoutUsage
		parts.ContextCut += p.ContextCut
	}
	var failures int64
	for _, f := range s.Failures {
		failures += f.Count
	}
	for _, c := range []struct {
		what      string
		want, got int64
	}{
		{"lines that ended ok", m.Counts.OK, s.Completed},
		{"lines that failed", m.Counts.Failed, s.Failed},
		{"failures by their kind", m.Counts.Failed, failures},
		{"lines of all models that ended ok", m.Counts.OK, models.OK},
		{"lines of all models that failed", m.Counts.Failed, models.Failed},
		{"completed lines of all models", s.Completed, parts.Completed},
		{"failed lines of all models", s.Failed, parts.Failed},
		{"attempts of all models", s.Attempts, parts.Attempts},
		{"input tokens of all models", s.InputTokens, parts.InputTokens},
		{"output tokens of all models", s.OutputTokens, parts.OutputTokens},
		{"cached tokens of all models", s.CachedTokens, parts.CachedTokens},
		{"lines without usage of all models", s.WithoutUsage, parts.WithoutUsage},
		{"lines of all models that were cut at the context", s.ContextCut, parts.ContextCut},
	} {
		if c.want != c.got {
			a.say("the manifest says that there are %d %s, and elsewhere %d", c.got, c.what, c.want)
		}
	}
	if n := m.tokenNote(); n != "" && !slices.Contains(m.Notes, n) {
		a.say("%s", n)
	}
}

// tokenNote says in what the tokens in the files differ from those in the statistics; empty: in nothing. An engine may
// count in its stream what it does not write in the body.
func (m *Manifest) tokenNote() string {
	out, failed, s := m.Files.Output, m.Files.Errors, m.Statistics
	prompt, completion := out.PromptTokens+failed.PromptTokens, out.CompletionTokens+failed.CompletionTokens
	if prompt == s.InputTokens && completion == s.OutputTokens {
		return ""
	}
	return fmt.Sprintf("the bodies in the files hold %d prompt and %d completion tokens, the results %d and %d",
		prompt, completion, s.InputTokens, s.OutputTokens)
}

// lineBits reads the first 64 bits of what proto.LineID made.
func lineBits(id string) (uint64, error) {
	hex, ok := strings.CutPrefix(id, "batch_req_")
	if !ok || len(hex) != 24 {
		return 0, fmt.Errorf("id %q is none of ours", id)
	}
	bits, err := strconv.ParseUint(hex[:16], 16, 64)
	if err != nil {
		return 0, fmt.Errorf("id %q is none of ours", id)
	}
	return bits, nil
}

// indexes checks that the ids of the lines are those of the lines 0 to n-1 of the job, each once.
func (a *audit) indexes(job string, n int64) {
	if n < 0 || n > maxLines {
		a.say("the input cannot have %s", proto.Count(n, "line"))
		return
	}
	slices.Sort(a.lines)
	missing := int64(0)
	for i := range n {
		bits, _ := lineBits(proto.LineID(job, i)) // cannot fail: it was just made
		if _, ok := slices.BinarySearch(a.lines, bits); ok {
			continue
		}
		if missing++; missing <= maxReasons {
			a.say("the line with index %d of the input is missing", i)
		}
	}
	if missing > maxReasons {
		a.say("missing of the input: %s", proto.Count(missing, "line"))
	}
	if k := int64(len(slices.Compact(a.lines))); k != n-missing || k != int64(len(a.lines)) {
		a.say("there twice, or not of this job: %s", proto.Count(int64(len(a.lines))-(n-missing), "line"))
	}
}

// twice finds custom_ids that are there more than once. Hashes that are equal make it read the files again, to compare
// the ids themselves.
func (a *audit) twice(ctx context.Context) error {
	slices.Sort(a.ids)
	suspects := map[uint64]bool{}
	for i := 1; i < len(a.ids); i++ {
		if a.ids[i] == a.ids[i-1] {
			suspects[a.ids[i]] = true
		}
	}
	if len(suspects) == 0 {
		return nil
	}
	count := map[string]int{}
	for _, path := range a.files {
		err := eachLine(ctx, path, func(line []byte) {
			l, err := proto.ParseOutput(line)
			if err == nil && l.CustomID != nil && suspects[maphash.String(a.seed, *l.CustomID)] {
				count[*l.CustomID]++
			}
		})
		if err != nil {
			return err
		}
	}
	a.sayTwice(count)
	return nil
}

func (a *audit) sayTwice(count map[string]int) {
	var ids []string
	for id, n := range count {
		if n > 1 {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for i, id := range ids {
		if i == maxReasons {
			a.say("%d more custom_ids are there more than once", len(ids)-i)
			return
		}
		a.say("custom_id %q is there %d times", id, count[id])
	}
}

// eachLine calls do with every line of a file, its end included.
func eachLine(ctx context.Context, path string, do func([]byte)) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open file: %w", err)
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 1<<20)
	var long bytes.Buffer
	for n := 0; ; n++ {
		if n%1024 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			long.Write(line)
			continue
		}
		if err != nil && err != io.EOF {
			return fmt.Errorf("read file: %w", err)
		}
		if long.Len() > 0 {
			long.Write(line)
			line = long.Bytes()
		}
		if len(line) > 0 {
			do(line)
		}
		long.Reset()
		if err == io.EOF {
			return nil
		}
	}
}
