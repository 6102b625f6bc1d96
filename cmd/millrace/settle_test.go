package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"

	"millrace/aggregator"
	"millrace/broker"
	"millrace/proto"
)

// endingRun is a job of `millrace run` whose process is about to end: its lock is held, its broker there, behind lastWords.
// end stops the broker, notes that the job is finished where it is, and lets go of the lock.
func endingRun(t *testing.T, a *app, state, trigger string, hold bool) (said chan struct{}, end func(finished bool)) {
	t.Helper()
	job := proto.Job{ID: "gone-0", Lines: 1}
	p := &place{dir: a.runDir(job.ID)}
	lock, err := broker.LockDir(p.dir)
	if err != nil {
		t.Fatal(err)
	}
	srv := &broker.Server{Dir: p.dir + "/broker", Addr: "127.0.0.1:0", Token: newToken(), Log: a.log}
	conn := startBroker(t, srv)
	put := func(key string, record encoder) {
		kv, err := conn.JS.KeyValue(t.Context(), proto.JobsBucket)
		if err != nil {
			t.Fatal(err)
		}
		b, err := record.Encode()
		if err == nil {
			_, err = kv.Put(t.Context(), key, b)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := (broker.Declarer{JS: conn.JS}).Base(t.Context()); err != nil {
		t.Fatal(err)
	}
	put(proto.JobKey(job.ID), &job)
	put(proto.ProgressKey(job.ID), &proto.Progress{State: state})
	if err := p.remember(&job, aggregator.Files{}); err != nil {
		t.Fatal(err)
	}
	at, said, cut := lastWords(t, strings.TrimPrefix(srv.URL(), "nats://"), trigger, hold)
	if err := (endpoint{URL: at, Token: srv.Token}).write(p.dir); err != nil {
		t.Fatal(err)
	}
	return said, func(finished bool) {
		cut()
		conn.Close()
		srv.Stop()
		if finished {
			p.finish(a, "")
		}
		lock.Unlock()
	}
}

// lastWords passes on what clients say to the broker at addr, until one says trigger: that closes said, and where hold is
// set nothing of it and after it is passed on any more. cut ends all connections.
func lastWords(t *testing.T, addr, trigger string, hold bool) (at string, said chan struct{}, cut func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	said = make(chan struct{})
	once := sync.OnceFunc(func() { close(said) })
	over, cut := context.WithCancel(t.Context())
	context.AfterFunc(over, func() { ln.Close() })
	t.Cleanup(cut)
	serve := func(client, server net.Conn) {
		context.AfterFunc(over, func() { client.Close(); server.Close() })
		go func() { _, _ = io.Copy(client, server) }()
		var all []byte
		for b := make([]byte, 64<<10); ; {
			n, err := client.Read(b)
			if err != nil {
				server.Close()
				return
			}
			if all = append(all, b[:n]...); bytes.Contains(all, []byte(trigger)) {
				once()
				if hold {
					continue
				}
			}
			_, _ = server.Write(b[:n])
		}
	}
	go func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", addr)
			if err != nil {
				client.Close()
				continue
			}
			go serve(client, server)
		}
	}()
	return "nats://" + ln.Addr().String(), said, cut
}

// TestRunEndsMeanwhile: commands for a run that ends meanwhile do what is right then.
func TestRunEndsMeanwhile(t *testing.T) {
	t.Setenv("NATS_URL", "")
	for name, c := range map[string]struct {
		args     []string
		state    string // of the fold
		trigger  string
		hold     bool
		finished bool
		want     string // of the error; empty: none, and nothing is left
	}{
		"rm of what is finished": {[]string{"rm"}, proto.FoldDone, "$KV.JOBS.agg.gone-0", false, true, ""},
		"rm":                     {[]string{"rm", "--force"}, "", "$JS.API.STREAM.PURGE", true, true, ""},
		"pause, killed":          {[]string{"pause"}, "", "PUB $KV.JOBS.ctl.gone-0", true, false, "was interrupted, and no process runs it"},
		"cancel, finished":       {[]string{"cancel"}, "", "$KV.JOBS.agg.gone-0", true, true, "is finished, and "},
		"verify, no aggregator":  {[]string{"verify"}, proto.FoldDone, proto.SubjectVerify, false, false, "was interrupted, and no process runs it"},
		"verify, interrupted":    {[]string{"verify"}, proto.FoldDone, proto.SubjectVerify, true, false, "was interrupted, and no process runs it"},
	} {
		t.Run(name, func(t *testing.T) {
			a := &app{data: t.TempDir(), log: slog.New(slog.DiscardHandler)}
			said, end := endingRun(t, a, c.state, c.trigger, c.hold)
			var out bytes.Buffer
			user := &app{std: stdio{os.Stdin, &out, &out}}
			user.nats.usual = "nats://" + freePort(t)
			root := user.root()
			root.SetArgs(append(c.args, "gone-0", "--data", a.data))
			over := make(chan error, 1)
			go func() { over <- root.ExecuteContext(t.Context()) }()
			select {
			case err := <-over:
				t.Fatalf("it ends before the run does: %v\n%s", err, out.String())
			case <-said:
			}
			end(c.finished)
			err := <-over
			if c.want == "" && (err != nil || exists(a.runDir("gone-0"))) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v\n%s", err, out.String())
			}
		})
	}
}
