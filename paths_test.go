package main

// Challenges to addresses of clients that move, and of those who never asked.

import (
	"context"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ma "github.com/multiformats/go-multiaddr"
	quicgo "github.com/quic-go/quic-go"
)

// movingSocket is a client's socket that can send from another one. What is sent to that
// one is read from it only if the client has really moved.
type movingSocket struct {
	*net.UDPConn
	other atomic.Pointer[net.UDPConn]
	sent  atomic.Int64 // bytes, from other
}

func (s *movingSocket) WriteTo(p []byte, to net.Addr) (int, error) {
	if other := s.other.Load(); other != nil {
		s.sent.Add(int64(len(p)))
		return other.WriteTo(p, to)
	}
	return s.UDPConn.WriteTo(p, to)
}

// plainConn hides what makes quic-go send in other ways than by WriteTo.
type plainConn struct{ net.PacketConn }

func (plainConn) SetReadBuffer(int) error  { return nil }
func (plainConn) SetWriteBuffer(int) error { return nil }

func listenOn(t *testing.T, ip net.IP) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: ip})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// refused returns how many challenges r has not sent.
func (r testRelay) refused() (n int64) {
	for _, tr := range r.sockets.transports {
		n += tr.Conn.(*guardedSocket).guard.refused.Load()
	}
	return n
}

// Somebody whose address is forged gets no more than three times what the attacker sent,
// and a few challenges. quic-go alone would send many times as much.
func TestForgedMoveIsNotAmplified(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("quic-go marks nothing there, by which the guard tells challenges")
	}
	for _, tt := range []struct {
		name  string
		ip    net.IP
		at    string
		plain bool // as on other systems than Linux
	}{
		{"IPv4", net.IPv4(127, 0, 0, 1), "/ip4/127.0.0.1/udp/%s/quic-v1", false},
		{"IPv6", net.IPv6loopback, "/ip6/::1/udp/%s/quic-v1", false},
		{"plain socket", net.IPv4(127, 0, 0, 1), "/ip4/127.0.0.1/udp/%s/quic-v1", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := defaultConfig(t)
			cfg.testOnlyPlainSockets = tt.plain
			forgeMoves(t, cfg, tt.ip, tt.at)
		})
	}
}

func forgeMoves(t *testing.T, cfg config, loopback net.IP, at string) {
	r := newTestRelay(t, cfg)
	r.info.Addrs = []ma.Multiaddr{ma.StringCast(fmt.Sprintf(at, listenPort(r.relay)))}
	socket, victim := &movingSocket{UDPConn: listenOn(t, loopback)}, listenOn(t, loopback)
	victim.SetReadBuffer(1 << 20)
	tr := &quicgo.Transport{Conn: plainConn{socket}}
	defer tr.Close()
	ctx := testContext(t)
	clients := make([]*lightClient, 60)
	for i := range clients {
		c, err := newLightIdentity(t).dial(ctx, tr, r.info)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.named(ctx, c.id); err != nil {
			t.Fatal(err)
		}
		clients[i] = c
	}

	socket.other.Store(victim)
	// The relay answers an empty stream by ending it, to where the client was. By then it
	// has sent its challenges.
	var asking sync.WaitGroup
	for _, c := range clients {
		asking.Go(func() {
			s, err := c.OpenStreamSync(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			s.SetReadDeadline(time.Now().Add(testTimeout))
			s.Close()
			if _, err := s.Read(make([]byte, 1)); os.IsTimeout(err) {
				t.Error(err)
			}
		})
	}
	asking.Wait()
	socket.other.Store(nil)

	sent, got, buf := socket.sent.Load(), 0, make([]byte, 1<<16)
	victim.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	for {
		n, _, err := victim.ReadFrom(buf)
		if err != nil {
			break
		}
		got += n
	}
	wanted := got + int(r.refused())*challengeSize
	t.Logf("%d bytes sent in the victim's name; quic-go wanted to send it %d (%.1f times as much), and %d were sent (%.1f times)",
		sent, wanted, float64(wanted)/float64(sent), got, float64(got)/float64(sent))
	most := unprovenFactor*int(sent) + freeChallenges*challengeSize
	if got > most {
		t.Errorf("the victim got %d bytes, want at most %d", got, most)
	}
	if wanted <= most {
		t.Errorf("quic-go wanted to send %d bytes: the test shows nothing, or the guard is not needed any more", wanted)
	}
}

// A client that has got another address goes on, even where others have used up the free
// challenges of its network.
func TestMoveIsFollowed(t *testing.T) {
	for _, spent := range []bool{false, true} {
		r := newTestRelay(t, defaultConfig(t))
		socket := &movingSocket{UDPConn: listenOn(t, net.IPv4(127, 0, 0, 1))}
		tr := &quicgo.Transport{Conn: plainConn{&bothSockets{socket}}}
		defer tr.Close()
		ctx := testContext(t)
		c, err := newLightIdentity(t).dial(ctx, tr, r.info)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.named(ctx, c.id); err != nil {
			t.Fatal(err)
		}
		if spent {
			for _, tr := range r.sockets.transports {
				guard := tr.Conn.(*guardedSocket).guard
				for i := range uint16(freeChallenges) {
					guard.spend(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 1+i), guard.now())
				}
			}
		}
		other := listenOn(t, net.IPv4(127, 0, 0, 1))
		socket.other.Store(other)
		socket.UDPConn.SetReadDeadline(time.Now()) // what comes to the old address is lost
		for {
			asked, cancel := context.WithTimeout(ctx, time.Second)
			_, err := c.named(asked, c.id)
			cancel()
			if err == nil {
				break
			}
			if ctx.Err() != nil || c.Context().Err() != nil {
				t.Fatalf("with the free challenges spent: %v: no answer at the new address: %v", spent, err)
			}
		}
		t.Logf("with the free challenges spent: %v: %d refused", spent, r.refused())
		c.CloseWithError(0, "")
	}
}

