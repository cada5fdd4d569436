package main

// What the relay tells the service manager that started it: that it is ready, that it is
// still alive, and that it is stopping. Without a service manager it says nothing.

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime/pprof"
	"strconv"
	"syscall"
	"time"
)

// serviceManager is systemd, or whatever else set NOTIFY_SOCKET. The zero value is
// none.
// https://www.freedesktop.org/software/systemd/man/sd_notify.html
type serviceManager struct {
	// socket is where each message goes, as one datagram. "": nobody listens. A leading @
	// stands for the zero byte of Linux's abstract sockets, as in package net.
	socket string

	// watchdog is how long the service manager waits for a sign of life before it
	// ends the process. 0: it waits for none.
	watchdog time.Duration
}

// findServiceManager reads the environment, in which the service manager says how to
// reach it.
func findServiceManager(getenv func(string) string) serviceManager {
	m := serviceManager{socket: getenv("NOTIFY_SOCKET")}
	// The watchdog may be meant for a parent process that passed its environment on.
	// https://www.freedesktop.org/software/systemd/man/sd_watchdog_enabled.html
	if pid := getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return m
	}
	if usec, err := strconv.ParseInt(getenv("WATCHDOG_USEC"), 10, 64); err == nil && usec > 0 && usec <= int64(maxWatchdog/time.Microsecond) {
		m.watchdog = time.Duration(usec) * time.Microsecond
	}
	return m
}

// maxWatchdog is far longer than any useful watchdog, and fits a Duration.
const maxWatchdog = 365 * 24 * time.Hour

// tellTimeout bounds one message to the service manager. While it does not read, its
// socket fills up, and our main loop must not wait for that.
const tellTimeout = time.Second

// signsOfLife returns a channel that ticks when a sign of life is due, until stop is
// called: twice in the time that the watchdog waits. Without a watchdog it never ticks.
func (m serviceManager) signsOfLife() (due <-chan time.Time, stop func()) {
	if m.socket == "" || m.watchdog == 0 {
		return nil, func() {}
	}
	ticker := time.NewTicker(max(m.watchdog/2, time.Millisecond))
	return ticker.C, ticker.Stop
}

// tell sends one message, such as READY=1, or gives up after tellTimeout.
func (m serviceManager) tell(state string) error {
	if m.socket == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: m.socket, Net: "unixgram"})
	if err == nil {
		conn.SetWriteDeadline(time.Now().Add(tellTimeout))
		_, err = conn.Write([]byte(state))
		conn.Close()
	}
	if err != nil {
		return fmt.Errorf("tell the service manager %s: %w", state, err)
	}
	return nil
}

// dumpOnAbort has SIGABRT end the process, after the stacks of all goroutines have been
// written to w. The watchdog sends SIGABRT to a process that hangs. Each stack is written
// once, with the number of goroutines that share it. The Go runtime would write it once
// for each of them, and journald takes only so many lines at a time: measured without
// clients, 149 lines instead of 2096, and each client adds three goroutines.
//
// If the runtime itself hangs, nothing is written, and systemd kills the process some
// seconds later.
func dumpOnAbort(w io.Writer) {
	aborted := make(chan os.Signal, 1)
	signal.Notify(aborted, syscall.SIGABRT)
	go func() { // until the process ends
		<-aborted
		fmt.Fprintln(w, "privstack-relay: aborted, by the watchdog or by hand, while its goroutines did this:")
		pprof.Lookup("goroutine").WriteTo(w, 1)
		os.Exit(1)
	}()
}
