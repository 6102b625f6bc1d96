package broker

import (
	"bytes"
	"os"
	"sync"
)

// pidScope names the boot of this machine and the name space of processes: where two are equal, a PID means the same.
// It is empty where the system does not tell one of them.
func pidScope() string { return scope("pid") }

// Network names the boot of this machine, and behind a slash the name space of this process's network: where two are equal, an
// address leads to the same place. It is empty where the system does not tell one of them.
func Network() string { return network() }

var network = sync.OnceValue(func() string { return scope("net") })

func scope(kind string) string {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	ns, _ := os.Readlink("/proc/self/ns/" + kind)
	if boot = bytes.TrimSpace(boot); len(boot) == 0 || ns == "" {
		return ""
	}
	return string(boot) + "/" + ns
}
