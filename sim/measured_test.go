package sim

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// row is a measurement: so many requests, inFlight at a time, and what came of it.
type row struct {
	inFlight, lines, prompt, output int

	rate        float64 // output tokens a second
	running     float64 // mean over time; 0: not measured
	preemptions float64
	least       int // tokens of the shortest output; 0: all are of one length
}

// closedLoop runs what a row measured. Requests take the frontend one after another, spacing each, and a client takes
// 20 ms to send the next.
func closedLoop(t *testing.T, cfg Config, r row, spacing time.Duration) Figures {
	t.Helper()
	v, err := NewVirtual(cfg)
	if err != nil {
		t.Fatal(err)
	}
	loop := Loop{Requests: make([]Request, r.lines), InFlight: func() int { return r.inFlight }, Turn: 20 * time.Millisecond, Spacing: spacing}
	random := rand.New(rand.NewPCG(1, 2))
	for i := range loop.Requests {
		loop.Requests[i] = Request{Prompt: r.prompt, Output: r.output}
		if r.least > 0 {
			loop.Requests[i].Output = r.least + random.IntN(r.output-r.least+1)
		}
	}
	return loop.Run(v)
}

// The engines that were measured, in vLLM 0.26.0 with random weights. Gemma 3 slides a window of 1,024 tokens over
// five layers of six. Times are fitted to the rates; everything else follows from the rules of the scheduler.
func gemmaH100() Config {
	return Config{KVTokens: 473807, MaxNumSeqs: 1024, MaxBatchedTokens: 8192, SlidingWindow: 1024, SlidingLayers: 5,
		StepTime: 3000 * time.Microsecond, DecodeTime: 55 * time.Microsecond, PrefillTime: 20 * time.Microsecond}
}

func gemmaH200() Config { // with the KV cache of a card of 16 GB
	return Config{KVTokens: 11816, MaxNumSeqs: 256, MaxBatchedTokens: 2048, SlidingWindow: 1024, SlidingLayers: 5,
		StepTime: 3100 * time.Microsecond, DecodeTime: 60 * time.Microsecond, PrefillTime: 28 * time.Microsecond}
}

func gemmaWholeH200() Config {
	return Config{KVTokens: 895506, MaxNumSeqs: 1024, MaxBatchedTokens: 8192, SlidingWindow: 1024, SlidingLayers: 5,
		StepTime: 3000 * time.Microsecond, DecodeTime: 56 * time.Microsecond, PrefillTime: 12 * time.Microsecond,
		GraphTokens: 512, EagerTime: 15 * time.Millisecond}
}

func gemma80H200() Config {
	c := gemmaWholeH200()
	c.KVTokens = 462893
	return c
}

func llamaH200() Config { // 1B: a core of the processor is the limit, not the card
	return Config{KVTokens: 4112864, MaxNumSeqs: 1024, MaxBatchedTokens: 8192,
		StepTime: 1500 * time.Microsecond, DecodeTime: 30 * time.Microsecond, PrefillTime: 2 * time.Microsecond}
}

// TestMeasured holds the engine against measurements, within 10 % each: output tokens a second, mean running, and
// pre-emptions (within 10 % or two of them). Two runs of one row, where there were two, are one row with their mean.
// The measurements of one table differ among themselves by up to 7 %.
func TestMeasured(t *testing.T) {
	for _, m := range []struct {
		name    string
		cfg     Config
		spacing time.Duration
		most    int // running at once, in the last row
		rows    []row
	}{
		{"Gemma 3 4B on an H100", gemmaH100(), 2 * time.Millisecond, 573, []row{
			{384, 1500, 788, 308, 9253, 358, 0, 0},
			{437, 1500, 788, 308, 9298, 408, 0, 0},
			{512, 1500, 788, 308, 8778, 449, 164, 0},
			{1024, 1500, 788, 308, 7687, 455, 240, 0},
		}},
		{"Gemma 3 4B on an H200, KV of 16 GB", gemmaH200(), 2 * time.Millisecond, 14, []row{
			{8, 72, 788, 308, 1839, 7.8, 0, 0},
			{10, 80, 788, 308, 2139, 9.6, 0, 0},
			{11, 88, 788, 308, 2384, 10.4, 0, 0},
			{12, 93, 788, 308, 2427, 10.6, 7, 0},
			{13, 96, 788, 308, 2414, 11.7, 20, 0},
			{16, 100, 788, 308, 2282, 11.4, 29, 0},
			{16, 188, 788, 308, 2494, 11.4, 51, 0},
			{64, 232, 788, 308, 2355, 11.1, 66, 0},
			{256, 425, 788, 308, 2415, 11.6, 119, 0},
		}},
		{"Gemma 3 4B on an H200, KV of 16 GB, short", gemmaH200(), 2 * time.Millisecond, 36, []row{
			{256, 911, 308, 121, 4184, 28.8, 246, 0},
		}},
		{"Gemma 3 4B on an H200, KV of 80 GB", gemma80H200(), 2 * time.Millisecond, 460, []row{ // of the next one
			{384, 1500, 788, 308, 10428, 0, 0, 0},
			{437, 1500, 788, 308, 10174, 0, 0, 0},
			{437, 1500, 788, 600, 8218, 0, 0, 50},
			{460, 1500, 788, 308, 10289, 0, 48, 0},
		}},
		{"Gemma 3 4B on an H200", gemmaWholeH200(), 2 * time.Millisecond, 824, []row{
			{824, 3000, 788, 308, 8602, 0, 0, 0},
		}},
		{"Llama 3.2 1B on an H200", llamaH200(), 3900 * time.Microsecond, 0, []row{ // frontend CPU per request
			{64, 4000, 308, 121, 16360, 0, 0, 0},
			{256, 6000, 308, 121, 23849, 0, 0, 0},
			{1024, 8000, 308, 121, 28694, 0, 0, 0},
		}},
	} {
		for i, r := range m.rows {
			got := closedLoop(t, m.cfg, r, m.spacing)
			rate, running := got.Rate/r.rate-1, 0.0
			if r.running > 0 {
				running = got.Running/r.running - 1
			}
			t.Logf("%s, %d in flight: %+.1f %% tokens a second, %+.1f %% running, %d pre-emptions for %.0f", m.name, r.inFlight,
				100*rate, 100*running, got.Preemptions, r.preemptions)
			if math.Abs(rate) > 0.1 || math.Abs(running) > 0.1 || math.Abs(float64(got.Preemptions)-r.preemptions) > max(2, 0.1*r.preemptions) {
				t.Errorf("%s: %+v, measured %+v", m.name, got, r)
			}
			if i == len(m.rows)-1 && m.most > 0 && (got.MostRunning < m.most-1 || got.MostRunning > m.most+1) {
				t.Errorf("%s: %d ran at once, measured %d", m.name, got.MostRunning, m.most)
			}
		}
	}
}
