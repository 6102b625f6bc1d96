package aggregator

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/nats-io/nuid"

	"millrace/broker"
)

// partFile is a file that is being written beside the one it will replace, under a name that no other writer has: one
// that lost the lease without noticing may be writing, too.
type partFile struct {
	path  string
	temp  string // empty once it was renamed
	f     *os.File
	w     *bufio.Writer
	sum   hash.Hash
	lines int64
	bytes int64
}

// newPart begins a file. What others left of theirs goes: they are dead, or have lost the lease, and then cannot rename
// it any more.
func newPart(path string) (*partFile, error) {
	if err := broker.MakeDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if err := sweepParts(path); err != nil {
		return nil, err
	}
	temp := partName(path, nuid.Next())
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	return &partFile{path: path, temp: temp, f: f, w: bufio.NewWriterSize(f, 1<<20), sum: sha256.New()}, nil
}

func partName(path, id string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+id+".part")
}

// partID is the length of what nuid draws.
const partID = 22

func sweepParts(path string) error {
	names, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	for _, n := range names {
		id, ok := strings.CutPrefix(n.Name(), "."+filepath.Base(path)+".")
		id, part := strings.CutSuffix(id, ".part")
		if ok && part && len(id) == partID && !strings.Contains(id, ".") {
			if err := remove(partName(path, id)); err != nil {
				return err
			}
		}
	}
	return nil
}

// write adds one line, or all of a file.
func (p *partFile) write(b []byte) error {
	p.lines++
	p.bytes += int64(len(b))
	p.sum.Write(b)
	_, err := p.w.Write(b)
	return err
}

// settle puts what was written on disk.
func (p *partFile) settle() error {
	if err := p.w.Flush(); err != nil {
		return err
	}
	if err := p.f.Sync(); err != nil {
		return err
	}
	err := p.f.Close()
	p.f = nil
	return err
}

// rename puts the file in its place. The folder is to be synced after it.
func (p *partFile) rename() error {
	if err := os.Rename(p.temp, p.path); err != nil {
		return err
	}
	p.temp = ""
	return nil
}

// discard removes the file, unless it was renamed.
func (p *partFile) discard() {
	if p.f != nil {
		p.f.Close() // nothing in it is wanted
	}
	if p.temp != "" {
		_ = os.Remove(p.temp) // the next attempt tries again
	}
}

func (p *partFile) facts(manifest, path string) FileFacts {
	return FileFacts{Name: relative(manifest, path), Lines: p.lines, Bytes: p.bytes, SHA256: hex.EncodeToString(p.sum.Sum(nil))}
}

// remove deletes a file that need not be there.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove file: %w", err)
	}
	return nil
}

// Paths finds the files of a manifest at path.
func (m *Manifest) Paths(path string) Files {
	return Files{Output: beside(path, m.Files.Output.Name), Errors: beside(path, m.Files.Errors.Name), Manifest: path}
}
