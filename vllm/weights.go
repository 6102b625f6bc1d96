package vllm

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
)

// weights is how many bytes the files of the model's weights have on this machine, and whether that is known: else there are
// none yet, or they are elsewhere. 0 and known: they are random, as for a benchmark, and no file says how large.
func (s *Server) weights() (bytes int64, known bool) {
	if format, _ := s.Flags.last("--load-format"); format == "dummy" {
		return weightsIn(s.Model), true
	}
	if info, err := os.Stat(s.Model); err == nil && !info.IsDir() {
		return info.Size(), true
	} else if err == nil {
		bytes = weightsIn(s.Model)
		return bytes, bytes > 0
	}
	for _, dir := range s.snapshots() {
		bytes = max(bytes, weightsIn(dir))
	}
	return bytes, bytes > 0
}

const config = "config.json" // of a model

// snapshots are the folders of a model that has a name.
func (s *Server) snapshots() []string {
	hub, ok := s.Flags.last("--download-dir")
	if !ok {
		hub = hubCache()
	}
	dirs, _ := filepath.Glob(filepath.Join(hub, "models--"+strings.ReplaceAll(s.Model, "/", "--"), "snapshots", "*")) // a name that is no pattern has none
	return dirs
}

// configured says whether the model's configuration on this machine has one of these texts.
func (s *Server) configured(texts ...string) bool {
	return slices.ContainsFunc(append(s.snapshots(), s.Model), func(dir string) bool {
		text, _ := os.ReadFile(filepath.Join(dir, config)) // where there is none nothing is known of that
		return slices.ContainsFunc(texts, func(t string) bool { return strings.Contains(string(text), t) })
	})
}

// hubCache is where huggingface_hub keeps models that have a name (constants.py, file_download.py).
func hubCache() string {
	home, _ := os.UserHomeDir() // without one there is nothing in it
	for _, c := range []struct{ variable, below string }{{"HF_HUB_CACHE", ""}, {"HUGGINGFACE_HUB_CACHE", ""}, {"HF_HOME", "hub"}, {"XDG_CACHE_HOME", "huggingface/hub"}} {
		if dir := os.Getenv(c.variable); dir != "" {
			return filepath.Join(dir, c.below)
		}
	}
	return filepath.Join(home, ".cache", "huggingface", "hub")
}

// weightsIn is how many bytes the files of weights in a folder have, those that an index names and that are not there yet among them.
func weightsIn(dir string) (bytes int64) {
	files, _ := os.ReadDir(dir) // nothing is known of what cannot be read
	var whole int64
	for _, f := range files {
		name := filepath.Join(dir, f.Name())
		if strings.HasSuffix(f.Name(), ".index.json") {
			whole = max(whole, totalSize(name))
		}
		if !slices.Contains([]string{".safetensors", ".bin", ".pt", ".gguf"}, filepath.Ext(f.Name())) {
			continue
		}
		if info, err := os.Stat(name); err == nil { // a link leads to it
			bytes += info.Size()
		}
	}
	return max(bytes, whole)
}

// totalSize is what an index of weights says of their size, as transformers writes it (modeling_utils.py, save_pretrained).
func totalSize(name string) int64 {
	var index struct {
		Metadata struct {
			TotalSize float64 `json:"total_size"`
		} `json:"metadata"`
	}
	text, _ := os.ReadFile(name) // then the files alone say it
	_ = json.Unmarshal(text, &index)
	return int64(index.Metadata.TotalSize)
}
