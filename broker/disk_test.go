package broker

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// That the folders above are synced shows only when the power fails.
func TestMakeDir(t *testing.T) {
	root := t.TempDir()
	deep := filepath.Join(root, "a", "b", "c")
	for range 2 { // the second time they are there
		if err := MakeDir(deep); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(deep); err != nil || !st.IsDir() {
		t.Fatal(err)
	}
	link := filepath.Join(root, "link")
	if err := os.Symlink(deep, link); err != nil {
		t.Fatal(err)
	}
	if err := MakeDir(link); err != nil {
		t.Errorf("a link to a folder: %v", err)
	}
	file := filepath.Join(root, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := MakeDir(file); !errors.Is(err, os.ErrExist) {
		t.Errorf("where a file stands: %v", err)
	}
	if err := MakeDir(filepath.Join(file, "x", "y")); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("below a file: %v", err)
	}
}
