package main

// What the relay tells the service manager that started it: that it serves,
// that it still does, that it stops. Without one, nothing is said.

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"time"
)

// serviceManager is systemd, or whoever else set NOTIFY_SOCKET. The zero value
// is none.
// https://www.freedesktop.org/software/systemd/man/sd_notify.html
type serviceManager struct {
	// socket receives one datagram for each message. Empty: nobody listens. A
	// leading @ stands for the zero byte of Linux's abstract sockets, here as in
	// package net.
	socket string

	// watchdog is how long it waits for a sign of life before it ends the
	// process. 0: it does not wait for any.
	watchdog time.Duration
}

// findServiceManager reads what a service manager puts into the environment.
func findServiceManager(getenv func(string) string) serviceManager {
	m := serviceManager{socket: getenv("NOTIFY_SOCKET")}
	// The watchdog may be meant for the parent that passed its environment on.
	// https://www.freedesktop.org/software/systemd/man/sd_watchdog_enabled.html
	if pid := getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return m
	}
	if usec, err := strconv.ParseInt(getenv("WATCHDOG_USEC"), 10, 64); err == nil && usec > 0 && usec <= int64(maxWatchdog/time.Microsecond) {
		m.watchdog = time.Duration(usec) * time.Microsecond
	}
	return m
}

// maxWatchdog is far above any wait that is worth a watchdog, and fits a Duration.
const maxWatchdog = 365 * 24 * time.Hour

// signsOfLife ticks when a message of life is due, twice in the time that the
// watchdog waits, until stop. Without a watchdog it never does.
func (m serviceManager) signsOfLife() (due <-chan time.Time, stop func()) {
	if m.socket == "" || m.watchdog == 0 {
		return nil, func() {}
	}
	ticker := time.NewTicker(max(m.watchdog/2, time.Millisecond))
	return ticker.C, ticker.Stop
}

// tell sends one message, such as READY=1.
func (m serviceManager) tell(state string) error {
	if m.socket == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: m.socket, Net: "unixgram"})
	if err == nil {
		_, err = conn.Write([]byte(state))
		conn.Close()
	}
	if err != nil {
		return fmt.Errorf("tell the service manager %s: %w", state, err)
	}
	return nil
}
