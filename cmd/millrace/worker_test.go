package main

import (
	"path/filepath"
	"testing"
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
