package worker

import (
	"bufio"
	"errors"
	"math"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"

	"millrace/proto"
)

// conn is a connection to an engine. One request at a time has it.
type conn struct {
	net.Conn
	raw      syscall.RawConn
	answer   *bufio.Reader // over limited
	left     int64         // bytes that may still be read
	head     []byte        // of the request; kept to be written over
	parts    [2][]byte
	out      net.Buffers
	used     bool      // it has carried a request
	engine   time.Time // see Answer.Since
	reusable bool      // the last answer was read whole and neither side said close
	since    time.Time // it is idle
}

func newConn(nc net.Conn) *conn {
	c := &conn{Conn: nc}
	c.raw, _ = nc.(*net.TCPConn).SyscallConn() // fails only for what is not a connection
	c.answer = bufio.NewReader((*limited)(c))
	return c
}

// limited reads from the connection what may still be read.
type limited conn

// maxHead is the length of all heads of an answer together, 1xx ones included, in bytes.
const maxHead = 1 << 20

var errHead = errors.New("the head of the answer is longer than 1 MB")

func (c *limited) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errHead
	}
	n, err := c.Conn.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}

// interrupt makes reading and writing fail.
func (c *conn) interrupt() { _ = c.SetDeadline(time.Unix(1, 0)) } // it fails where the connection is closed

// exchange sends a request and reads the answer. Again says that the connection had ended since it was last used, and
// that not one byte was written. Where that is so on a new connection and no answer comes, the error is as if it could
// not be dialled: the engine never had the request.
func (c *conn) exchange(p *prefix, r *proto.Request) (a Answer, again bool, err error) {
	n, wrong := c.send(p, r)
	switch {
	case wrong == nil:
	case n == 0 && c.used:
		return Answer{}, true, wrong
	case errors.Is(wrong, os.ErrDeadlineExceeded): // interrupted
		return Answer{}, false, wrong
	default:
		_ = c.SetReadDeadline(time.Now().Add(time.Second)) // the engine may have answered before it closed
	}
	a, err = c.receive()
	c.reusable = c.reusable && wrong == nil
	if err != nil && c.used && c.left == maxHead && !errors.Is(err, os.ErrDeadlineExceeded) {
		err = &staleError{err}
	}
	if err != nil && wrong != nil && a.Status == 0 {
		err = wrong
		if n == 0 {
			err = &net.OpError{Op: "dial", Net: "tcp", Err: wrong}
		}
	}
	return a, false, err
}

// staleError is the end of a connection that had carried requests before, without one byte of an answer: the engine
// died, or closed the connection as idle in the same moment as it was used.
type staleError struct{ error }

func (e *staleError) Unwrap() error { return e.error }

// quiet says whether an idle connection is as it was left: the engine has neither closed it nor said anything. It
// looks without waiting.
func (c *conn) quiet() bool {
	quiet := false
	err := c.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, err := syscall.Read(int(fd), b[:])
		quiet = errors.Is(err, syscall.EAGAIN)
		return true // do not wait
	})
	return quiet && err == nil
}

func (c *conn) send(p *prefix, r *proto.Request) (int64, error) {
	c.head = append(append(append(c.head[:0], p.text...), r.Job...), '-')
	c.head = append(strconv.AppendInt(c.head, r.Index, 10), "\r\nContent-Length: "...)
	c.head = append(strconv.AppendInt(c.head, int64(len(r.Body)), 10), "\r\n\r\n"...)
	c.parts = [2][]byte{c.head, r.Body}
	c.out = c.parts[:]
	n, err := c.out.WriteTo(c.Conn)
	c.parts = [2][]byte{} // the body is not kept
	return n, err
}

var posted = &http.Request{Method: http.MethodPost} // what the answers are to

// receive reads the answer, and says in reusable what becomes of the connection.
func (c *conn) receive() (Answer, error) {
	c.reusable, c.left = false, maxHead
	for {
		resp, err := http.ReadResponse(c.answer, posted)
		if c.left <= 0 { // whatever a head looks like that was cut off there
			return Answer{}, errHead
		}
		if err != nil {
			return Answer{}, err
		}
		if resp.StatusCode/100 == 1 && resp.StatusCode != http.StatusSwitchingProtocols {
			continue
		}
		c.left = math.MaxInt64
		a := Answer{Status: resp.StatusCode, Header: resp.Header}
		a.Body, a.TooLarge, err = readBody(resp)
		c.reusable = err == nil && !a.TooLarge && !resp.Close && a.Status >= 200 && c.answer.Buffered() == 0
		return a, err
	}
}
