package aggregator

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"

	"millrace/broker"
	"millrace/proto"
)

// position is how far a stream of results is folded.
type position struct {
	Stream int64  `json:"stream"` // creation time of the stream, Unix ns: which stream Seq belongs to; 0: none
	Seq    uint64 `json:"seq"`    // last sequence that is folded
	Time   int64  `json:"time"`   // the broker's timestamp of the message at Seq, Unix ns; 0: not known
}

// checkpoint is what the fold must not forget besides the spools. What is in the first Length bytes of a spool is not
// repeated here.
type checkpoint struct {
	position
	// High is the furthest that this stream was ever folded. Seq may lie before it, while the stream is folded again;
	// then what is dropped was counted before.
	High position  `json:"high"`
	Jobs []jobMark `json:"jobs"`
}

// jobMark is one job in a checkpoint.
type jobMark struct {
	ID     string  `json:"id"`
	Length int64   `json:"length"` // bytes of the spool that are on disk
	First  uint64  `json:"first"`  // sequence of the job's first result in this stream; 0: not known
	Drops  dropped `json:"dropped"`
}

// dropped counts results that do not count.
type dropped struct {
	Duplicates int64       `json:"duplicates"`       // their line had ended before
	Wasted     proto.Usage `json:"wasted"`           // usage of these
	Late       int64       `json:"late"`             // they came after the files were final
	LateWasted proto.Usage `json:"late_wasted"`      // usage of these
	Models     losses      `json:"models,omitempty"` // Duplicates and Wasted by model
}

const checkpointMagic = "millrace checkpoint 1 "

// errNoCheckpoint says that there is none, or none that can be read.
var errNoCheckpoint = errors.New("no checkpoint")

// encode renders the checkpoint: a line with a magic and the CRC32C of the rest, then JSON.
func (c *checkpoint) encode() ([]byte, error) {
	body, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode checkpoint: %w", err)
	}
	return append(fmt.Appendf(nil, "%s%08x\n", checkpointMagic, crc32.Checksum(body, castagnoli)), body...), nil
}

// parseCheckpoint reads what encode wrote. Anything else is an error that wraps errNoCheckpoint.
func parseCheckpoint(b []byte) (*checkpoint, error) {
	head, body, ok := bytes.Cut(b, []byte("\n"))
	if !ok || string(head) != fmt.Sprintf("%s%08x", checkpointMagic, crc32.Checksum(body, castagnoli)) {
		return nil, fmt.Errorf("%w: the file is damaged or not a checkpoint", errNoCheckpoint)
	}
	c := new(checkpoint)
	if err := json.Unmarshal(body, c); err != nil {
		return nil, fmt.Errorf("%w: %w", errNoCheckpoint, err)
	}
	for _, j := range c.Jobs {
		if !validID(j.ID) || j.Length < 0 {
			return nil, fmt.Errorf("%w: job %q with a spool of %d bytes", errNoCheckpoint, j.ID, j.Length)
		}
	}
	return c, nil
}

func readCheckpoint(path string) (*checkpoint, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w yet: %w", errNoCheckpoint, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read checkpoint: %w", err)
	}
	return parseCheckpoint(b)
}

// writeCheckpoint replaces the checkpoint: after a crash at any instant the old or the new one is there, whole.
func writeCheckpoint(path string, c *checkpoint) error {
	b, err := c.encode()
	if err != nil {
		return err
	}
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithPermissions(0o644))
	if err != nil {
		return fmt.Errorf("write checkpoint: %w", err)
	}
	defer f.Cleanup() // does nothing after the rename
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("write checkpoint: %w", err)
	}
	broker.CrashPoint("agg.checkpoint-before-rename")
	if err := f.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("write checkpoint: %w", err)
	}
	broker.CrashPoint("agg.checkpoint-after-rename")
	return broker.SyncDir(filepath.Dir(path))
}

// writeDurable replaces a small file of the state.
func writeDurable(path string, b []byte) error {
	dir := filepath.Dir(path)
	if err := renameio.WriteFile(path, b, 0o644, renameio.WithTempDir(dir)); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return broker.SyncDir(dir)
}

// validID says whether id can name a folder and a token of a subject.
func validID(id string) bool {
	if id == "" || len(id) > 200 {
		return false
	}
	for _, c := range []byte(id) {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' {
			continue
		}
		return false
	}
	return true
}
