package producer

import (
	"errors"
	"strings"
	"testing"

	"millrace/proto"
)

// FuzzScan: whatever an input holds, a scan with SkipInvalid takes it, every line that counts ends either as a request
// with the body it has, or as an error result, no two with one custom_id; and a strict scan refuses it exactly when
// there are invalid lines.
func FuzzScan(f *testing.F) {
	f.Add(linesOf(3, "m", "n"), uint16(0))
	f.Add("\xef\xbb\xbf"+line("a", "m", "x")+"\r\n\n"+line("a", "m", "y"), uint16(200))
	f.Add(strings.Replace(line("a", "m", "x"), "x", "\\ud800\x00", 1)+"\n{", uint16(1))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string, most uint16) {
		in := Input{Path: "-", Stdin: strings.NewReader(text), Dir: dir, SkipInvalid: true, MaxPayload: int64(most)}
		d, err := Scan(t.Context(), in, nil)
		if err != nil {
			if !errors.Is(err, ErrEmpty) && !compressed([]byte(text)) {
				t.Fatal(err)
			}
			return
		}
		d.ended()
		defer d.Close()
		bad := everyLine(t, d)
		if bad != d.Invalid {
			t.Fatalf("%d invalid lines, scan says %d", bad, d.Invalid)
		}
		in.Stdin, in.SkipInvalid = strings.NewReader(text), false
		strict, err := Scan(t.Context(), in, nil)
		var inv *InvalidInput
		if (err == nil) != (bad == 0) || err != nil && (!errors.As(err, &inv) || inv.Total != bad) {
			t.Fatalf("strict scan: %v, want %d invalid lines", err, bad)
		}
		if err == nil {
			strict.ended()
			strict.Close()
		}
	})
}

func everyLine(t *testing.T, d *Dataset) (bad int64) {
	t.Helper()
	job := d.Job()
	seen := map[string]bool{}
	for _, g := range append(d.groups(), d.invalid()) {
		at, err := d.order.read(g, 0, make([]uint32, g.n))
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range at {
			id := ""
			if g.model == "" {
				bad++
				msg, err := ending(d, nil, &job, int64(i), "", "", new(scratch))
				if err != nil {
					t.Fatal(err)
				}
				res, err := proto.DecodeResult(msg)
				if err != nil || res.Line == 0 || res.Message == "" {
					t.Fatalf("result %+v, %v", res, err)
				}
				id = res.CustomID
			} else {
				msg, err := d.request(&job, int64(i), new(scratch))
				if err != nil {
					t.Fatal(err)
				}
				q, err := proto.DecodeRequest(msg)
				if err != nil || q.Model != g.model || q.CustomID == "" || int64(len(msg)) > d.in.MaxPayload {
					t.Fatalf("request %+v, %v", q, err)
				}
				id = q.CustomID
			}
			if id != "" && seen[id] {
				t.Fatalf("custom_id %q twice", id)
			}
			seen[id] = true
		}
	}
	return bad
}
