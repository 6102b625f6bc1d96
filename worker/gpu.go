package worker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"millrace/proto"
)

// GPUs is what nvidia-smi says of the GPUs of this machine. Its zero value knows none yet. The workers of a process share
// one, so that it runs once for all of them. All methods may be called from any goroutine.
type GPUs struct {
	turn sync.Mutex                                             // one run of nvidia-smi at a time
	left chan smiSaid                                           // what a run that was left behind will say; nil: none was
	smi  func(ctx context.Context, path string) ([]byte, error) // nil: runSMI

	mu   sync.Mutex
	seen []proto.GPU
	at   time.Time // when they were seen
}

const (
	gpuEvery   = 10 * time.Second
	gpuTimeout = 5 * time.Second
	gpuStale   = 3 * gpuEvery // what was seen before says nothing of now
)

// errNoSMI says that there is no nvidia-smi on this machine.
var errNoSMI = errors.New("no nvidia-smi")

// smiSaid is what a run of nvidia-smi came to.
type smiSaid struct {
	text []byte
	err  error
}

// look runs nvidia-smi, unless it was run a moment ago, or an earlier run still hangs.
func (g *GPUs) look(ctx context.Context) error {
	g.turn.Lock()
	defer g.turn.Unlock()
	g.mu.Lock()
	young := time.Since(g.at) < gpuEvery/2
	g.mu.Unlock()
	if young {
		return nil
	}
	seen, err := g.read(ctx)
	if err != nil {
		return err
	}
	g.mu.Lock()
	g.seen, g.at = seen, time.Now()
	g.mu.Unlock()
	return nil
}

// now returns what was seen of late; nil: nothing is known.
func (g *GPUs) now() []proto.GPU {
	g.mu.Lock()
	defer g.mu.Unlock()
	if time.Since(g.at) > gpuStale {
		return nil
	}
	return g.seen
}

// watch looks again and again until ctx ends, or it turns out that there is nothing to look with. It calls first when it
// has seen something for the first time.
func (g *GPUs) watch(ctx context.Context, first func()) {
	for ctx.Err() == nil {
		err := g.look(ctx)
		if errors.Is(err, errNoSMI) {
			return
		}
		if err == nil && first != nil {
			first()
			first = nil
		}
		wait(ctx, gpuEvery)
	}
}

// errHangs says that a run of nvidia-smi has not ended though it was killed.
var errHangs = errors.New("nvidia-smi hangs")

// read runs nvidia-smi. With a driver that hangs, a process may not even be killed: it is left behind then, and no other is
// started until it has gone.
func (g *GPUs) read(ctx context.Context) ([]proto.GPU, error) {
	path, err := exec.LookPath("nvidia-smi")
	if err != nil {
		return nil, errNoSMI
	}
	if g.left != nil {
		select {
		case <-g.left:
			g.left = nil
		default:
			return nil, errHangs
		}
	}
	ctx, cancel := context.WithTimeout(ctx, gpuTimeout)
	defer cancel()
	run, out := g.smi, make(chan smiSaid, 1)
	if run == nil {
		run = runSMI
	}
	go func() {
		text, err := run(ctx, path)
		out <- smiSaid{text, err}
	}()
	select {
	case s := <-out:
		if s.err != nil {
			return nil, fmt.Errorf("run nvidia-smi: %w", cmp.Or(context.Cause(ctx), s.err))
		}
		return parseGPUs(string(s.text)), nil
	case <-ctx.Done():
		select {
		case <-out: // it was killed
		case <-time.After(2 * time.Second):
			g.left = out
		}
		return nil, context.Cause(ctx)
	}
}

// runSMI runs it until it ends, or ctx does.
func runSMI(ctx context.Context, path string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path, "--query-gpu=index,uuid,name,memory.used,memory.total,power.draw,utilization.gpu", "--format=csv,noheader,nounits")
	cmd.WaitDelay = time.Second
	return cmd.Output()
}

// parseGPUs reads a line for each GPU. A value that is not there stands as [N/A], [Not Supported] or [Unknown Error].
func parseGPUs(text string) (out []proto.GPU) {
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSpace(line), ", ")
		if len(f) != 7 {
			continue
		}
		number := func(i int, unit float64) float64 {
			v, err := strconv.ParseFloat(f[i], 64)
			if err != nil {
				return -1
			}
			return v * unit
		}
		out = append(out, proto.GPU{
			Index: f[0], UUID: f[1], Name: f[2], MemoryUsed: int64(number(3, 1<<20)), MemoryTotal: int64(number(4, 1<<20)),
			Power: number(5, 1), Utilization: number(6, 0.01),
		})
	}
	return out
}

var (
	gpuLabels = []string{"gpu", "uuid"}
	gpuDescs  = []*prometheus.Desc{
		prometheus.NewDesc("millrace_gpu_memory_used_bytes", "Memory in use on a GPU of this machine, as nvidia-smi says.", gpuLabels, nil),
		prometheus.NewDesc("millrace_gpu_memory_total_bytes", "Memory of a GPU of this machine, as nvidia-smi says.", gpuLabels, nil),
		prometheus.NewDesc("millrace_gpu_power_watts", "Power that a GPU of this machine draws, as nvidia-smi says.", gpuLabels, nil),
		prometheus.NewDesc("millrace_gpu_utilization_ratio", "Share of the last sample period in which any kernel ran on a GPU of this machine, as nvidia-smi says.", gpuLabels, nil),
	}
)

// Describe is part of prometheus.Collector.
func (g *GPUs) Describe(to chan<- *prometheus.Desc) {
	for _, d := range gpuDescs {
		to <- d
	}
}

// Collect is part of prometheus.Collector. What is not known has no sample.
func (g *GPUs) Collect(to chan<- prometheus.Metric) {
	for _, v := range g.now() {
		for i, n := range []float64{float64(v.MemoryUsed), float64(v.MemoryTotal), v.Power, v.Utilization} {
			if n >= 0 {
				to <- prometheus.MustNewConstMetric(gpuDescs[i], prometheus.GaugeValue, n, v.Index, v.UUID)
			}
		}
	}
}

// here says whether an engine has a loopback address: it is on this machine, unless a tunnel leads to another from there.
func here(engine string) bool {
	u, err := url.Parse(engine)
	if err != nil {
		return false
	}
	if u.Hostname() == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(u.Hostname())
	return err == nil && a.IsLoopback()
}

// among picks the GPUs with these numbers or UUIDs; a UUID may be cut short, as in CUDA_VISIBLE_DEVICES.
func among(all []proto.GPU, devices []string) (out []proto.GPU) {
	for _, g := range all {
		if slices.ContainsFunc(devices, func(d string) bool {
			return d == g.Index || strings.HasPrefix(d, "GPU-") && strings.HasPrefix(g.UUID, d)
		}) {
			out = append(out, g)
		}
	}
	return out
}
