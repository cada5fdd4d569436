//go:build unix

package main

// What the operating system has on Unix and Windows has not.

import (
	"os"
	"os/signal"
	"syscall"
)

// notifySummary sends on c when the operator asks for a summary: SIGUSR1.
func notifySummary(c chan<- os.Signal) { signal.Notify(c, syscall.SIGUSR1) }

// socketBuffers are the sizes of a socket's receive and send buffer, in bytes, as
// the kernel counts them: Linux doubles what was asked for, for its own
// bookkeeping (socket(7)). 0 is unknown.
func socketBuffers(c syscall.RawConn) (receive, send int) {
	c.Control(func(fd uintptr) {
		receive, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF)
		send, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF)
	})
	return receive, send
}
