package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"time"
)

// goodbye is how long a server that ends waits for its last answers to be sent.
const goodbye = time.Second

// ListenAndServe loads for Config.LoadTime, during which addr refuses
// connections, then listens, calls ready (which may be nil) with the address, and
// goes on as Serve. The port is not reserved while loading.
func (e *Engine) ListenAndServe(ctx context.Context, addr string, ready func(net.Addr)) error {
	if !sleep(ctx, e.cfg.LoadTime) {
		return nil
	}
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("serve simulated engine: %w", err)
	}
	if ready != nil {
		ready(ln.Addr())
	}
	return e.Serve(ctx, ln)
}

// Serve runs the engine and serves it on ln, which it closes. It returns nil when
// ctx has ended and the requests in flight have met the end that Config.Shutdown
// names, and nil, too, after the engine died: vLLM's exit status is 0 then.
// Under ShutdownHang it may wait for its clients for ever.
func (e *Engine) Serve(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler:           e.Handler(),
		IdleTimeout:       e.cfg.KeepAlive,
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	ran, served := make(chan struct{}), make(chan error, 1)
	var runErr error // read after ran
	go func() {
		defer close(ran)
		runErr = e.Run(running)
	}()
	go func() { served <- srv.Serve(ln) }()
	defer func() {
		stop()
		<-ran
	}()

	select {
	case err := <-served:
		return fmt.Errorf("serve simulated engine: %w", err)
	case <-ran:
		if !errors.Is(runErr, ErrEngineDead) {
			closeServer(srv, goodbye)
			<-served
			return runErr
		}
		sleep(ctx, e.cfg.DeathTime)
		closeServer(srv, goodbye)
	case <-ctx.Done():
		e.shutdown(srv, stop, ran)
	}
	<-served
	return nil
}

// shutdown brings the requests in flight to the end that was chosen for them.
func (e *Engine) shutdown(srv *http.Server, stop context.CancelFunc, ran <-chan struct{}) {
	switch e.cfg.Shutdown {
	case ShutdownAbort:
		drained := e.gate.drain()
		e.aborting.Store(true)
		e.inbox.wake()
		select {
		case <-drained:
		case <-ran:
		}
	case ShutdownDrain:
		limit, cancel := context.Background(), context.CancelFunc(func() {})
		if e.cfg.DrainTimeout > 0 {
			limit, cancel = context.WithTimeout(limit, e.cfg.DrainTimeout)
		}
		defer cancel()
		select {
		case <-e.gate.drain():
		case <-ran:
		case <-limit.Done():
			e.hang(srv)
			return
		}
	case ShutdownHang:
		e.hang(srv)
		return
	default:
		stop()
		<-ran
	}
	closeServer(srv, goodbye)
}

// hang stops the engine, closes the port and waits until all clients have left.
func (e *Engine) hang(srv *http.Server) {
	f := e.Faults()
	f.Hang = true
	_ = e.SetFaults(f) // they were valid before
	closeServer(srv, 0)
}

// closeServer closes the port, and every connection once it is idle; after limit,
// if that is not zero, the others too.
func closeServer(srv *http.Server, limit time.Duration) {
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	if limit > 0 {
		ctx, cancel = context.WithTimeout(ctx, limit)
	}
	defer cancel()
	if srv.Shutdown(ctx) != nil {
		_ = srv.Close() // nothing is left to be saved
	}
}

// sleep waits for d. It reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
