package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"millrace/proto"
)

// TestJournalFolders: each worker of `millrace worker` has a journal of its own, those of `millrace run` have none.
func TestJournalFolders(t *testing.T) {
	var a app
	for _, dir := range []string{"", t.TempDir()} {
		ws, err := a.workers(nil, &engineFlags{urls: []string{"http://a:1", "http://b:1"}}, nil, nil, 0, dir)
		if err != nil {
			t.Fatal(err)
		}
		if dir == "" {
			if ws[0].Dir != "" || ws[1].Dir != "" {
				t.Errorf("journals in %q and %q", ws[0].Dir, ws[1].Dir)
			}
		} else if filepath.Dir(ws[0].Dir) != dir || filepath.Dir(ws[1].Dir) != dir || ws[0].Dir == ws[1].Dir {
			t.Errorf("journals in %q and %q", ws[0].Dir, ws[1].Dir)
		}
	}
}

// TestOnce: one engine in several words is one; those that only look alike are not.
func TestOnce(t *testing.T) {
	for _, c := range []struct{ given, want, note string }{
		{"http://h:1 http://h:1/", "http://h:1", "engine http://h:1 is given more than once"},
		{"http://h:1 http://H:1/v1 http://h:1", "http://h:1", "more than once"},
		{"http://127.0.0.1:1 http://localhost:1", "http://127.0.0.1:1", "http://127.0.0.1:1 and http://localhost:1 are the same engine"},
		{"http://LOCALHOST:1/v1 http://127.0.0.1:1/", "http://LOCALHOST:1/v1", "http://localhost:1 and http://127.0.0.1:1 are the same engine"},
		{"http://u:s3cret@h http://h:80", "http://u:s3cret@h", "engine http://h is given"},
		{"http://h:1,http://h:1 , http://g:1", "http://h:1 http://g:1", "more than once"},
		{"http://h:1 http://h:2 https://h:1 http://h:1/a http://[::1]:1 http://127.0.0.1:1", "http://h:1 http://h:2 https://h:1 http://h:1/a http://[::1]:1 http://127.0.0.1:1", ""},
		{"null: null:", "null: null:", ""},
	} {
		e := engineFlags{urls: strings.Split(c.given, " "), stallTimeout: time.Minute}
		if strings.Contains(c.given, ",") {
			e.urls = []string{c.given}
		}
		if err := e.check(); err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		e.once(&said)
		if got := strings.Join(e.urls, " "); got != c.want || !strings.Contains(said.String(), c.note) || (c.note == "") != (said.Len() == 0) || strings.Contains(said.String(), "s3cret") {
			t.Errorf("%s: %s, and it is said: %s", c.given, got, said.String())
		}
	}
}

// TestServedInterrupted: who stops a run whose engine takes connections and says nothing hears that.
func TestServedInterrupted(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, stop := context.WithCancelCause(t.Context())
	stop(signalled{os.Interrupt})
	r := &runFlags{engineFlags: engineFlags{urls: []string{"http://" + ln.Addr().String()}}}
	err = new(app).served(ctx, r, &proto.Job{})
	if exitCode(err) != 130 || !strings.Contains(err.Error(), ln.Addr().String()+" had not answered yet") {
		t.Errorf("%v", err)
	}
}

// TestEnginePassword: a password with a comma is whole, and no part of one that cannot be read is shown.
func TestEnginePassword(t *testing.T) {
	for _, c := range []struct{ given, want, wrong string }{
		{"http://user:sec,ret@h:9", "http://user:sec,ret@h:9", ""},
		{"http://user:sec,ret@h:9,HTTPS://g,sim, null:", "http://user:sec,ret@h:9 HTTPS://g sim null:", ""},
		{"http://user:sec,sim,ret@h:9", "http://user:sec,sim,ret@h:9", ""},
		{"sim,http://a:sec@h,http://b:ret@h", "sim http://a:sec@h http://b:ret@h", ""},
		{"http://a:1,http://b:1 ,sim", "http://a:1 http://b:1 sim", ""},
		{"http://user:sec/ret@h:9", "", `engine URL "…@h:9": it cannot be read`},
		{"http://user:sec%zzret@h:9", "", `engine URL "…@h:9": it cannot be read`},
		{"http://user:1/secret@h:9", "", `engine URL "…@h:9": it cannot be read`},
		{"http://user:sec#ret@h:9", "", `engine URL "…@h:9": it cannot be read`},
		{"http://user:sec,ret@h:99999", "", "port 99999 is not between"},
		{"user:sec,ret@h:9", "", "@h:9"},
		{"http://user:sec,ret@h:9,gpu2:8000", "", `"…@h:9,gpu2:8000": it cannot be read`},
	} {
		byEnv := new(app).workerCommand()
		if err := fromEnv(byEnv.Flags(), func(name string) (string, bool) { return c.given, name == "MILLRACE_ENGINE" }); err != nil {
			t.Fatal(err)
		}
		fromFlags, err := byEnv.Flags().GetStringArray("engine")
		if err != nil {
			t.Fatal(err)
		}
		for _, urls := range [][]string{{c.given}, fromFlags} {
			e := engineFlags{urls: urls, stallTimeout: time.Minute}
			err := e.check(simEngine)
			switch {
			case c.wrong == "" && err != nil:
				t.Errorf("%s: %v", c.given, err)
			case c.wrong == "" && strings.Join(e.urls, " ") != c.want:
				t.Errorf("%s: %q", c.given, e.urls)
			case c.wrong == "":
			case err == nil || !strings.Contains(err.Error(), c.wrong) || strings.Contains(err.Error(), "sec") || strings.Contains(err.Error(), "ret"):
				t.Errorf("%s: error %v", c.given, err)
			}
		}
	}
}
