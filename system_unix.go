//go:build unix

package main

// What Unix has and Windows lacks: a signal to ask for a summary, the owner of a file,
// the sizes of a socket's buffers, marks on datagrams, and systemd's journal.

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// notifySummary sends on c when the operator asks for a summary, by SIGUSR1.
func notifySummary(c chan<- os.Signal) { signal.Notify(c, syscall.SIGUSR1) }

// fileOwner returns the number of the user that a file belongs to, if it is known.
func fileOwner(info fs.FileInfo) (uid int, known bool) {
	stat, known := info.Sys().(*syscall.Stat_t)
	if !known {
		return 0, false
	}
	return int(stat.Uid), true
}

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

// isJournal reports whether w is the file that stream names, as DEVICE:INODE: systemd
// says in it which stream leads to the journal.
func isJournal(w io.Writer, stream string) bool {
	f, ok := w.(*os.File)
	if !ok || stream == "" {
		return false
	}
	info, err := f.Stat()
	if err != nil {
		return false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stream == fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
}

// carriesECN reports whether a control message sets the ECN bits of what is sent, even
// to 0.
func carriesECN(control []byte) bool {
	for len(control) > 0 {
		header, _, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			return false
		}
		if header.Level == unix.IPPROTO_IP && header.Type == unix.IP_TOS ||
			header.Level == unix.IPPROTO_IPV6 && header.Type == unix.IPV6_TCLASS {
			return true
		}
		control = rest
	}
	return false
}
