package broker

import (
	"log/slog"
	"strings"
	"testing"
)

// TestServerLog: what nats-server says of an index that it makes anew, or of a slow moment, is a detail; what it cannot mend is a warning.
func TestServerLog(t *testing.T) {
	for text, warns := range map[string]bool{
		"Filestore [RES] Stream state outdated, last block has additional entries, will rebuild": false,
		"Filestore [RES] Recovering stream state from index errored: prior state file":           false,
		"Filestore [RES] Recovering stream state from index errored: permission denied":          true,
		`Internal subscription on "$JS.API.>" took too long: 2.1s`:                               false,
		"Filestore [RES] loadBlock error: gone":                                                  true,
		"JetStream is full":                                                                      true,
	} {
		for level, says := range map[slog.Level]bool{slog.LevelWarn: warns, slog.LevelDebug: true} {
			var said strings.Builder
			s := &Server{Log: slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: level}))}
			serverLog{s: s}.Warnf("%s", text)
			if got := strings.Contains(said.String(), text[len(text)-8:]); got != says {
				t.Errorf("%v, %q: said %v, want %v", level, text, got, says)
			}
		}
	}
}
