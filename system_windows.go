package main

// Stand-ins on Windows for what system_unix.go does.

import (
	"os"
	"syscall"
)

func notifySummary(chan<- os.Signal) {}

func socketBuffers(syscall.RawConn) (receive, send int) { return 0, 0 }