// bothSockets reads where the client is.
type bothSockets struct{ *movingSocket }

func (s *bothSockets) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		if other := s.other.Load(); other != nil {
			return other.ReadFrom(p)
		}
		n, from, err := s.UDPConn.ReadFrom(p)
		if err == nil || s.other.Load() == nil {
			return n, from, err
		}
	}
}

func (s *bothSockets) SetReadDeadline(t time.Time) error {
	if other := s.other.Load(); other != nil {
		other.SetReadDeadline(t)
	}
	return s.UDPConn.SetReadDeadline(t)
}

// An address gets three times what came from it, its network a few challenges besides, and
// neither lasts.
func TestPathGuardCounts(t *testing.T) {
	at := netip.MustParseAddrPort("192.0.2.1:1")
	g := newPathGuard()
	for slots := 0; slots < 5; { // until no two of the test share a slot
		g = newPathGuard()
		apart := map[uint64]bool{}
		for _, s := range []string{"192.0.2.1:1", "192.0.2.1:2", "192.0.2.2:1"} {
			addr := netip.MustParseAddrPort(s)
			apart[g.hash(addr)%pathSlots] = true
			apart[maphash.Comparable(g.seed, networkOf(addr.Addr()))%pathSlots] = true
		}
		slots = len(apart)
	}
	spent := func(to netip.AddrPort, now int64) (n int) {
		for g.spend(to, now) {
			n++
		}
		return n
	}
	if got := spent(at, 1); got != freeChallenges {
		t.Errorf("%d challenges were sent for nothing, want %d", got, freeChallenges)
	}
	g.credit(at, challengeSize/unprovenFactor-1)
	if got := spent(at, 2); got != 0 {
		t.Errorf("%d challenges were sent for %d bytes, want none", got, challengeSize/unprovenFactor-1)
	}
	g.credit(at, 1)
	if got := spent(at, 2); got != 1 {
		t.Errorf("%d challenges were sent for %d bytes, want one", got, challengeSize/unprovenFactor)
	}
	if got := spent(netip.MustParseAddrPort("192.0.2.1:2"), 3); got != 0 {
		t.Errorf("another port of the network got %d challenges, want none", got)
	}
	if got := spent(netip.MustParseAddrPort("192.0.2.2:1"), 3); got != freeChallenges {
		t.Errorf("another network got %d challenges, want %d", got, freeChallenges)
	}
	if got := spent(at, 1+pathAge); got != freeChallenges {
		t.Errorf("%d challenges were sent for nothing after a while, want %d", got, freeChallenges)
	}
	for range 3 {
		g.credit(at, 1<<30)
	}
	if !g.spend(at, 1+pathAge) {
		t.Error("an address from which gigabytes came gets no challenge")
	}
}
