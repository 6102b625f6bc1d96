package broker

import "syscall"

// pidScope names the boot of this machine: where two are equal, a PID means the same. It is empty where the system does
// not tell.
func pidScope() string {
	boot, err := syscall.Sysctl("kern.bootsessionuuid")
	if err != nil {
		return ""
	}
	return boot
}

// Network is not known here.
func Network() string { return "" }
