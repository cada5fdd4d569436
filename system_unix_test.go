//go:build unix

package main

// SIGUSR1, and what the summary in the log says.

import (
	"strings"
	"syscall"
	"testing"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
)

// An operator asks a running relay how it is doing.
func TestProcessSumsUpOnSIGUSR1(t *testing.T) {
	p := start(t)
	c := newClient(t)
	if err := c.Connect(testContext(t), p.bootstrap); err != nil {
		t.Fatal(err)
	}
	req := kadpb.NewMessage(kadpb.Message_PUT_VALUE, []byte("/elsewhere/x"), 0)
	if _, err := tryAsk(testContext(t), c, testRelay{info: p.bootstrap}, req); err == nil {
		t.Fatal("a record outside /privstack/ was accepted")
	}
	p.Process.Signal(syscall.SIGUSR1)
	eventually(t, "a summary is logged", func() bool { return p.stderr.line("summary") != "" })
	line := p.stderr.line("summary")
	for _, want := range []string{"uptime=", "memory_bytes=", "peers_served=1 ", "relayed_connections=0 ", "clients=1 ", "reservations=0 ",
		"circuits=0 ", "relayed_bytes=0 ", "records=0 ", "refused.record=1"} {
		if !strings.Contains(line, want) {
			t.Errorf("summary %q lacks %q", line, want)
		}
	}
	if strings.Contains(line, "12D3KooW") || strings.Contains(line, "127.0.0.1") {
		t.Errorf("summary %q names somebody", line)
	}
	p.Process.Signal(syscall.SIGTERM)
	if code := p.wait(t); code != 0 {
		t.Errorf("exit status %d after a summary, want 0", code)
	}
}
