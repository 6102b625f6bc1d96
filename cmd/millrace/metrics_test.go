package main

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestProfilesAreAskedFor: profiles are served where --pprof asks for them, and nowhere else.
func TestProfilesAreAskedFor(t *testing.T) {
	get := func(profiles bool, path string) int {
		rec := httptest.NewRecorder()
		watched(prometheus.NewRegistry(), profiles).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		return rec.Code
	}
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap"} {
		if got := get(true, path); got != http.StatusOK {
			t.Errorf("%s with --pprof answers %d", path, got)
		}
		if got := get(false, path); got != http.StatusNotFound {
			t.Errorf("%s without --pprof answers %d", path, got)
		}
	}
	if got := get(false, "/metrics"); got != http.StatusOK {
		t.Errorf("/metrics answers %d", got)
	}
}
