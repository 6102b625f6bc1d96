package main

import (
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

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

// TestTalkOnNarrowTerminal: whatever has no room beside the bar, the time that is left and how many lines failed are there, and
// a bar that tells something.
func TestTalkOnNarrowTerminal(t *testing.T) {
	t.Setenv("TERM", "xterm")
	for columns, want := range map[uint16][]string{
		150: {", 7 failed, 10.0 lines/s, 100 output tok/s in the last 1m, 7m50s left", "prompts-of-the-week-2c24abcd12 [==="},
		130: {", 7 failed, 10.0 lines/s, 100 output tok/s, 7m50s left", "prompts-of-the-week-2c24abcd12 [==="},
		100: {", 7 failed, 10.0 lines/s, 7m50s left", "prompts-of-the-week-2c24abcd12 [=="},
		80:  {", 7 failed, 7m50s left", "prompts-of-the-week-2c24abcd12 [=="},
		50:  {", 7 failed, 7m50s left", " ["},
	} {
		master, slave := openTerminal(t, &unix.Winsize{Row: 30, Col: columns})
		talk := (&app{std: stdio{err: slave}}).newTalk(proto.Job{ID: "prompts-of-the-week-2c24abcd12", Lines: 8000})
		now := time.Now()
		talk.pace.Add(now.Add(-time.Minute), progress(0, 2700), false)
		for sec := range int64(59) {
			talk.pace.Add(now.Add(time.Duration(sec-59)*time.Second), progress(sec+1, 2710+10*sec), false)
		}
		last := progress(60, 3300)
		last.OK, last.Failed = 3293, 7
		talk.see(broker.JobView{Feed: proto.Feed{Owner: proto.Owner{ID: "o"}}, Progress: *last})
		talk.close()
		slave.Close()
		drawn, _ := io.ReadAll(master)
		for _, s := range want {
			if !strings.Contains(string(drawn), s) {
				t.Errorf("%d columns: drawn is %q, without %q", columns, drawn, s)
			}
		}
		if strings.Contains(string(drawn), "…, ") || strings.Contains(string(drawn), "lef…") {
			t.Errorf("%d columns: drawn is %q", columns, drawn)
		}
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
