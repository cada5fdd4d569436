package main

// What the relay tells a service manager, over a real socket.

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// listenNotify opens a service manager's socket. next returns one message from it.
func listenNotify(t *testing.T, name string) (next func() string) {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return func() string {
		t.Helper()
		conn.SetReadDeadline(time.Now().Add(testTimeout))
		buf := make([]byte, 4096)
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatalf("no message: %v", err)
		}
		return string(buf[:n])
	}
}

// With Type=notify, systemd waits for READY=1 before it calls the relay started, and kills
// one that stops sending WATCHDOG=1.
func TestServiceManagerIsTold(t *testing.T) {
	skipOnWindows(t)
	sockets := []string{filepath.Join(t.TempDir(), "notify")}
	if runtime.GOOS == "linux" {
		sockets = append(sockets, fmt.Sprintf("@privstack-relay-test-%d", os.Getpid()))
	}
	for _, socket := range sockets {
		t.Run(socket[:1], func(t *testing.T) {
			next := listenNotify(t, socket)
			t.Setenv("NOTIFY_SOCKET", socket)
			t.Setenv("WATCHDOG_USEC", "20000")
			p := start(t)
			if got := next(); got != "READY=1" {
				t.Errorf("first message is %q, want READY=1", got)
			}
			for range 3 {
				if got := next(); got != "WATCHDOG=1" {
					t.Errorf("message while the relay serves is %q, want WATCHDOG=1", got)
				}
			}
			p.Process.Signal(syscall.SIGTERM)
			got := next()
			for got == "WATCHDOG=1" {
				got = next()
			}
			if got != "STOPPING=1" {
				t.Errorf("message after SIGTERM is %q, want STOPPING=1", got)
			}
			if code := p.wait(t); code != 0 || strings.Contains(p.stderr.String(), "level=WARN msg=\"service manager") {
				t.Errorf("exit status %d, want 0 and no warning:\n%s", code, p.stderr)
			}
		})
	}
}

// A service manager that cannot be reached costs a line in the log, not the relay.
func TestServeGoesOnWithoutServiceManager(t *testing.T) {
	skipOnWindows(t)
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	p := start(t)
	p.Process.Signal(syscall.SIGTERM)
	if code := p.wait(t); code != 0 || !strings.Contains(p.stderr.String(), "tell the service manager READY=1") {
		t.Errorf("exit status %d, want 0 and a warning:\n%s", code, p.stderr)
	}
}

func TestFindServiceManager(t *testing.T) {
	self := fmt.Sprint(os.Getpid())
	for _, tt := range []struct {
		env  map[string]string
		want serviceManager
	}{
		{nil, serviceManager{}},
		{map[string]string{"NOTIFY_SOCKET": "@a"}, serviceManager{socket: "@a"}},
		{map[string]string{"NOTIFY_SOCKET": "/s", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": self}, serviceManager{"/s", 30 * time.Second}},
		{map[string]string{"NOTIFY_SOCKET": "/s", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, serviceManager{socket: "/s"}},
		{map[string]string{"WATCHDOG_USEC": "0"}, serviceManager{}},
		{map[string]string{"WATCHDOG_USEC": "-5"}, serviceManager{}},
		{map[string]string{"WATCHDOG_USEC": "soon"}, serviceManager{}},
		{map[string]string{"WATCHDOG_USEC": "9223372036854775807"}, serviceManager{}},
	} {
		got := findServiceManager(func(key string) string { return tt.env[key] })
		if got != tt.want {
			t.Errorf("findServiceManager(%v) = %+v, want %+v", tt.env, got, tt.want)
		}
		due, stop := got.signsOfLife()
		stop()
		if (due != nil) != (tt.want.socket != "" && tt.want.watchdog > 0) {
			t.Errorf("%+v.signsOfLife() = %v, want a channel only for a watchdog", got, due)
		}
	}
}

// A watchdog that is always satisfied would keep a hung relay running.
func TestNoSignOfLifeWhileALockIsHeld(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	for name, mu := range map[string]interface {
		Lock()
		Unlock()
	}{
		"peers": &r.peers.mu, "peers served": &r.peers.served.mu, "circuits": &r.circuits.mu,
	} {
		var released atomic.Bool
		alive := make(chan bool)
		mu.Lock()
		go func() {
			r.takeLocks()
			alive <- released.Load()
		}()
		runtime.Gosched()
		released.Store(true)
		mu.Unlock()
		if !<-alive {
			t.Errorf("takeLocks returned while the lock of %s was held", name)
		}
	}
}

// A service manager that does not read would stop the relay's main loop, and with it
// the answer to SIGTERM.
func TestTellGivesUpOnAServiceManagerThatDoesNotRead(t *testing.T) {
	skipOnWindows(t)
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	manager := serviceManager{socket: path}
	for range 1 << 16 { // more than any socket's queue holds
		if err = manager.tell("WATCHDOG=1"); err != nil {
			break
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("tell returned %v, want a deadline that is exceeded", err)
	}
}
