package proto

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/nats-io/nats.go/jetstream"
)

// TestSchema: settings change only with their number. Two versions that want different settings under one number would
// undo each other's at every start.
func TestSchema(t *testing.T) {
	got, err := json.MarshalIndent(struct {
		Requests jetstream.StreamConfig
		Lane     jetstream.ConsumerConfig
		Results  jetstream.StreamConfig
		Buckets  []jetstream.KeyValueConfig
		Inputs   jetstream.ObjectStoreConfig
	}{
		RequestStreamConfig("m", 0), ConsumerConfig("m", LaneNormal, DefaultAckWait), ResultStreamConfig(0),
		[]jetstream.KeyValueConfig{JobsConfig(), WorkersConfig()}, InputsConfig(),
	}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join("testdata", "schema-"+Schema+".json")
	if *update {
		if err := os.WriteFile(name, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatalf("%v; write it with -update", err)
	}
	if string(got)+"\n" != string(want) {
		t.Errorf("the settings are not those of schema %s: count Schema up, and write %s with -update", Schema, name)
	}
}
