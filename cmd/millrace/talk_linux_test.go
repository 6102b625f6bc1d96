package main

import (
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"millrace/broker"
	"millrace/proto"
)

// TestTalkOnTerminal: the bar is drawn on a terminal, also on one that does not know its size.
func TestTalkOnTerminal(t *testing.T) {
	t.Setenv("TERM", "xterm")
	for name, size := range map[string]unix.Winsize{"no size": {}, "120 columns": {Row: 30, Col: 120}} {
		t.Run(name, func(t *testing.T) {
			master, slave := openTerminal(t, &size)
			talk := (&app{std: stdio{err: slave}}).newTalk(proto.Job{ID: "j", Lines: 9})
			talk.see(broker.JobView{Feed: proto.Feed{Owner: proto.Owner{ID: "o"}}, Progress: proto.Progress{OK: 4}})
			talk.close()
			slave.Close()
			drawn, _ := io.ReadAll(master) // that the other end is closed is an error on Linux
			if s := string(drawn); !strings.Contains(s, "4/9") || !strings.Contains(s, "[") || !strings.Contains(s, "44 %") {
				t.Errorf("drawn is %q", s)
			}
		})
	}
}

// openTerminal makes a terminal of a size, and returns both of its ends.
func openTerminal(t *testing.T, size *unix.Winsize) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no terminals here: ", err)
	}
	t.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, size)
	}
	if err == nil {
		slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return master, slave
}
