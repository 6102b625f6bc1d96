package vllm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// GPUs lists the GPUs that are meant by all, or by numbers (or UUIDs) with commas, grouped for engines that take each of
// them: {"0","1"}, {"2","3"}. All are those of CUDA_VISIBLE_DEVICES where that is set, else those that nvidia-smi lists.
func GPUs(what string, each int) ([][]string, error) {
	ids, err := gpuIDs(what)
	if err != nil {
		return nil, err
	}
	if len(ids)%each != 0 {
		return nil, fmt.Errorf("--gpus names %d, and each engine takes %d of them (--tensor-parallel-size and the like, behind --); give a multiple of it", len(ids), each)
	}
	var out [][]string
	for ; len(ids) > 0; ids = ids[each:] {
		out = append(out, ids[:each:each])
	}
	return out, nil
}

func gpuIDs(what string) ([]string, error) {
	if what == "all" {
		if v := os.Getenv("CUDA_VISIBLE_DEVICES"); v != "" {
			what = v
		} else {
			return listed()
		}
	}
	seen := map[string]bool{}
	var ids []string
	for id := range strings.SplitSeq(what, ",") {
		id = strings.TrimSpace(id)
		if !gpuID.MatchString(id) {
			return nil, fmt.Errorf("--gpus is %q, must be all, or numbers of GPUs such as 0 or 0,1", what)
		}
		if seen[id] {
			return nil, fmt.Errorf("--gpus is %q, names GPU %s twice", what, id)
		}
		seen[id] = true
		ids = append(ids, id)
	}
	return ids, nil
}

var (
	gpuID   = regexp.MustCompile(`^(\d+|(GPU|MIG)-[0-9a-fA-F-]+)$`)
	gpuLine = regexp.MustCompile(`(?m)^GPU (\d+): `)
)

// listed asks nvidia-smi.
func listed() ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second) // it wakes the driver where nobody has
	defer cancel()
	const instead = "; give --gpus numbers such as 0,1, or leave it out"
	out, err := exec.CommandContext(ctx, "nvidia-smi", "-L").CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, errors.New("--gpus all: there is no nvidia-smi on this machine to list GPUs" + instead)
	}
	if err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return nil, fmt.Errorf("--gpus all: nvidia-smi -L: %w: %s%s", err, first, instead)
	}
	var ids []string
	for _, m := range gpuLine.FindAllStringSubmatch(string(out), -1) {
		ids = append(ids, m[1])
	}
	if len(ids) == 0 {
		return nil, errors.New("--gpus all: nvidia-smi lists no GPU" + instead)
	}
	return ids, nil
}
