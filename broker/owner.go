package broker

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/nats-io/nuid"

	"millrace/proto"
)

// Self names this process as an owner of leases.
func Self() proto.Owner {
	pid := os.Getpid()
	return proto.Owner{ID: nuid.Next(), Host: hostID(), PID: int64(pid), Start: processStart(pid)}
}

// hostID names the machine, and behind a slash the scope of its PIDs.
func hostID() string {
	name, _ := os.Hostname() // empty where the system does not tell: the scope still tells machines apart
	return name + "/" + pidScope()
}

// processStart is what the system says of when a process began; empty where it does not say.
func processStart(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The second field, the command's name, may hold blanks and brackets; field 22 is counted after its end.
	_, rest, ok := strings.Cut(string(b[bytes.LastIndexByte(b, ')'):]), " ")
	if f := strings.Fields(rest); ok && len(f) > 19 {
		return f[19]
	}
	return ""
}

// dead says whether o is surely not running any more: a process of this machine that is not there. Where the scope of
// PIDs is not known nobody is: two machines may go by one name.
func dead(o, self proto.Owner) bool {
	_, scope, _ := strings.Cut(o.Host, "/")
	if o.Host != self.Host || strings.Trim(scope, "/") == "" || o.PID <= 0 {
		return false
	}
	if errors.Is(syscall.Kill(int(o.PID), 0), syscall.ESRCH) {
		return true
	}
	start := processStart(int(o.PID))
	return o.Start != "" && start != "" && start != o.Start
}
