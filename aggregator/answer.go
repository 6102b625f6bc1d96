package aggregator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/nats-io/nats.go/micro"

	"millrace/proto"
)

// service answers questions while the lease is held. stop it: no answer is given after that.
type service struct {
	t   *tenure
	ctx context.Context
	srv micro.Service

	mu      sync.Mutex
	stopped bool
	wg      sync.WaitGroup
}

// maxAnswer bounds an answer, in bytes.
const maxAnswer = proto.MaxPayload / 2

type encoder interface{ Encode() ([]byte, error) }

func (t *tenure) serve(ctx context.Context) (*service, error) {
	srv, err := micro.AddService(t.a.Conn.NC, micro.Config{
		Name: proto.ServiceName, Version: "1.0.0", Description: "folds results into output files",
		Metadata: map[string]string{"owner": t.a.Self.ID},
	})
	if err != nil {
		return nil, fmt.Errorf("offer answers: %w", err)
	}
	s := &service{t: t, ctx: ctx, srv: srv}
	for name, ep := range map[string]struct {
		subject string
		answer  func([]byte) (encoder, error)
	}{
		"missing": {proto.SubjectMissing, s.missing},
		"results": {proto.SubjectResults, s.results},
		"verify":  {proto.SubjectVerify, s.verify},
	} {
		if err := srv.AddEndpoint(name, s.handler(ep.answer), micro.WithEndpointSubject(ep.subject)); err != nil {
			s.stop()
			return nil, fmt.Errorf("offer answers: %w", err)
		}
	}
	return s, nil
}

// stop waits for the answers that are being made.
func (s *service) stop() {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.wg.Wait()
	_ = s.srv.Stop() // fails where the connection is closed: then nobody can ask
}

// begin says whether a question may be answered.
func (s *service) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped || !s.t.holding.Load() {
		return false
	}
	s.wg.Add(1)
	return true
}

// handler leaves a question unanswered when the lease may be another's; who asks asks again.
func (s *service) handler(answer func([]byte) (encoder, error)) micro.Handler {
	return micro.HandlerFunc(func(req micro.Request) {
		if !s.begin() {
			return
		}
		defer s.wg.Done()
		a, err := answer(req.Data())
		var b []byte
		if err == nil {
			b, err = a.Encode()
		}
		if err == nil {
			err = req.Respond(b)
		} else {
			err = req.Error("400", err.Error(), nil)
		}
		if err != nil {
			s.t.log.Debug("an answer is lost", "error", err)
		}
	})
}

// find returns a job, and looks it up at the broker where it is not known: whoever created it may be faster than the
// watch.
func (s *service) find(id string) *job {
	if j := s.t.s.job(id); j != nil {
		return j
	}
	if _, err := s.t.lookup(s.ctx, id); err != nil {
		return nil // unknown for now
	}
	return s.t.s.job(id)
}

// missing lists lines without a result. Sequence and ranges are those of one instant of the fold, as it stands in
// memory: what a crash takes from it is folded again from the stream.
func (s *service) missing(b []byte) (encoder, error) {
	var q proto.MissingQuestion
	if err := q.Decode(b); err != nil {
		return nil, err
	}
	j := s.find(q.Job)
	if j == nil {
		return &proto.MissingAnswer{}, nil
	}
	return s.t.s.missing(j, q.From, q.Max), nil
}

// maxRanges keeps an answer of ranges under maxAnswer: one takes 19 bytes at most.
const maxRanges = maxAnswer / 20

func (s *state) missing(j *job, from, most int64) *proto.MissingAnswer {
	if most <= 0 || most > maxRanges {
		most = maxRanges
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a := &proto.MissingAnswer{Known: true, Done: j.left == 0, Stream: s.pos.Stream, Seq: int64(s.pos.Seq)}
	if a.Done {
		return a
	}
	for i := max(from, 0); i < j.spec.Lines; {
		if j.at[i] != 0 {
			i++
			continue
		}
		if int64(len(a.Ranges)) == most {
			a.Next = i
			break
		}
		to := i + 1
		for to < j.spec.Lines && j.at[to] == 0 {
			to++
		}
		a.Ranges = append(a.Ranges, proto.Range{From: i, To: to})
		i = to
	}
	return a
}

// verify recomputes a finished job's manifest. It reads all of its files, so it takes its time.
func (s *service) verify(b []byte) (encoder, error) {
	var q proto.VerifyQuestion
	if err := q.Decode(b); err != nil {
		return nil, err
	}
	a := &proto.VerifyAnswer{}
	j := s.find(q.Job)
	if j == nil {
		return a, nil
	}
	a.Known = true
	done := s.t.s.finishedOf(j)
	if done == nil {
		a.Error = errUnfinished.Error()
		return a, nil
	}
	_, reasons, err := VerifyContext(s.ctx, done.Manifest)
	if errors.Is(err, os.ErrNotExist) && done.Host == s.t.s.host {
		err = fmt.Errorf("job %s is finished, but %s is gone; put it back", j.spec.ID, done.Manifest)
	}
	if err != nil {
		a.Error = elsewhere(err, done, s.t.s.host).Error()
		return a, nil
	}
	a.Valid, a.Reasons = len(reasons) == 0, reasons
	return a, nil
}

func (s *state) finishedOf(j *job) *proto.Progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	return j.finished
}
