package main

// Tests of handshakes through the gate, honest and not.

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"slices"
	"sync"
	"testing"
)

// A flood that pretends to begin one handshake gets only a few datagrams through.
// Others' handshakes and established connections get all of theirs through.
func TestGateBoundsEachHandshake(t *testing.T) {
	g := newGate()
	initial := func(id string) []byte {
		return append([]byte{0xc0, 0, 0, 0, 1, byte(len(id))}, id+"\x00rest"...)
	}
	passed := 0
	for range 1000 {
		if g.admit(initial("attacker")) {
			passed++
		}
	}
	if passed != handshakeBurst {
		t.Errorf("%d datagrams of one handshake passed, want %d", passed, handshakeBurst)
	}
	if !g.admit(initial("honest")) {
		t.Error("the first datagram of another handshake was dropped")
	}
	for range 100 {
		if !g.admit(append([]byte{0x40}, "attacker"...)) {
			t.Fatal("a packet of an established connection was dropped")
		}
	}
	if id := []byte("again"); !g.count(id, 5) || !g.count(id, 5+handshakeAge) {
		t.Error("a connection ID that comes again much later was dropped")
	}
	for _, broken := range [][]byte{nil, {0xc0}, {0xc0, 0, 0, 0, 1, 8, 1}} {
		if !g.admit(broken) {
			t.Errorf("the gate dropped %x, want it to reach quic-go", broken)
		}
	}
}

// However many handshakes a flood pretends to begin, others' handshakes get through, and
// those that have had all of their datagrams get no more.
func TestGateKeepsNobodyOut(t *testing.T) {
	g := newGate()
	id := func(kind byte, n int) []byte { return binary.BigEndian.AppendUint64([]byte{kind}, uint64(n)) }
	for n := range 1000 {
		for range handshakeBurst {
			g.count(id('a', n), 1)
		}
	}
	for n := range 4 * gateSets * gateWays { // tiny datagrams, say
		g.count(id('f', n), 1)
	}
	again := 0
	for n := range 1000 {
		if g.count(id('a', n), 1) {
			again++
		}
	}
	if again > 10 {
		t.Errorf("%d of 1000 connection IDs got more than their datagrams", again)
	}
	for n := range 4 * gateSets * gateWays { // whole floods
		for range handshakeBurst {
			g.count(id('g', n), 2)
		}
	}
	for n := range 1000 {
		for i := range handshakeBurst {
			if !g.count(id('h', n), 3) {
				t.Fatalf("datagram %d of honest handshake %d was dropped", i, n)
			}
		}
	}
}

// A handshake that takes long gets more datagrams through, but no more than one may have,
// and one that turns out to be hostile gets none.
func TestGateLetsRepetitionsThrough(t *testing.T) {
	g := newGate()
	passed := 0
	for now := range uint64(handshakeAge) {
		for range 4 {
			if g.count([]byte("slow"), now) {
				passed++
			}
		}
		if now == 1 && passed < handshakeBurst+handshakePace {
			t.Errorf("%d datagrams passed within two seconds, want at least %d", passed, handshakeBurst+handshakePace)
		}
	}
	if passed != handshakeDatagrams {
		t.Errorf("%d datagrams passed, want %d", passed, handshakeDatagrams)
	}
	for _, id := range [][]byte{[]byte("hostile"), []byte("known already")} {
		if len(id) > 8 {
			g.count(id, 0)
		}
		if g.spend(id); g.count(id, 1) {
			t.Errorf("a datagram of %q passed although its handshake is hostile", id)
		}
	}
}

// When several goroutines count at once, each datagram is counted exactly once.
func TestGateCountsForSeveralGoroutines(t *testing.T) {
	g := newGate()
	passed := make([]int, 8)
	var counting sync.WaitGroup
	for i := range passed {
		counting.Go(func() {
			for range 1000 {
				if g.count([]byte("one"), 1) {
					passed[i]++
				}
			}
		})
	}
	counting.Wait()
	sum := 0
	for _, n := range passed {
		sum += n
	}
	if sum != handshakeBurst {
		t.Errorf("%d datagrams passed, want %d", sum, handshakeBurst)
	}
}

// The clients' handshakes stay far below the limit, even the large ones of clients
// that offer post-quantum keys and have to prove their address.
func TestHandshakesFitThroughTheGate(t *testing.T) {
	lim := newLimits(100, 256)
	r := newTestRelayWithin(t, lim, defaultConfig(t), newTestKey(t))
	r.sockets.unproven.Add(r.sockets.maxUnproven) // a Retry for everybody
	var mu sync.Mutex
	counts := map[string]int{}
	inner, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	c := newCrowdFrom(t, []*net.UDPConn{inner})
	c.transports[0].Conn = writeWatcher{inner, func(p []byte) {
		if id, ok := handshakeID(p); ok {
			mu.Lock()
			defer mu.Unlock()
			counts[string(bytes.Clone(id))]++
		}
	}}
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	for range 10 {
		if _, err := c.dial(ctx, newLightIdentity(t), r.info); err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	most := 0
	for _, n := range counts {
		most = max(most, n)
	}
	if t.Logf("at most %d datagrams with one connection ID", most); most > handshakeBurst || most == 0 {
		t.Errorf("a handshake sent %d datagrams with one connection ID, want at most %d", most, handshakeBurst)
	}
}

// writeWatcher shows what is written.
type writeWatcher struct {
	net.PacketConn
	show func([]byte)
}

func (w writeWatcher) WriteTo(p []byte, to net.Addr) (int, error) {
	w.show(p)
	return w.PacketConn.WriteTo(p, to)
}

func (w writeWatcher) SetReadBuffer(int) error  { return nil }
func (w writeWatcher) SetWriteBuffer(int) error { return nil }

// Honest datagrams pass unchanged and in order, and those of a flood are dropped,
// even where the kernel has put both into one message.
func TestGateTakesOutWhatIsTooMuch(t *testing.T) {
	initial := make([]byte, 1200)
	initial[0], initial[5], initial[6] = 0xc0, 8, 1
	short := make([]byte, 1200)
	short[0] = 0x40
	tap := newGate().behind(func([]arrival) {})
	for n := range 2 * handshakeBurst {
		a := []arrival{{size: 1200, data: slices.Concat(short, initial, short)}}
		tap(a)
		want := slices.Concat(short, initial, short)
		if n >= handshakeBurst {
			want = slices.Concat(short, short)
		}
		if !bytes.Equal(a[0].data, want) {
			t.Fatalf("message %d: %d bytes are left, want %d", n, len(a[0].data), len(want))
		}
	}
}
