package aggregator

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"millrace/proto"
)

// Verdicts of a manifest. They speak of conservation alone: every line of the input is in the output or in the error
// file, once.
const (
	Valid   = "VALID"
	Invalid = "INVALID"
)

// Manifest is what is known of a finished job and its files. It is made from the results and the files alone, so that
// writing it again makes the same bytes.
type Manifest struct {
	Schema   int          `json:"schema"` // 1
	Millrace string       `json:"millrace"`
	Verdict  string       `json:"verdict"`
	Valid    bool         `json:"valid"`
	Reasons  []string     `json:"reasons,omitempty"` // why not
	Notes    []string     `json:"notes,omitempty"`   // what is odd and does not touch the verdict
	Job      ManifestJob  `json:"job"`
	Input    Input        `json:"input"`
	Counts   Counts       `json:"counts"`
	Files    ManifestPair `json:"files"`
	// Times are the broker's.
	FirstResult *time.Time  `json:"first_result"`
	LastResult  *time.Time  `json:"last_result"`
	Statistics  *Statistics `json:"statistics"`
	Engines     []Engine    `json:"engines"`
}

// ManifestJob names the job.
type ManifestJob struct {
	ID       string `json:"id"`
	Name     string `json:"name,omitempty"`
	Override string `json:"model_override,omitempty"`
	Again    int64  `json:"again,omitempty"`
}

// Input is the input as its owner described it.
type Input struct {
	Path    string `json:"path"`
	Host    string `json:"host,omitempty"`
	SHA256  string `json:"sha256"` // of its lines, decompressed
	Bytes   int64  `json:"bytes"`
	Lines   int64  `json:"lines"`
	Invalid int64  `json:"invalid"` // lines that were let through as errors
}

// Counts are numbers of lines.
type Counts struct {
	OK      int64        `json:"ok"`
	Failed  int64        `json:"failed"`
	ByModel []ModelCount `json:"by_model"`
}

// ModelCount are the lines of a model.
type ModelCount struct {
	Model  string `json:"model"`
	OK     int64  `json:"ok"`
	Failed int64  `json:"failed"`
}

// ManifestPair are the two files.
type ManifestPair struct {
	Output FileFacts `json:"output"`
	Errors FileFacts `json:"errors"`
}

// FileFacts describe a file. Tokens are the sums of the usage in its lines' bodies.
type FileFacts struct {
	Name             string `json:"name"` // relative to the manifest's folder, where that is possible
	Lines            int64  `json:"lines"`
	Bytes            int64  `json:"bytes"`
	SHA256           string `json:"sha256"`
	NullIDs          int64  `json:"null_custom_ids"` // lines whose custom_id is not usable, or not known; see proto.AppendLine
	PromptTokens     int64  `json:"prompt_tokens"`
	CompletionTokens int64  `json:"completion_tokens"`
	WithoutUsage     int64  `json:"without_usage"` // lines whose body holds no usage
}

// newManifest describes a job, but for its files and the verdict.
func newManifest(program string, spec *proto.Job, s *Statistics) *Manifest {
	m := &Manifest{
		Schema: 1, Millrace: program, Statistics: s, Engines: []Engine{},
		Job:    ManifestJob{ID: spec.ID, Name: spec.Name, Override: spec.Override, Again: spec.Again},
		Input:  Input{Path: spec.Input, Host: spec.Host, SHA256: spec.SHA256, Bytes: spec.Bytes, Lines: spec.Lines, Invalid: spec.Invalid},
		Counts: Counts{OK: s.Completed, Failed: s.Failed, ByModel: []ModelCount{}},
	}
	for _, v := range s.ByModel {
		m.Counts.ByModel = append(m.Counts.ByModel, ModelCount{v.Model, v.Completed, v.Failed})
	}
	return m
}

// judge sets the verdict.
func (m *Manifest) judge(reasons []string) {
	m.Reasons, m.Valid, m.Verdict = reasons, len(reasons) == 0, Invalid
	if m.Valid {
		m.Verdict = Valid
	}
}

func (m *Manifest) encode() ([]byte, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	return append(b, '\n'), nil
}

// ErrNoManifest is returned for what is none.
var ErrNoManifest = errors.New("it is no manifest of a job")

// ReadManifest reads a manifest.
func ReadManifest(path string) (*Manifest, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	m, err := ParseManifest(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return m, nil
}

// ParseManifest reads the text of a manifest.
func ParseManifest(b []byte) (*Manifest, error) {
	m := new(Manifest)
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%w (%w)", ErrNoManifest, err)
	}
	if m.Schema > 1 {
		return nil, fmt.Errorf("it is a manifest of a newer millrace, with schema %d; use that one to read it", m.Schema)
	}
	if m.Schema != 1 || m.Statistics == nil {
		return nil, ErrNoManifest
	}
	return m, nil
}

// relative names file as seen from the folder of the manifest.
func relative(manifest, file string) string {
	if r, err := filepath.Rel(filepath.Dir(manifest), file); err == nil {
		return filepath.ToSlash(r)
	}
	return file
}

// beside undoes relative.
func beside(manifest, name string) string {
	name = filepath.FromSlash(name)
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(manifest), name)
}

func sortBy[T any](s []T, key func(T) string) {
	slices.SortFunc(s, func(a, b T) int {
		switch ka, kb := key(a), key(b); {
		case ka < kb:
			return -1
		case ka > kb:
			return 1
		}
		return 0
	})
}
