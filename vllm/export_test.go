package vllm

import (
	"io"
	"os"
	"time"
)

// Quicken lets a server be started again at once.
func (s *Server) Quicken() { s.pause = time.Millisecond }

// Recognise says which reason a log gives, and whether it is final; empty: none.
func Recognise(lines []string) (name, what string, final bool) {
	r, line := recognise(lines)
	if r == nil {
		return "", "", false
	}
	return r.name, r.say(line), r.final
}

// Reasons names all reasons.
func Reasons() (names []string) {
	for _, r := range reasons {
		names = append(names, r.name)
	}
	return names
}

// BackWherePortTaken says whether a server that has its card alone takes its part again where its port is taken.
func (s *Server) BackWherePortTaken() bool {
	s.part = Flags{"--gpu-memory-utilization", "0.45"}
	return s.back(notStarted("vllm", portTaken(s.Port)))
}

// RecordName is the file that names the processes of a server.
const RecordName = recordName

// Loading is what is said of a server that starts.
func Loading(took time.Duration, phase, cause string) string { return loading(took, phase, cause) }

// JournalSize is the size of a log file at which another one is begun.
const JournalSize = journalSize

// Journal takes in what a server says and writes it to f. It returns the last lines, when the last news came, and what is
// closed when all is written.
func Journal(f *os.File, said io.Reader) (tail []string, news time.Time, written <-chan struct{}) {
	j := &journal{f: f, written: make(chan struct{})}
	j.copy(said)
	return j.tail(), j.last(), j.written
}

// Environment is that of a server's process.
func (s *Server) Environment() []string { return s.environment() }
