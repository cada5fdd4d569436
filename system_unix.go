//go:build unix

package main

// What Unix has and Windows lacks: a signal to ask for a summary, and the sizes of a
// socket's buffers.

import (
	"os"
	"os/signal"
	"syscall"
)

// notifySummary sends on c when the operator asks for a summary, by SIGUSR1.
func notifySummary(c chan<- os.Signal) { signal.Notify(c, syscall.SIGUSR1) }

// socketBuffers returns the sizes of a socket's receive and send buffer, in bytes, as
// the kernel counts them. Linux doubles what it was asked for, for its own bookkeeping
// (socket(7)). 0 is unknown.
func socketBuffers(c syscall.RawConn) (receive, send int) {
	c.Control(func(fd uintptr) {
		receive, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF)
		send, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF)
	})
	return receive, send
}
