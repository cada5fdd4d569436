package main

// What the path guard lets through, told by the marks that Linux has on datagrams.

import (
	"net"
	"net/netip"
	"testing"

	xipv4 "golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// plainControl and markedControl are what quic-go sends with a challenge and with a packet
// of an established connection.
func plainControl() []byte { return (&xipv4.ControlMessage{Src: net.IPv4(127, 0, 0, 1)}).Marshal() }

func markedControl() []byte {
	control, _ := appendControl(plainControl(), unix.IPPROTO_IP, unix.IP_TOS, 1)
	return control
}

// Whatever is no challenge passes, and nothing is held back where quic-go marks nothing.
func TestPathGuardLeavesTheRestAlone(t *testing.T) {
	to := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
	plain := plainControl()
	short, long := make([]byte, challengeSize), make([]byte, challengeSize)
	short[0], long[0] = 0x40, 0xc0
	g := newPathGuard()
	all := func(d, control []byte) bool {
		for range 2 * freeChallenges {
			if !g.admits(d, control, to) {
				return false
			}
		}
		return true
	}
	if !all(short, plain) {
		t.Error("a socket without marks holds datagrams back")
	}
	if !all(short, markedControl()) {
		t.Error("a packet of a connection was held back")
	}
	if all(short, plain) {
		t.Error("challenges to one address are never held back")
	}
	for _, d := range [][]byte{nil, long, short[:challengeSize-1], make([]byte, 10*challengeSize)} {
		if !all(d, plain) {
			t.Errorf("%d bytes that begin with %.1x were held back", len(d), d)
		}
	}
}

// What the guard costs for each datagram of an established connection.
func BenchmarkPathGuard(b *testing.B) {
	g, to := newPathGuard(), &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
	d := make([]byte, challengeSize)
	control := markedControl()
	batch := []arrival{{from: addrPort(to), size: len(d), data: d}}
	b.Run("sent", func(b *testing.B) {
		for b.Loop() {
			g.admits(d, control, to)
		}
	})
	b.Run("arrived", func(b *testing.B) {
		for b.Loop() {
			g.arrived(batch)
		}
	})
	b.Run("arrived while somebody moves", func(b *testing.B) {
		g.spend(netip.MustParseAddrPort("192.0.2.9:1"), g.now())
		for b.Loop() {
			g.arrived(batch)
		}
	})
}
