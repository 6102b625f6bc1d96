package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"

	"millrace/broker"
)

func (a *app) metricsFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&a.metrics, "metrics-addr", "", "serve Prometheus metrics at `HOST:PORT`/metrics (default: nowhere)")
	cmd.Flags().BoolVar(&a.pprof, "pprof", false, "serve profiles of this process, too: at /debug/pprof of --metrics-addr")
}

// checkMetrics refuses what cannot be meant.
func (a *app) checkMetrics() error {
	switch {
	case a.metrics != "":
		return checkAddr("--metrics-addr", a.metrics)
	case a.pprof:
		return usagef("--pprof needs --metrics-addr, where the profiles are served")
	}
	return nil
}

// serveMetrics starts the metrics server where one is wanted. The function it returns stops it.
func (a *app) serveMetrics() (*prometheus.Registry, func(), error) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "millrace_build_info", Help: "Always 1; the version is the label."}, []string{"version"})
	info.WithLabelValues(programVersion()).Set(1)
	reg.MustRegister(info)
	if a.metrics == "" {
		return reg, func() {}, nil
	}
	ln, err := net.Listen("tcp", a.metrics)
	if err != nil {
		return nil, nil, broker.ListenError(a.metrics, "--metrics-addr", err)
	}
	srv := &http.Server{Handler: watched(reg, a.pprof), ReadHeaderTimeout: 10 * time.Second, WriteTimeout: 2 * time.Minute, IdleTimeout: time.Minute}
	over := make(chan struct{})
	go func() {
		defer close(over)
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("metrics server ended", "error", err)
		}
	}()
	fmt.Fprintf(a.std.err, "metrics at http://%s/metrics\n", ln.Addr())
	return reg, func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_ = srv.Shutdown(ctx) // what is still being read then is cut
		_ = srv.Close()
		<-over
	}, nil
}

// watched serves what a process shows of itself.
func watched(reg *prometheus.Registry, profiles bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{Registry: reg}))
	if profiles {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return mux
}
