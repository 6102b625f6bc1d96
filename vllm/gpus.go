package vllm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// GPUs lists the GPUs that are meant by all, or by numbers (or UUIDs) with commas, grouped for engines that take each of
// them: {"0","1"}, {"2","3"}. All are those of CUDA_VISIBLE_DEVICES where that is set, else those that nvidia-smi lists.
// byBus says that numbers are those of nvidia-smi, which counts by the bus.
func GPUs(what string, each int) (groups [][]string, byBus bool, err error) {
	ids, byBus, err := gpuIDs(what)
	if err != nil {
		return nil, false, err
	}
	if len(ids)%each != 0 {
		return nil, false, fmt.Errorf("--gpus names %d, and each engine takes %d of them (--tensor-parallel-size and the like, behind --); give a multiple of it", len(ids), each)
	}
	for ; len(ids) > 0; ids = ids[each:] {
		groups = append(groups, ids[:each:each])
	}
	return groups, byBus, nil
}

func gpuIDs(what string) (ids []string, byBus bool, err error) {
	from, byBus := "--gpus", true
	if what == "all" {
		v, set := os.LookupEnv("CUDA_VISIBLE_DEVICES")
		if !set {
			ids, _, err = listed()
			return ids, true, err
		}
		if strings.TrimSpace(v) == "" {
			return nil, false, errors.New("--gpus all: CUDA_VISIBLE_DEVICES is empty, which hides all GPUs; unset it, or give --gpus numbers such as 0,1")
		}
		from, what, byBus = "CUDA_VISIBLE_DEVICES", v, os.Getenv("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" // its numbers are as who set it counts
	}
	seen := map[string]bool{}
	for id := range strings.SplitSeq(what, ",") {
		id = strings.TrimSpace(id)
		if !gpuID.MatchString(id) {
			return nil, false, fmt.Errorf("%s is %q, must be all, or numbers of GPUs such as 0 or 0,1", from, what)
		}
		if seen[id] {
			return nil, false, fmt.Errorf("%s is %q, names GPU %s twice", from, what, id)
		}
		seen[id] = true
		ids = append(ids, id)
	}
	if from == "--gpus" {
		err = there(ids)
	}
	return ids, byBus, err
}

var (
	gpuID   = regexp.MustCompile(`^(\d+|(GPU|MIG)-[0-9a-fA-F-]+)$`)
	gpuLine = regexp.MustCompile(`(?m)^GPU (\d+): `)
	gpuUUID = regexp.MustCompile(`\(UUID: ([^)]+)\)`)
)

// there refuses GPUs that nvidia-smi does not list. Where it lists none, or does not answer, nobody knows what is there.
func there(ids []string) error {
	numbers, uuids, err := listed()
	if err != nil {
		return nil
	}
	for _, id := range ids {
		have, is := uuids, strings.HasPrefix // CUDA takes the beginning of one, too
		if id[0] >= '0' && id[0] <= '9' {
			have, is = numbers, func(number, id string) bool { return number == id }
		}
		if !slices.ContainsFunc(have, func(one string) bool { return is(one, id) }) {
			return fmt.Errorf("--gpus names %s, which this machine does not have; nvidia-smi lists %s", id, strings.Join(have, ","))
		}
	}
	return nil
}

// listed asks nvidia-smi for numbers, and for UUIDs, of parts of GPUs too. The error is what --gpus all says.
func listed() (numbers, uuids []string, err error) {
	const most = 30 * time.Second // it wakes the driver where nobody has
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	const instead = "; give --gpus numbers such as 0,1, or leave it out"
	cmd := exec.CommandContext(ctx, "nvidia-smi", "-L")
	cmd.WaitDelay = time.Second // whoever it started may hold its output
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, nil, errors.New("--gpus all: there is no nvidia-smi on this machine to list GPUs" + instead)
	}
	if ctx.Err() != nil {
		return nil, nil, fmt.Errorf("--gpus all: nvidia-smi -L did not answer in %s; the driver may hang%s", short(most), instead)
	}
	if err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return nil, nil, fmt.Errorf("--gpus all: nvidia-smi -L: %w: %s%s", err, first, instead)
	}
	second := func(re *regexp.Regexp) (all []string) {
		for _, m := range re.FindAllStringSubmatch(string(out), -1) {
			all = append(all, m[1])
		}
		return all
	}
	if numbers = second(gpuLine); len(numbers) == 0 {
		return nil, nil, errors.New("--gpus all: nvidia-smi lists no GPU" + instead)
	}
	return numbers, second(gpuUUID), nil
}

// Card is what is known of GPUs.
type Card struct {
	Memory int64 // in bytes, of the smallest; 0: nobody knows
	Count  int   // how many there are
	A100   bool  // one of them is an A100
	Alone  bool  // one of them is not known to take several processes
}

// Cards asks nvidia-smi for some GPUs, as it numbers and names them; nil: all of this machine. Of one that is cut into parts (MIG)
// it does not say what a part has, so then nothing is known.
func Cards(ids []string) (c Card) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	args := []string{"--query-gpu=memory.total,compute_mode,mig.mode.current,name", "--format=csv,noheader,nounits"}
	if ids != nil {
		args = append(args, "-i", strings.Join(ids, ","))
	}
	cmd := exec.CommandContext(ctx, "nvidia-smi", args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return Card{}
	}
	for l := range strings.Lines(string(out)) {
		f := strings.SplitN(strings.TrimSpace(l), ", ", 4)
		if len(f) < 4 || f[2] == "Enabled" {
			return Card{}
		}
		mib, err := strconv.ParseInt(f[0], 10, 64)
		if err != nil {
			return Card{}
		}
		if c.Memory == 0 || mib<<20 < c.Memory {
			c.Memory = mib << 20
		}
		c.A100 = c.A100 || strings.Contains(f[3], "A100")
		c.Alone = c.Alone || f[1] != "Default"
		c.Count++
	}
	return c
}
