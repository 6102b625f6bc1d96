package producer

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"

	"millrace/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// line is a valid line of an input.
func line(id, model, prompt string) string {
	return fmt.Sprintf(`{"custom_id":%q,"method":"POST","url":"/v1/chat/completions","body":{"model":%q,"messages":[{"role":"user","content":%q}]}}`, id, model, prompt)
}

// linesOf are n valid lines for the models in turn.
func linesOf(n int, models ...string) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(line(fmt.Sprintf("id-%d", i), models[i%len(models)], fmt.Sprintf("%d of %d", i%7, i)) + "\n")
	}
	return b.String()
}

// file writes an input.
func file(tb testing.TB, text string) string {
	tb.Helper()
	name := filepath.Join(tb.TempDir(), "input.jsonl")
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		tb.Fatal(err)
	}
	return name
}

// scanned scans an input that must be valid.
func scanned(tb testing.TB, in Input) *Dataset {
	tb.Helper()
	if in.Dir == "" {
		in.Dir = tb.TempDir()
	}
	d, err := Scan(context.Background(), in, nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { d.Close() })
	return d
}

// rejected scans an input that must not be valid, and returns its problems.
func rejected(t *testing.T, in Input) *InvalidInput {
	t.Helper()
	in.Dir = t.TempDir()
	d, err := Scan(context.Background(), in, nil)
	var bad *InvalidInput
	if !errors.As(err, &bad) {
		if err == nil {
			d.Close()
		}
		t.Fatalf("error %v, want an *InvalidInput", err)
	}
	if left, _ := filepath.Glob(filepath.Join(in.Dir, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	return bad
}

func TestInvalidLines(t *testing.T) {
	good := line("good", "m", "hello")
	big := int64(len(good)) + defaultAttempts*attemptBytes + fixedBytes + 400
	for name, c := range map[string]struct{ text, want string }{
		"malformed":      {`{"custom_id":"a","method":`, "malformed JSON"},
		"not an object":  {`[1]`, "must be a JSON object"},
		"no custom_id":   {strings.Replace(good, `"custom_id":"good",`, "", 1), "custom_id is missing"},
		"empty id":       {line("", "m", ""), "custom_id is empty"},
		"method":         {strings.Replace(line("a", "m", ""), "POST", "GET", 1), `method is "GET"`},
		"url":            {strings.Replace(line("a", "m", ""), "/v1/chat", "/v2/chat", 1), "url is"},
		"stream":         {strings.Replace(line("a", "m", ""), `"model"`, `"stream":true,"model"`, 1), "stream is true"},
		"no model":       {strings.Replace(line("a", "m", ""), `"model":"m",`, "", 1), "names no model"},
		"two models":     {strings.Replace(line("a", "m", ""), `"model":"m",`, `"model":"m","model":"n",`, 1), "two \"model\" keys"},
		"long model":     {line("a", strings.Repeat("m", maxModel+1), ""), "the name of the model has 257 bytes"},
		"NUL":            {strings.Replace(line("a", "m", "x"), "x", "\x00", 1), "malformed JSON"},
		"not UTF-8":      {strings.Replace(line("a", "m", "x"), `"x"`, "\"\xff\"", 1), "not UTF-8"},
		"UTF-16":         {"\xff\xfe{\x00", "not UTF-8"},
		"deep":           {strings.Replace(line("a", "m", "x"), `"x"`, strings.Repeat("[", 100_000)+strings.Repeat("]", 100_000), 1), "depth"},
		"two objects":    {line("a", "m", "") + line("b", "m", ""), "text after the end"},
		"over payload":   {line("a", "m", strings.Repeat("x", int(big)*3/4)), "the broker takes"},
		"over in memory": {line("a", "m", strings.Repeat("x", int(big))), "the broker takes"},
	} {
		t.Run(name, func(t *testing.T) {
			in := Input{Path: file(t, good+"\n\n"+c.text+"\n"+line("after", "m", "")+"\n")}
			if strings.HasPrefix(name, "over") {
				in.MaxPayload = big
			}
			bad := rejected(t, in)
			if bad.Total != 1 || len(bad.Errors) != 1 || bad.Errors[0].Line != 3 || !strings.Contains(bad.Errors[0].Message, c.want) {
				t.Errorf("problems %+v, want line 3 with %q", bad, c.want)
			}
		})
	}
}

// TestTooLongSaysBothNumbers: a line that is read whole and one that is not, both with what they need.
func TestTooLongSaysBothNumbers(t *testing.T) {
	const most = 64 << 10
	for _, n := range []int{most - 5000, most + 10, 5 * blockBytes} {
		text := line("a", "m", strings.Repeat("x", n))
		bad := rejected(t, Input{Path: file(t, line("b", "m", "")+"\n"+text+"\n"+line("c", "m", "")), MaxPayload: most})
		if len(bad.Errors) != 1 || bad.Errors[0].Line != 2 || !strings.HasSuffix(bad.Errors[0].Message, "the broker takes 65,536") {
			t.Fatalf("problems %+v", bad.Errors)
		}
		var need int
		if _, err := fmt.Sscanf(strings.ReplaceAll(bad.Errors[0].Message, ",", ""), "needs %d bytes", &need); err != nil || need < n {
			t.Errorf("%q, want more than %d", bad.Errors[0].Message, n)
		}
	}
}

func TestDuplicates(t *testing.T) {
	text := linesOf(5, "m") + line("id-3", "m", "again") + "\n" + line("id-3", "n", "and again") + "\n" + line("id-0", "m", "x")
	bad := rejected(t, Input{Path: file(t, text)})
	want := []string{
		`line 6: custom_id "id-3" is on line 4 already`,
		`line 7: custom_id "id-3" is on line 4 already`,
		`line 8: custom_id "id-0" is on line 1 already`,
	}
	var got []string
	for _, p := range bad.Errors {
		got = append(got, p.Error())
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || bad.Total != 3 {
		t.Errorf("problems\n%v, want\n%v", got, want)
	}
}

func TestManyProblems(t *testing.T) {
	text := strings.Repeat("{\n", 3000) + line("a", "m", "") + "\n"
	bad := rejected(t, Input{Path: file(t, text)})
	if bad.Total != 3000 || len(bad.Errors) != maxProblems || bad.Errors[999].Line != 1000 {
		t.Errorf("%d listed of %d, the last for line %d", len(bad.Errors), bad.Total, bad.Errors[len(bad.Errors)-1].Line)
	}
	if s := bad.Error(); strings.Count(s, "\n") > 8 || !strings.Contains(s, "3,000 invalid lines") || !strings.Contains(s, "--skip-invalid") {
		t.Errorf("message %q", s)
	}
}

func TestModelsAreLimited(t *testing.T) {
	var b strings.Builder
	for i := range maxModels + 2 {
		b.WriteString(line(fmt.Sprint("id", i), fmt.Sprint("model-", i), "") + "\n")
	}
	bad := rejected(t, Input{Path: file(t, b.String())})
	if bad.Total != 2 || bad.Errors[0].Line != maxModels+1 || !strings.Contains(bad.Errors[0].Message, "one more than the 1,000") {
		t.Errorf("problems %+v", bad)
	}
}

// TestForms: what is fine is fine: byte order mark, CRLF, blank lines, no line end at the end.
func TestForms(t *testing.T) {
	a, b := line("a", "m", "1"), line("b", "m", "2")
	text := "\xef\xbb\xbf" + a + "\r\n\r\n \t \n" + b
	d := scanned(t, Input{Path: file(t, text)})
	if d.Lines != 2 || d.Invalid != 0 || d.Bytes != int64(len(text)) {
		t.Errorf("%d lines, %d invalid, %d bytes", d.Lines, d.Invalid, d.Bytes)
	}
	for i, want := range []string{a, b} {
		l, err := d.line(int64(i), new(scratch))
		if err != nil || !strings.Contains(want, string(l.Body)) || l.Model != "m" {
			t.Errorf("line %d: %+v, %v", i, l, err)
		}
	}
	r, err := d.table.get(1)
	if err != nil || r.line != 4 {
		t.Errorf("line %d of the file, %v", r.line, err)
	}
}

func TestEmpty(t *testing.T) {
	for _, text := range []string{"", "\n", "\xef\xbb\xbf", " \r\n\t\n"} {
		if _, err := Scan(t.Context(), Input{Path: file(t, text), Dir: t.TempDir()}, nil); !errors.Is(err, ErrEmpty) {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, in := range []Input{{}, {Path: "-"}, {Path: t.TempDir()}, {Path: "no such file"}, {Path: file(t, "x"), Limit: -1},
		{Path: file(t, "x"), MaxErrors: "120%"}, {Path: file(t, "x"), MaxErrors: "-1"}, {Path: file(t, "x"), Lane: "fast"}} {
		in.Dir = t.TempDir()
		if _, err := Scan(t.Context(), in, nil); err == nil {
			t.Errorf("%+v: no error", in)
		}
	}
}

func TestOverride(t *testing.T) {
	none := strings.Replace(line("b", "m", ""), `"model":"m",`, "", 1)
	d := scanned(t, Input{Path: file(t, line("a", "m", "")+"\n"+none+"\n"), Override: "other"})
	if got := fmt.Sprint(d.Models()); got != "[{other 2}]" {
		t.Errorf("models %s", got)
	}
	job := d.Job()
	for i, want := range []string{`{"model":"other","messages":[{"role":"user","content":""}]}`, `{"model":"other","messages":[{"role":"user","content":""}]}`} {
		msg, err := d.request(&job, int64(i), new(scratch))
		if err != nil {
			t.Fatal(err)
		}
		q, err := proto.DecodeRequest(msg)
		if err != nil || string(q.Body) != want || q.Model != "other" || q.Job != job.ID || q.Index != int64(i) {
			t.Errorf("request %+v %s, %v", q, q.Body, err)
		}
	}
}

// TestBytesExact: what JSON readers disagree on travels as it is.
func TestBytesExact(t *testing.T) {
	body := `{ "model" : "m","big":12345678901234567890123, "e":1e400 ,"twice":1,"twice":2,"s":"\ud800 é  \u00e9","messages":[]}`
	text := `{"custom_id":"\u00e9","method":"POST","url":"/v1/chat/completions","body":` + body + `}`
	d := scanned(t, Input{Path: file(t, text)})
	job := d.Job()
	msg, err := d.request(&job, 0, new(scratch))
	if err != nil {
		t.Fatal(err)
	}
	q, err := proto.DecodeRequest(msg)
	if err != nil || string(q.Body) != body || q.CustomID != "é" {
		t.Errorf("body %s, id %q, %v", q.Body, q.CustomID, err)
	}
}

func TestLimit(t *testing.T) {
	text := linesOf(3, "m")
	all := scanned(t, Input{Path: file(t, text)})
	d := scanned(t, Input{Path: file(t, "\n"+text+"broken\n"), Limit: 3})
	if d.Lines != 3 || d.Bytes != int64(len(text))+1 {
		t.Errorf("%d lines, %d bytes", d.Lines, d.Bytes)
	}
	if same := scanned(t, Input{Path: file(t, text), Limit: 3}); same.SHA256 != all.SHA256 || same.Job().ID == all.Job().ID {
		t.Errorf("ids %s and %s", same.Job().ID, all.Job().ID)
	}
}

// TestSkipInvalid: invalid lines count, end as such, and name their line where they have no usable custom_id.
func TestSkipInvalid(t *testing.T) {
	text := linesOf(3, "m") + // 1-3
		"{broken\n" + // 4
		line("id-1", "m", "twin") + "\n" + // 5
		strings.Replace(line("wrong", "m", ""), "POST", "PUT", 1) + "\n" + // 6
		line("long", "n", strings.Repeat("x", 1<<16)) + "\n" + // 7
		line("last", "n", "") + "\n" // 8
	d := scanned(t, Input{Path: file(t, text), SkipInvalid: true, MaxPayload: 1 << 15})
	if d.Lines != 8 || d.Invalid != 4 || len(d.Problems) != 4 || fmt.Sprint(d.Models()) != "[{m 3} {n 1}]" {
		t.Fatalf("%d lines, %d invalid, models %v, %v", d.Lines, d.Invalid, d.Models(), d.Problems)
	}
	job := d.Job()
	for i, want := range map[int64]struct{ id, message string }{
		3: {"", "malformed"}, 4: {"", `custom_id "id-1" is on line 2 already`}, 5: {"wrong", "method is"}, 6: {"", "the broker takes 32,768"},
	} {
		msg, err := ending(d, nil, &job, i, "", "", new(scratch))
		if err != nil {
			t.Fatal(err)
		}
		res, err := proto.DecodeResult(msg)
		if err != nil || res.CustomID != want.id || res.Line != i+1 || res.Code != proto.CodeInvalidRequest || res.Index != i || !strings.Contains(res.Message, want.message) {
			t.Errorf("line %d: %+v, %v", i+1, res, err)
		}
	}
	var order []uint32
	for _, g := range append(d.groups(), d.invalid()) {
		at, err := d.order.read(g, 0, make([]uint32, 10))
		if err != nil {
			t.Fatal(err)
		}
		order = append(order, at...)
	}
	if got := fmt.Sprint(order[3:]); got != "[7 3 5 6 4]" {
		t.Errorf("order %v", order)
	}
}

// TestPrefixOrder: lines whose prompts begin alike lie together.
func TestPrefixOrder(t *testing.T) {
	var b strings.Builder
	for i := range 60 {
		b.WriteString(line(fmt.Sprint(i), "m", strings.Repeat(fmt.Sprint(i%3), 2000)+fmt.Sprint(i)) + "\n")
	}
	d := scanned(t, Input{Path: file(t, b.String())})
	at, err := d.order.read(d.groups()[0], 0, make([]uint32, 60))
	if err != nil {
		t.Fatal(err)
	}
	changes := 0
	for i := 1; i < len(at); i++ {
		if at[i]%3 != at[i-1]%3 {
			changes++
		} else if at[i] < at[i-1] {
			t.Errorf("%d after %d", at[i], at[i-1])
		}
	}
	if changes != 2 {
		t.Errorf("%d changes of prefix in %v", changes, at)
	}
	plain := scanned(t, Input{Path: file(t, b.String()), InputOrder: true})
	if at, err = plain.order.read(plain.groups()[0], 0, at); err != nil || !slices.IsSorted(at) {
		t.Errorf("order of the input: %v, %v", at, err)
	}
	if a, b := d.Job(), plain.Job(); a.ID == b.ID || a.InputOrder || !b.InputOrder {
		t.Errorf("jobs %+v and %+v", a, b)
	}
}

func pack(t *testing.T, how, text string) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser = gzip.NewWriter(&b)
	if how == "zst" {
		z, err := zstd.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		w = z
	}
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestCompressed: a compressed file, and one that comes through a pipe, are the same job as the plain file.
func TestCompressed(t *testing.T) {
	text := linesOf(20, "m", "n")
	plain := scanned(t, Input{Path: file(t, text)})
	for _, how := range []string{"gz", "zst"} {
		name := filepath.Join(t.TempDir(), "input.jsonl."+how)
		if err := os.WriteFile(name, pack(t, how, text), 0o644); err != nil {
			t.Fatal(err)
		}
		in := Input{Path: name, Dir: t.TempDir()}
		d := scanned(t, in)
		if d.Job().ID != plain.Job().ID || d.SHA256 != plain.SHA256 || readFrom(d) == name {
			t.Errorf("%s: job %s read from %s, want %s", how, d.Job().ID, readFrom(d), plain.Job().ID)
		}
		if l, err := d.line(19, new(scratch)); err != nil || l.CustomID != "id-19" {
			t.Errorf("%s: %+v, %v", how, l, err)
		}
		d.Close()
		if left, _ := filepath.Glob(filepath.Join(in.Dir, "*")); len(left) > 0 {
			t.Errorf("%s: left behind: %v", how, left)
		}
		if _, err := Scan(t.Context(), Input{Path: file(t, string(pack(t, how, text)[:40])), Dir: t.TempDir()}, nil); err == nil {
			t.Errorf("%s: no error for half a file", how)
		}
	}
}

func TestStdin(t *testing.T) {
	text := linesOf(20, "m")
	for _, stdin := range []string{text, string(pack(t, "gz", text))} {
		in := Input{Path: "-", Stdin: strings.NewReader(stdin), Dir: t.TempDir()}
		d := scanned(t, in)
		if job := d.Job(); job.Input != "-" || !strings.HasPrefix(job.ID, "stdin-") || d.Lines != 20 {
			t.Errorf("job %+v", job)
		}
		d.Close()
		// What is left of a job that has not ended continues it.
		again := scanned(t, Input{Path: readFrom(d), Dir: in.Dir})
		if again.Job().ID != d.Job().ID {
			t.Errorf("job %s, was %s", again.Job().ID, d.Job().ID)
		}
	}
	in := Input{Path: "-", Stdin: strings.NewReader(text), Dir: t.TempDir()}
	d := scanned(t, in)
	d.ended()
	d.Close()
	if left, _ := filepath.Glob(filepath.Join(in.Dir, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBombs(t *testing.T) {
	text := strings.Repeat(line("a", "m", strings.Repeat("a", 10_000))+"\n", 400) // 4 MB
	for _, how := range []string{"gz", "zst"} {
		name := file(t, string(pack(t, how, text)))
		for _, c := range []struct {
			in   Input
			want string
		}{
			{Input{MaxPlain: 1 << 20}, "more than the 1,048,576 bytes"},
			{Input{ratioFrom: 1}, "more than 1,000 times"},
		} {
			if how == "gz" && c.in.ratioFrom > 0 {
				continue // gzip cannot do that
			}
			c.in.Path, c.in.Dir = name, t.TempDir()
			_, err := Scan(t.Context(), c.in, nil)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: error %v, want %q", how, err, c.want)
			}
			if left, _ := filepath.Glob(filepath.Join(c.in.Dir, "*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		}
	}
}

// TestEdited: an edit after the scan is noticed, a file that was replaced is still there.
func TestEdited(t *testing.T) {
	text := linesOf(3, "m")
	name := file(t, text)
	d := scanned(t, Input{Path: name})
	if err := os.WriteFile(name, []byte(strings.Replace(text, "of 1", "of 9", 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := d.line(0, new(scratch)); err != nil {
		t.Error(err)
	}
	if _, err := d.line(1, new(scratch)); !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("error %v", err)
	}
	if err := os.Truncate(name, 5); err != nil {
		t.Fatal(err)
	}
	if _, err := d.line(2, new(scratch)); !errors.Is(err, ErrChanged) {
		t.Errorf("error %v", err)
	}
	job := d.Job()
	msg, err := ending(d, nil, &job, 1, proto.CodeCancelled, "cancelled", new(scratch))
	if err != nil {
		t.Fatal(err)
	}
	if res, err := proto.DecodeResult(msg); err != nil || res.CustomID != "" || res.Line != 2 || res.Code != proto.CodeCancelled {
		t.Errorf("result %+v, %v", res, err)
	}
}

func TestIDs(t *testing.T) {
	name := file(t, linesOf(2, "m"))
	base := scanned(t, Input{Path: name}).Job()
	if !strings.HasPrefix(base.ID, "input-") || len(base.ID) != len("input-")+10 {
		t.Errorf("id %s", base.ID)
	}
	ids := map[string]bool{base.ID: true}
	for _, in := range []Input{{Name: "n"}, {Override: "o"}, {Limit: 1}, {Limit: 2}, {MaxAttempts: 3}, {TimeoutMS: 3}} {
		in.Path = name
		if id := scanned(t, in).Job().ID; ids[id] {
			t.Errorf("%+v: id %s again", in, id)
		} else {
			ids[id] = true
		}
	}
	for _, in := range []Input{{}, {Lane: "high"}, {MaxErrors: "5"}, {LifetimeMS: 5}, {SkipInvalid: true}, {Program: "p"}} {
		in.Path = name
		if id := scanned(t, in).Job().ID; id != base.ID {
			t.Errorf("%+v: id %s, want %s", in, id, base.ID)
		}
	}
}

func TestScanStops(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	in := Input{Path: file(t, strings.Repeat(linesOf(100, "m"), 200)), Dir: t.TempDir()}
	_, err := Scan(ctx, in, func(bytes, lines int64) {
		if bytes <= 0 || lines <= 0 {
			t.Errorf("progress %d bytes, %d lines", bytes, lines)
		}
		cancel(why)
	})
	if !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}
	r, w := io.Pipe()
	defer w.Close()
	go func() { // nothing follows; a pipe of the system is interrupted, this one ends
		<-ctx.Done()
		w.CloseWithError(io.ErrClosedPipe)
	}()
	if _, err := Scan(ctx, Input{Path: "-", Stdin: r, Dir: t.TempDir()}, nil); !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}
}

// readFrom is the file that the lines are read from: the input, or its plain copy.
func readFrom(d *Dataset) string { return cmp.Or(d.src.laid, d.in.Path) }
