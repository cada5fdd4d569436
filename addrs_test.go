package main

// Which addresses belong together, and which of those that clients name are used.

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// Two devices of one home share the NAT's IPv4 address, but only 64 bits of their
// IPv6 addresses. If the relay took them for strangers, they would not learn of
// each other's LAN addresses.
func TestSameLAN(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"11.2.0.1", "11.2.0.1", true},
		{"11.2.0.1", "11.2.0.2", false},
		{"2a00:1:2:3::10", "2a00:1:2:3:aaaa:bbbb:cccc:dddd", true},
		{"2a00:1:2:3::10", "2a00:1:2:4::10", false},
		{"11.2.0.1", "2a00:1:2:3::10", false},
		{"2a00:1:2:3::10", "11.2.0.1", false},
	} {
		if got := sameLAN(netip.MustParseAddr(tt.a), netip.MustParseAddr(tt.b)); got != tt.want {
			t.Errorf("sameLAN(%s, %s) = %v, want %v", tt.a, tt.b, got, tt.want)
		}
	}
	if sameLAN(netip.Addr{}, netip.Addr{}) {
		t.Error("two unknown addresses are taken for one home")
	}
}

// Addresses that a client reports are filtered before others learn them.
func TestUsableAddrs(t *testing.T) {
	self, other, relayID := newTestPeerID(t), newTestPeerID(t), newTestPeerID(t)
	circuit := "/ip4/203.0.113.9/udp/4001/quic-v1/p2p/" + relayID.String() + "/p2p-circuit"
	remote := "/ip4/198.51.100.1/udp/5/quic-v1"
	tests := []struct {
		name, remote string
		reported     []string
		want         []string
	}{
		{"circuits first, then public addresses, then the LAN", remote,
			[]string{"/ip4/192.168.1.2/udp/1/quic-v1", "/ip4/8.8.8.8/udp/2/quic-v1", circuit},
			[]string{circuit, "/ip4/8.8.8.8/udp/2/quic-v1", "/ip4/192.168.1.2/udp/1/quic-v1"}},
		{"its own ID is cut off", remote,
			[]string{"/ip4/8.8.8.8/udp/2/quic-v1/p2p/" + self.String(), circuit + "/p2p/" + self.String()},
			[]string{circuit, "/ip4/8.8.8.8/udp/2/quic-v1"}},
		{"another peer's ID", remote,
			[]string{"/ip4/8.8.8.8/udp/2/quic-v1/p2p/" + other.String(), circuit + "/p2p/" + other.String(), "/p2p/" + self.String()}, nil},
		{"loopback from outside", remote, []string{"/ip4/127.0.0.1/udp/2/quic-v1", "/ip6/::1/udp/2/quic-v1"}, nil},
		{"loopback from here", "/ip4/127.0.0.1/udp/5/quic-v1", []string{"/ip4/127.0.0.1/udp/2/quic-v1"}, []string{"/ip4/127.0.0.1/udp/2/quic-v1"}},
		{"more parts than any real address has", remote, []string{"/ip4/8.8.8.8" + strings.Repeat("/p2p-circuit", 20)}, nil},
		{"unspecified", remote, []string{"/ip4/0.0.0.0/udp/2/quic-v1", "/ip6/::/udp/2/quic-v1"}, nil},
		{"names", remote, []string{"/dns4/home.example.org/udp/2/quic-v1"}, []string{"/dns4/home.example.org/udp/2/quic-v1"}},
		{"not in an IP network", remote, []string{"/unix/tmp/sock", "/p2p-circuit", "/memory/4"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var reported []ma.Multiaddr
			for _, s := range tt.reported {
				reported = append(reported, ma.StringCast(s))
			}
			got := strs(usableAddrs(self, append(reported, nil), ma.StringCast(tt.remote)))
			if !slices.Equal(got, tt.want) {
				t.Errorf("usableAddrs(%v) = %v, want %v", tt.reported, got, tt.want)
			}
		})
	}
}

// Whatever a client reports, others are told addresses that are bounded, readable and
// name no other peer.
func FuzzUsableAddrs(f *testing.F) {
	self, other := newTestPeerID(f), newTestPeerID(f)
	remote := ma.StringCast("/ip4/198.51.100.1/udp/5/quic-v1")
	for _, s := range []string{
		"/ip4/8.8.8.8/udp/2/quic-v1/p2p/" + self.String(), "/ip4/8.8.8.8/udp/2/quic-v1/p2p/" + other.String(),
		"/ip6/2001:db8::1/udp/4001/quic-v1/p2p/" + other.String() + "/p2p-circuit", "/dns4/a.example/udp/1/quic-v1", "/unix/a", "/p2p-circuit",
	} {
		f.Add(ma.StringCast(s).Bytes())
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		addr, err := ma.NewMultiaddrBytes(raw)
		if err != nil {
			return // identify drops it
		}
		for _, a := range usableAddrs(self, []ma.Multiaddr{addr, addr}, remote) {
			if _, id := peer.SplitAddr(a); id != "" || len(a) == 0 || len(a.Bytes()) > maxAddrBytesPerPeer {
				t.Errorf("%v was reported, and others are told %v", addr, a)
			}
			if _, err := ma.NewMultiaddrBytes(a.Bytes()); err != nil {
				t.Errorf("%v was reported, and others are told %v, which no client can read: %v", addr, a, err)
			}
		}
	})
}

// We tell only the client itself where it says that it reaches the relay, and only
// if that address can be dialled.
func TestReachedAddr(t *testing.T) {
	id := newTestPeerID(t)
	for said, want := range map[string]bool{
		"/ip4/203.0.113.7/udp/4001/quic-v1":                                     true,
		"/ip6/2001:db8::7/udp/4001/quic-v1":                                     true,
		"/ip4/192.168.1.7/udp/14001/quic-v1/p2p/" + id.String():                 true,
		"/ip6/64:ff9b::203.0.113.7/udp/4001/quic-v1":                            true, // through NAT64
		"/ip4/127.0.0.1/udp/4001/quic-v1":                                       false,
		"/ip4/0.0.0.0/udp/4001/quic-v1":                                         false,
		"/ip4/224.0.0.1/udp/4001/quic-v1":                                       false,
		"/ip4/203.0.113.7/udp/0/quic-v1":                                        false,
		"/ip4/203.0.113.7/tcp/4001":                                             false,
		"/ip4/203.0.113.7/udp/4001":                                             false,
		"/dns4/relay.example/udp/4001/quic-v1":                                  false,
		"/ip4/203.0.113.7/udp/4001/quic-v1/p2p/" + id.String() + "/p2p-circuit": false,
	} {
		got := reachedAddr(ma.StringCast(said), ma.StringCast("/ip4/198.51.100.1/udp/9/quic-v1"))
		if (got != nil) != want || want && len(got) != 3 {
			t.Errorf("reachedAddr(%s) = %v, want an address: %v", said, got, want)
		}
	}
	if got := reachedAddr(nil, nil); got != nil {
		t.Errorf("reachedAddr(nil) = %v", got)
	}
	if got := reachedAddr(ma.StringCast("/ip4/127.0.0.1/udp/4001/quic-v1"), ma.StringCast("/ip4/127.0.0.1/udp/9/quic-v1")); got == nil {
		t.Error("over loopback, a loopback address was refused")
	}
}
