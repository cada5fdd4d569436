package main

// Tests with addresses of the machine that come and go.

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// A small server starts its services before its network is up, a laptop loses its
// network, a container gets a second one: clients get the addresses that are right
// now.
func TestAddressesThatComeLaterAreTold(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	ns := l.namespace("relay")
	l.in(ns, "ip addr del ::1/128 dev lo")
	l.attach(ns, "lan", l.inet, "192.168.7.1/24")
	cmd := command(t, "--port=4001", "--http-port=4002")
	cmd.Args = append([]string{"ip", "netns", "exec", ns}, cmd.Args...)
	cmd.Path, _ = exec.LookPath("ip")
	p := launch(t, cmd)
	eventually(t, "the relay warns at start", func() bool {
		return strings.Contains(p.stderr.line("no announced address, and none of ours is public"), "192.168.7.1")
	})
	if p.stderr.line("no interface has an IPv6 address") == "" {
		t.Errorf("no warning that IPv6 is missing:\n%s", p.stderr)
	}
	near := l.namespace("near")
	l.attach(near, "lan", l.inet, "192.168.7.2/24", "11.0.0.2/8")
	id, err := peer.Decode(p.peerID)
	if err != nil {
		t.Fatal(err)
	}
	relay := peer.AddrInfo{ID: id, Addrs: []ma.Multiaddr{ma.StringCast("/ip4/192.168.7.1/udp/4001/quic-v1")}}
	c := l.client(near, relay)
	told := func(addr string) bool {
		t.Helper()
		known := c.must(labRequest{Do: "known", Relay: &relay}).Addrs
		reserved := c.must(labRequest{Do: "reserve", Relay: &relay}).Addrs
		if slices.Contains(reserved, "/ip4/127.0.0.1/udp/4001/quic-v1/p2p/"+p.peerID) {
			t.Errorf("the reservation has loopback addresses: %v", reserved)
		}
		return slices.Contains(known, addr) && slices.Contains(reserved, addr+"/p2p/"+p.peerID)
	}

	const public = "/ip4/11.0.0.1/udp/4001/quic-v1"
	if told(public) {
		t.Fatal("the client got the address before the interface had it")
	}
	l.attach(ns, "wan", l.inet, "11.0.0.1/8")
	eventually(t, "the client gets "+public, func() bool { return told(public) })
	eventually(t, "the log takes the warning back", func() bool {
		return strings.Contains(p.stderr.line("a public address appeared"), "11.0.0.1")
	})
	l.in(ns, "ip addr add 2a00::1/16 dev wan nodad")
	eventually(t, "the client gets the IPv6 address", func() bool { return told("/ip6/2a00::1/udp/4001/quic-v1") })
	eventually(t, "the log takes the IPv6 warning back", func() bool {
		return p.stderr.line("an interface has an IPv6 address now") != ""
	})
	l.in(ns, "ip link set wan down")
	eventually(t, "the client no longer gets the address", func() bool { return !told(public) })
	eventually(t, "the log warns again", func() bool {
		return strings.Count(p.stderr.String(), "none of ours is public") == 2
	})
	l.in(ns, "ip link set wan up")
	eventually(t, "the client gets the address again", func() bool { return told(public) })
	l.in(ns, "ip link del wan")
	eventually(t, "the client no longer gets the address of a deleted interface", func() bool { return !told(public) })
}

// We read the addresses 60 times as often as go-libp2p does, so each read must cost
// next to nothing.
func BenchmarkInterfaces(b *testing.B) {
	var i interfaces
	for b.Loop() {
		if _, err := i.read(); err != nil {
			b.Fatal(err)
		}
	}
}
