//go:build unix

package main

// Tests of signals, and of pipes whose readers have gone or do not read.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Lines come out whole and in order, and finish waits for them.
func TestOutletWritesInOrder(t *testing.T) {
	var got bytes.Buffer
	o := newOutlet(&got, nil)
	var want bytes.Buffer
	for i := range outletLines / 2 {
		fmt.Fprintln(io.MultiWriter(o, &want), i)
	}
	o.finish()
	if got.String() != want.String() {
		t.Errorf("got %d bytes, want %d in the order written", got.Len(), want.Len())
	}
}

// A reader that does not read costs a limited amount of memory, and learns what it
// missed.
func TestOutletDropsWhatNobodyReads(t *testing.T) {
	read, write := io.Pipe()
	o := newOutlet(write, tellLost(true))
	line := []byte(strings.Repeat("x", 999) + "\n")
	for range 10 * outletBytes / len(line) {
		if n, err := o.Write(line); n != len(line) || err != nil {
			t.Fatalf("Write = %d, %v, want all bytes taken", n, err)
		}
	}
	if held := o.bytes.Load(); held > outletBytes {
		t.Errorf("the outlet keeps %d bytes, want at most %d", held, outletBytes)
	}
	lost := o.lost.Load()
	if lost == 0 {
		t.Fatal("nothing was dropped")
	}
	close(o.end)
	go func() { // ends when the outlet has written everything
		<-o.ended
		write.Close()
	}()
	got, err := io.ReadAll(read)
	// As the other lines in the journal: a priority, and no time.
	if err != nil || !bytes.Contains(got, fmt.Appendf(nil, "\n<4>level=WARN msg=\"log lines dropped because they were not read fast enough\" lines=%d\n", lost)) {
		t.Errorf("the log does not say that %d lines were dropped (%v)", lost, err)
	}
}

// fullPipe returns a pipe that accepts nothing until somebody reads.
func fullPipe(t *testing.T) (read, write *os.File) {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close(); write.Close() })
	for size := 64 << 10; size > 0; size /= 2 {
		for {
			write.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
			if n, err := write.Write(bytes.Repeat([]byte("\n"), size)); n == 0 && errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
	}
	return read, write
}

// A log reader that hangs (a paused terminal, a stuck log shipper) costs log lines.
// The relay goes on serving, and stops when asked.
func TestBlockedReadersHoldNothingUp(t *testing.T) {
	for _, tt := range []struct {
		name           string
		stdout, stderr bool // blocked
		args           []string
		code           int
	}{
		{"stderr", false, true, []string{"--verbose"}, 0},
		{"stdout", true, false, nil, 0},
		{"both", true, true, nil, 0},
		{"both, with an error at the end", true, true, []string{"--identity=/nonexistent/key"}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			httpPort := freeTCPPort(t)
			cmd := command(t, append([]string{"--port=0", "--http-port=" + httpPort}, tt.args...)...)
			_, full := fullPipe(t)
			if tt.stdout {
				cmd.Stdout = full
			}
			if tt.stderr {
				cmd.Stderr = full
			}
			startUntilCleanup(t, cmd)
			if tt.code == 0 {
				waitServing(t, httpPort)
				cmd.Process.Signal(syscall.SIGTERM)
			}
			if code := exitStatus(t, cmd); code != tt.code {
				t.Errorf("exit status %d, want %d", code, tt.code)
			}
		})
	}
}

// Whoever started the relay in a pipe may go away (head, grep -m1, a closed
// terminal).
func TestReadersThatLeaveEndNothing(t *testing.T) {
	httpPort := freeTCPPort(t)
	cmd := command(t, "--port=0", "--http-port="+httpPort, "--verbose")
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	read.Close()
	cmd.Stdout, cmd.Stderr = write, write
	startUntilCleanup(t, cmd)
	write.Close()
	waitServing(t, httpPort)
	cmd.Process.Signal(syscall.SIGUSR1) // makes it log a summary
	waitServing(t, httpPort)
	cmd.Process.Signal(syscall.SIGTERM)
	if code := exitStatus(t, cmd); code != 0 {
		t.Errorf("exit status %d, want 0", code)
	}
}

// Closing its terminal stops the relay as SIGTERM does, with its goodbye. nohup and
// a second SIGHUP do not kill it.
func TestHangupDrainsUnlessIgnored(t *testing.T) {
	// The relay would inherit that SIGHUP is ignored if these tests ran under nohup.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)

	p := start(t)
	src, dst := newClient(t), newClient(t)
	circuitBetween(t, testRelay{info: p.bootstrap}, src, dst)
	openEcho(t, src, dst) // delays the stop for seconds after the first signal
	p.Process.Signal(syscall.SIGHUP)
	eventually(t, "the relay is stopping", func() bool { return p.stderr.line("stopping") != "" })
	p.Process.Signal(syscall.SIGHUP)
	if code := p.wait(t); code != 0 {
		t.Errorf("exit status %d after SIGHUP, want 0", code)
	}
	if p.stderr.line("stopped") == "" {
		t.Errorf("no goodbye:\n%s", p.stderr)
	}

	nohup, err := exec.LookPath("nohup")
	if err != nil {
		t.Skip("no nohup here")
	}
	cmd := command(t, "--port=0", "--http-port=0")
	cmd.Args = append([]string{"nohup"}, cmd.Args...)
	cmd.Path = nohup
	p = launch(t, cmd)
	p.Process.Signal(syscall.SIGHUP)
	p.Process.Signal(syscall.SIGUSR1)
	eventually(t, "the relay logs a summary", func() bool { return p.stderr.line("summary") != "" })
	p.Process.Signal(syscall.SIGTERM)
	if code := p.wait(t); code != 0 || strings.Count(p.stderr.String(), "msg=stopping") != 1 {
		t.Errorf("exit status %d, want 0 for SIGTERM:\n%s", code, p.stderr)
	}
}

// freeTCPPort returns a port that is free, and below those that systems give to
// connections and to whoever asks for any port (32768 on Linux): those would be taken
// again at once by whatever else runs.
func freeTCPPort(t *testing.T) string {
	t.Helper()
	var err error
	for range 100 {
		port := 10000 + rand.IntN(20000)
		var ln net.Listener
		if ln, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
			ln.Close()
			return fmt.Sprint(port)
		}
	}
	t.Fatal(err)
	return ""
}

func startUntilCleanup(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
}

func waitServing(t *testing.T, httpPort string) {
	t.Helper()
	eventually(t, "the relay serves", func() bool {
		resp, err := http.Get("http://127.0.0.1:" + httpPort + "/healthz")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil && resp.StatusCode == 200
	})
}

// exitStatus waits until cmd has ended, and returns -1 for a signal.
func exitStatus(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	timeout := time.AfterFunc(testTimeout, func() { cmd.Process.Kill() })
	cmd.Wait()
	if !timeout.Stop() {
		t.Fatalf("did not end within %v", testTimeout)
	}
	return cmd.ProcessState.ExitCode()
}
