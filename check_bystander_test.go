//go:build linux

package main

// Whom a check bothers when the other side lies.

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// An endpoint that lists other people's addresses must not turn the checks of everybody
// who asks it into a port scan, nor reach into the network of who asks: few of them get
// a handshake by QUIC, none that is private gets anything, and nobody gets TCP.
func TestLyingEndpointMakesCheckBotherFew(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	const many = 3 * maxCheckDials
	var addrs, listed []string
	for i := range many {
		addrs = append(addrs, fmt.Sprintf("11.0.1.%d/8", i+1))
		listed = append(listed, fmt.Sprintf("/ip4/11.0.1.%d/udp/%d/quic-v1", i+1, 53+i), fmt.Sprintf("/ip4/11.0.1.%d/tcp/22", i+1))
	}
	bystander := l.public("bystander", append(addrs, "192.168.9.1/24")...)
	l.nft(bystander, `
		table ip watch {
			set dialled { type ipv4_addr; flags dynamic; size 1024; }
			set connected { type ipv4_addr; flags dynamic; size 1024; }
			chain arriving {
				type filter hook input priority filter;
				meta l4proto udp add @dialled { ip daddr }
				meta l4proto != { udp, icmp } add @connected { ip daddr }
			}
		}`)
	me := l.public("me", "11.0.0.9/8", "192.168.9.9/24")
	liar := l.public("liar", "11.0.0.1/8")
	// Local addresses first, so that no bound on their number keeps them away.
	listed = append([]string{"/ip4/0.0.0.0/udp/4001/quic-v1", "/ip4/192.168.9.1/udp/53/quic-v1"}, listed...)
	body := identityBody(t, newLightIdentity(t).id, listed...)
	serveIn(t, liar, "11.0.0.1:4002", body)

	got := l.check(me, "11.0.0.1")
	if got.OK {
		t.Error("the check of a liar passes")
	}
	seen := func(set string) []string {
		t.Helper()
		out, err := exec.Command("ip", "netns", "exec", bystander, "nft", "list", "set", "ip", "watch", set).CombinedOutput()
		if err != nil {
			t.Fatalf("nft: %v\n%s", err, out)
		}
		return regexp.MustCompile(`\d+\.\d+\.\d+\.\d+`).FindAllString(string(out), -1)
	}
	dialled := seen("dialled")
	if len(dialled) == 0 {
		t.Error("no listed address is dialled: the test sees nothing")
	}
	if len(dialled) >= maxCheckDials || slices.Contains(dialled, "192.168.9.1") {
		t.Errorf("the check dials %v, want fewer than %d and none that is private", dialled, maxCheckDials)
	}
	if connected := seen("connected"); len(connected) > 0 {
		t.Errorf("the check reaches %v by something else than QUIC", connected)
	}
}

// serveIn answers every HTTP request to addr in the namespace ns with body.
func serveIn(t *testing.T, ns, addr, body string) {
	t.Helper()
	type result struct {
		ln  net.Listener
		err error
	}
	done := make(chan result)
	go func() {
		// The thread is left in ns, so it ends with this goroutine.
		runtime.LockOSThread()
		there, err := os.Open("/run/netns/" + ns)
		if err == nil {
			defer there.Close()
			err = unix.Setns(int(there.Fd()), unix.CLONE_NEWNET)
		}
		if err != nil {
			done <- result{nil, err}
			return
		}
		ln, err := net.Listen("tcp4", addr)
		done <- result{ln, err}
	}()
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) })}
	t.Cleanup(func() { srv.Close() })
	go srv.Serve(r.ln) // until Cleanup
}
