package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
)

func (a *app) metricsFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&a.metrics, "metrics-addr", "", "serve Prometheus metrics at HOST:PORT/metrics")
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
		return nil, nil, coded{fmt.Errorf("serve metrics: %w; choose another --metrics-addr", err), exitFailure}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{Registry: reg}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: time.Minute}
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
