package main

// Networks that change under a running relay, in the NAT lab.

import (
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// received returns how many bytes have come to ns from outside.
func (l *lab) received(ns string) int64 {
	l.t.Helper()
	out, err := exec.Command("ip", "netns", "exec", ns, "cat", "/sys/class/net/wan/statistics/rx_bytes").Output()
	if err != nil {
		l.t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	if err != nil {
		l.t.Fatal(err)
	}
	return n
}

// underWay starts do, and returns once ns has received much more from outside. What do
// returns can then be read.
func (l *lab) underWay(ns string, do func() error) <-chan error {
	l.t.Helper()
	before, done := l.received(ns), make(chan error, 1)
	go func() { done <- do() }()
	eventually(l.t, ns+" receives", func() bool { return l.received(ns) > before+1<<20 })
	return done
}

// circuitPair returns two clients behind NATs between which only a circuit is possible,
// which is open, and their routers.
func (l *lab) circuitPair(relay peer.AddrInfo) (a, b *labClient, routers [2]string) {
	l.t.Helper()
	var ends [2]*labClient
	for i, name := range []string{"a", "b"} {
		routers[i] = l.router("r"+name, fmt.Sprintf("11.2.0.%d/8", i+1), endpointDependent)
		ends[i] = l.client(l.home(name, routers[i], 10), relay)
	}
	a, b = ends[0], ends[1]
	b.must(labRequest{Do: "reserve"})
	a.must(labRequest{Do: "circuit", Peer: &peer.AddrInfo{ID: b.id}})
	return a, b, routers
}

// relayInCloud runs a relay behind a 1:1 NAT, and returns the router, too.
func (l *lab) relayInCloud() (cloud string, relay peer.AddrInfo) {
	l.t.Helper()
	cloud = l.router("cloud", "11.0.0.1/8", endpointIndependent)
	l.nft(cloud, `table ip cloud {
		chain arriving { type nat hook prerouting priority dstnat; iifname "wan" ip daddr 11.0.0.1 dnat to 192.168.1.10; }
	}`)
	return cloud, l.relay(l.home("relay", cloud, 10), []string{relayV4}, "--announce=11.0.0.1")
}

// shrink lets the paths that leave routers carry 1280 bytes, and says so by ICMP or not.
func (l *lab) shrink(told bool, routers ...string) {
	l.t.Helper()
	for _, r := range routers {
		if !told {
			l.nft(r, "table ip silent {\n chain sent {\n type filter hook output priority filter; meta l4proto icmp drop\n }\n }")
		}
		l.in(r, "ip link set wan mtu 1280")
	}
}

// A firewall that is loaded anew, a full queue, or an address that is given to the
// machine again, is no reason to end what all clients do.
func TestRefusedSendsEndNothing(t *testing.T) {
	out := func(rule string) string {
		return "table ip refused {\n chain sent {\n type filter hook output priority filter; meta l4proto udp " + rule + "\n }\n }"
	}
	for _, tt := range []struct {
		name    string
		trouble func(l *lab, relay string)
	}{
		{"nothing is sent for 100 ms", func(l *lab, relay string) {
			l.nft(relay, out("drop"))
			time.Sleep(100 * time.Millisecond)
			l.in(relay, "nft delete table ip refused")
		}},
		{"one in 200 is refused", func(l *lab, relay string) { l.nft(relay, out("numgen random mod 200 < 1 drop")) }},
		{"the address is away for 1 s", func(l *lab, relay string) {
			l.in(relay, "ip addr del 11.0.0.1/8 dev wan")
			time.Sleep(time.Second)
			l.in(relay, "ip addr add 11.0.0.1/8 dev wan")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t)
			ns := l.public("relay", "11.0.0.1/8")
			relay := l.relay(ns, []string{relayV4})
			a, b, routers := l.circuitPair(relay)
			var c [2]*labClient // that meet over the bridge
			for i := range c {
				c[i] = l.labClientOf(l.home(fmt.Sprint("c", i), l.router(fmt.Sprint("rc", i), fmt.Sprintf("11.3.0.%d/8", i+1), endpointDependent), 10), "plain")
				if err := c[i].join(relay); err != nil {
					t.Fatal(err)
				}
				c[i].must(labRequest{Do: "put"})
			}
			bridged := labRequest{Do: "bridge", Peer: &peer.AddrInfo{ID: c[1].id}}
			eventually(t, "two clients meet over the bridge", func() bool { _, err := c[0].try(bridged); return err == nil })
			asker := l.client(l.public("asker", "11.4.0.1/8"), relay)
			asker.must(labRequest{Do: "put"})

			const size = 128 << 20
			circuit := l.underWay(routers[1], func() error {
				resp, err := a.try(labRequest{Do: "sync", Peer: &peer.AddrInfo{ID: b.id}, Bytes: size})
				if err == nil && !resp.Circuit {
					err = fmt.Errorf("it was no circuit")
				}
				return err
			})
			bridge := l.underWay(ns, func() error {
				_, err := c[0].try(labRequest{Do: "sync", Peer: &peer.AddrInfo{ID: c[1].id}, Bytes: size})
				return err
			})
			asked := make(chan error, 1)
			go func() { _, err := asker.try(labRequest{Do: "get"}); asked <- err }()
			tt.trouble(l, ns) // takes as long as the trouble lasts
			for name, done := range map[string]<-chan error{"circuit": circuit, "bridge": bridge, "request": asked} {
				if err := <-done; err != nil {
					t.Errorf("the %s ended: %v", name, err)
				}
			}
			for _, client := range []*labClient{a, b, c[0], c[1], asker} {
				client.must(labRequest{Do: "get"})
			}
		})
	}
}

// A path that carries less from one moment on, as when a line falls back to a tunnel,
// holds nobody up for good.
func TestPathThatShrinks(t *testing.T) {
	for _, told := range []bool{true, false} {
		t.Run(fmt.Sprintf("ICMP=%v", told), func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			cloud, relay := l.relayInCloud()
			a, b, routers := l.circuitPair(relay)
			peer := &peer.AddrInfo{ID: b.id}
			if _, err := a.try(labRequest{Do: "sync", Peer: peer, Bytes: 4 << 20}); err != nil { // finds out what the path carries
				t.Fatal(err)
			}
			var resp labResponse
			sync := l.underWay(routers[1], func() (err error) {
				resp, err = a.try(labRequest{Do: "sync", Peer: peer, Bytes: 128 << 20})
				return err
			})
			l.shrink(told, cloud, routers[0], routers[1])
			if err := <-sync; err != nil {
				t.Errorf("the circuit ended: %v", err)
			}
			t.Logf("128 MiB in %.1f s", float64(resp.Millis)/1000)
			for _, c := range []*labClient{a, b} {
				c.must(labRequest{Do: "put"})
				c.must(labRequest{Do: "get"})
			}
		})
	}
}
