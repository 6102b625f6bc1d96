package broker

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// FreeBytes is how much this user may still write where path is, or where it will be made.
func FreeBytes(path string) (int64, error) {
	for {
		var st syscall.Statfs_t
		err := syscall.Statfs(path, &st)
		if err == nil {
			return int64(st.Bavail) * int64(st.Bsize), nil
		}
		parent := filepath.Dir(path)
		if !os.IsNotExist(err) || parent == path {
			return 0, fmt.Errorf("read the free space of %s: %w", path, err)
		}
		path = parent
	}
}
