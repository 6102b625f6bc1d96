package vllm_test

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"millrace/vllm"
)

func TestFlags(t *testing.T) {
	f := vllm.Flags{"-tp", "2", "--pipeline_parallel_size=3", "--served-model-name", "a", "b", "--port", "9000", "--enforce-eager"}
	if err := f.Check(); err != nil {
		t.Error(err)
	}
	if n, err := f.GPUs(); n != 6 || err != nil {
		t.Errorf("%d GPUs, %v", n, err)
	}
	if n, err := f.Port(); n != 9000 || err != nil {
		t.Errorf("port %d, %v", n, err)
	}
	if got := f.Names("m"); !reflect.DeepEqual(got, []string{"a", "b"}) {
		t.Errorf("names %q", got)
	}
	s := vllm.Server{Model: "m", Flags: f, Port: 9001}
	want := "vllm serve m -tp 2 --pipeline_parallel_size=3 --served-model-name a b --enforce-eager --disable-uvicorn-access-log --host 127.0.0.1 --port 9001"
	if got := strings.Join(s.CommandLine(), " "); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := (vllm.Flags{"--port=9000", "-x"}); strings.Join((&vllm.Server{Model: "m", Flags: got, Port: 1}).CommandLine(), " ") != "vllm serve m -x --disable-uvicorn-access-log --host 127.0.0.1 --port 1" {
		t.Error("--port=9000 is given twice")
	}
	if got := (vllm.Flags{"--max-model-len", "9"}).Names("org/m"); !reflect.DeepEqual(got, []string{"org/m"}) {
		t.Errorf("names %q", got)
	}
	if got := strings.Join(vllm.Flags{"--hf-token", "secret", "--port", "1", "--hf_token=secret", "--seed", "1"}.Shown(), " "); got != "--hf-token xxxxx --hf_token=xxxxx --seed 1" {
		t.Errorf("shown are %s", got)
	}
	if got := (vllm.Flags{"--lora-modules", "a=b"}).Names("m"); got != nil {
		t.Errorf("names %q, nobody can tell", got)
	}
}

func TestFlagsRefused(t *testing.T) {
	for _, c := range []struct {
		flags vllm.Flags
		has   string
	}{
		{vllm.Flags{"--host", "0.0.0.0"}, "127.0.0.1"},
		{vllm.Flags{"--api_key=x"}, "--engine-api-key"},
		{vllm.Flags{"--model", "x"}, "--vllm"},
		{vllm.Flags{"--config", "x.yaml"}, "give its flags behind --"},
		{vllm.Flags{"--config=x.yaml"}, "give its flags behind --"},
		{vllm.Flags{"--port", "x"}, `"x"`},
		{vllm.Flags{"--port=0"}, `"0"`},
		{vllm.Flags{"other/model"}, "--vllm"},
	} {
		if err := c.flags.Check(); err == nil || !strings.Contains(err.Error(), c.has) {
			t.Errorf("%q: %v", c.flags, err)
		}
	}
	for _, f := range []vllm.Flags{{"-tp", "x"}, {"--tensor-parallel-size"}, {"-dp=0"}} {
		if _, err := f.GPUs(); err == nil {
			t.Errorf("%q is taken", f)
		}
	}
}

func TestGPUs(t *testing.T) {
	t.Setenv("CUDA_VISIBLE_DEVICES", "")
	t.Setenv("CUDA_DEVICE_ORDER", "")
	if _, _, err := vllm.GPUs("all", 1); err == nil || !strings.Contains(err.Error(), "hides all GPUs") {
		t.Errorf("all of none: %v", err)
	}
	os.Unsetenv("CUDA_VISIBLE_DEVICES") // until the end of the test
	byBus := true
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	smi := func(script string) {
		if err := os.WriteFile(filepath.Join(bin, "nvidia-smi"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	is := func(what string, each int, want [][]string) {
		t.Helper()
		if got, bus, err := vllm.GPUs(what, each); err != nil || !reflect.DeepEqual(got, want) || bus != byBus {
			t.Errorf("%s by %d: %q, by bus %v, %v; want %q, %v", what, each, got, bus, err, want, byBus)
		}
	}
	not := func(what string, each int, has string) {
		t.Helper()
		if got, _, err := vllm.GPUs(what, each); err == nil || !strings.Contains(err.Error(), has) {
			t.Errorf("%s by %d: %q, %v; want %s", what, each, got, err, has)
		}
	}
	not("all", 1, "no nvidia-smi")
	smi("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'; echo '  MIG 1g.10gb Device 0: (UUID: MIG-1)'; echo 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)'")
	is("all", 1, [][]string{{"0"}, {"1"}})
	is("all", 2, [][]string{{"0", "1"}})
	smi("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9")
	not("all", 1, "could not communicate")
	smi("true")
	not("all", 1, "lists no GPU")
	is("0, 3,5,6", 2, [][]string{{"0", "3"}, {"5", "6"}})
	not("0,1,2", 2, "multiple")
	not("0,0", 1, "twice")
	smi("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a1)'; echo '  MIG 1g.10gb Device 0: (UUID: MIG-b1)'; echo 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-c1)'")
	is("0,1", 1, [][]string{{"0"}, {"1"}})
	is("1,GPU-a,MIG-b1", 1, [][]string{{"1"}, {"GPU-a"}, {"MIG-b1"}})
	not("0,7", 1, "--gpus names 7, which this machine does not have; nvidia-smi lists 0,1")
	not("0,GPU-d1", 1, "--gpus names GPU-d1, which this machine does not have; nvidia-smi lists GPU-a1,MIG-b1,GPU-c1")
	not("some", 1, "must be all")
	not("", 1, "must be all")
	byBus = false // the numbers are as who set it counts
	t.Setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8a5f12de-0000-1111-2222-333344445555")
	is("all", 1, [][]string{{"2"}, {"GPU-8a5f12de-0000-1111-2222-333344445555"}})
	byBus = true
	t.Setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
	is("all", 1, [][]string{{"2"}, {"GPU-8a5f12de-0000-1111-2222-333344445555"}})
}

// TestDevices: which GPUs of the machine a server has is told where its numbers are those of the machine.
func TestDevices(t *testing.T) {
	for _, c := range []struct {
		gpus  []string
		byBus bool
		want  []string
	}{
		{nil, true, nil},
		{[]string{"1"}, true, []string{"1"}},
		{[]string{"1"}, false, nil},
		{[]string{"GPU-1", "GPU-2"}, false, []string{"GPU-1", "GPU-2"}},
		{[]string{"GPU-1", "2"}, false, nil},
	} {
		if got := (&vllm.Server{GPUs: c.gpus, ByBus: c.byBus}).Devices(); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q, by bus %v: %q, want %q", c.gpus, c.byBus, got, c.want)
		}
	}
}
