package main

// Tests of the bridge's state machine, packet by packet, without sockets, clients or
// QUIC.

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/time/rate"
)

// wire stands in for the sockets of a bridge under test, and keeps what is sent.
type wire struct {
	udpSocket // implements only send

	mu   sync.Mutex
	sent []datagram
}

type datagram struct {
	to   netip.AddrPort
	data string
}

func (w *wire) send(parts [][]byte, size int, _ byte, to netip.AddrPort, _ source) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range parts {
		for d := range slices.Chunk(p, size) {
			w.sent = append(w.sent, datagram{to, string(d)})
		}
	}
}

// taken returns what has been sent since the last call.
func (w *wire) taken() (sent []datagram) {
	w.mu.Lock()
	defer w.mu.Unlock()
	sent, w.sent = w.sent, nil
	return sent
}

// nobody implements a network without connections.
type nobody struct{ network.Network }

func (nobody) ConnsToPeer(peer.ID) []network.Conn { return nil }

// bridgeUnderTest wraps a bridge whose clients are actors, and whose clock the test
// sets.
type bridgeUnderTest struct {
	*bridge
	testing.TB
	wire *wire
	now  clock
}

func newBridgeUnderTest(t testing.TB, clients int) *bridgeUnderTest {
	b := newBridge(slog.New(slog.DiscardHandler), new(tally), limits{clients: clients}, newPeers(slog.New(slog.DiscardHandler)), func(peer.ID) bool { return false })
	b.network = nobody{}
	b.testOnlyAfter = func(time.Duration, func()) {} // due calls it
	u := &bridgeUnderTest{b, t, new(wire), time.Hour}
	// Keep whatever reads the clock close to u.now.
	b.began = time.Now().Add(-u.now)
	for _, sd := range b.sides {
		sd.socket = u.wire
	}
	return u
}

// actor plays a client.
type actor struct {
	u      *bridgeUnderTest
	id     peer.ID
	at     whereabouts
	closed bool
}

func (a *actor) where() (whereabouts, bool) { return a.at, !a.closed }

func (u *bridgeUnderTest) actor(addr string) *actor {
	return &actor{u: u, id: peer.ID(addr), at: whereabouts{addr: netip.MustParseAddrPort(addr)}}
}

// told offers the mates to a, and returns the one that a may dial.
func (a *actor) told(mates ...*actor) peer.ID {
	var all []candidate
	for _, m := range mates {
		all = append(all, newCandidate(m.id, m, m.at.addr.Addr(), a.at.addr.Addr()))
	}
	next, _ := a.u.offer(a.id, a, all, a.u.now)
	return next
}

// says sends datagrams in one message from a, and returns what is left for quic-go.
func (a *actor) says(datagrams ...[]byte) []byte {
	a.u.Helper()
	batch := []arrival{{from: a.at.addr, size: len(datagrams[0]), data: slices.Concat(datagrams...)}}
	a.u.tick(0)
	a.u.sideOf(a.at.addr.Addr()).take(batch)
	return batch[0].data
}

// tick lets time pass.
func (u *bridgeUnderTest) tick(d time.Duration) {
	u.now += d
	u.began = time.Now().Add(-u.now)
}

// due releases the dials that have been held for long enough.
func (u *bridgeUnderTest) due() {
	for _, c := range u.clients {
		for _, e := range c.ends {
			for _, f := range e.flows {
				for _, d := range slices.Clone(f.dials) {
					if d.holding && u.now-d.began >= d.hold {
						d.release()
					}
				}
			}
		}
	}
}

// got fails unless the wire has carried exactly these datagrams to a since the last
// call.
func (a *actor) got(want ...[]byte) {
	a.u.Helper()
	var w []datagram
	for _, d := range want {
		w = append(w, datagram{a.at.addr, string(d)})
	}
	if sent := a.u.wire.taken(); !slices.Equal(sent, w) {
		a.u.Errorf("%d datagrams were sent, want %d to %v", len(sent), len(w), a.at.addr)
		for _, d := range sent {
			a.u.Logf("to %v: %.12x… (%d bytes)", d.to, d.data, len(d.data))
		}
	}
}

const initial, handshaking = 0xc0, 0xe0

// longPacket returns a packet with a long header (RFC 9000, 17.2).
func longPacket(first byte, dest, source string) []byte {
	d := binary.BigEndian.AppendUint32([]byte{first}, 1)
	d = append(append(d, byte(len(dest))), dest...)
	d = append(append(d, byte(len(source))), source...)
	return append(d, bytes.Repeat([]byte{0xaa}, 1200-len(d))...)
}

// shortPacket returns a packet with a short header.
func shortPacket(dest string, size int) []byte {
	d := append([]byte{0x40}, dest...)
	return append(d, bytes.Repeat([]byte{0xbb}, size-len(d))...)
}

// connected takes a and b through a handshake in which they use these IDs, and fails
// unless the bridge forwards all of it.
func (u *bridgeUnderTest) connected(a, b *actor, idA, idB string) {
	u.Helper()
	if a.told(b) != b.id {
		u.Fatal("no offer")
	}
	first := longPacket(initial, "firstdest"+idA, idA)
	if left := a.says(first); len(left) > 0 {
		u.Fatal("the Initial went to quic-go")
	}
	b.got()
	f := u.flow(a, b)
	f.dials[len(f.dials)-1].release()
	b.got(first)
	answer := longPacket(initial, idA, idB)
	b.says(answer)
	a.got(answer)
	done := longPacket(handshaking, idB, idA)
	a.says(done)
	b.got(done)
	for range 2 {
		a.says(shortPacket(idB, 60))
		b.got(shortPacket(idB, 60))
		b.says(shortPacket(idA, 60))
		a.got(shortPacket(idA, 60))
	}
	if !f.established {
		u.Fatal("the flow is not established")
	}
}

// flow returns the flow between a and b, or nil.
func (u *bridgeUnderTest) flow(a, b *actor) *flow {
	e := u.sideOf(a.at.addr.Addr()).ends[a.at.addr]
	if e == nil {
		return nil
	}
	for _, f := range e.flows {
		if f.legTo(e).end.addr() == b.at.addr {
			return f
		}
	}
	return nil
}

// counted fails unless the number of refusals for that reason is want.
func (u *bridgeUnderTest) counted(why refusal, want int64) {
	u.Helper()
	if got := u.tally.refused[why].Load(); got != want {
		u.Errorf("%v = %d, want %d", why, got, want)
	}
}

// Traffic that has nothing to do with the bridge passes untouched.
func TestBridgeLeavesOthersAlone(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b, other := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2"), u.actor("192.0.2.9:9")
	u.connected(a, b, "aaaaaaaa", "bbbbbbbb")
	own, _ := u.GenerateConnectionID()
	for _, d := range [][]byte{
		longPacket(initial, "whatever", "12345678"), longPacket(handshaking, "whatever", "12345678"),
		shortPacket("bbbbbbbb", 100), shortPacket(string(own.Bytes()), 100), {0x40}, {0xc0}, {0xc0, 0, 0, 0, 1, 255}, {0},
	} {
		if left := other.says(d); !bytes.Equal(left, d) {
			t.Errorf("a stranger's %.12x: %d bytes are left, want all", d, len(left))
		}
	}
	// Packets of a client's own connection with the relay do not go to the mate.
	for _, d := range [][]byte{shortPacket(string(own.Bytes()), 100), longPacket(handshaking, string(own.Bytes()), "xxxxxxxx")} {
		if left := a.says(d); !bytes.Equal(left, d) {
			t.Errorf("a client's own %.12x: %d bytes are left, want all", d, len(left))
		}
	}
	b.got()
}

// The datagrams of one message each go where they belong, in their order.
func TestBridgeSplitsAMessage(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b, c := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2"), u.actor("[2001:db8::3]:3")
	u.connected(a, b, "aaaaaaaa", "bbbbbbbb")
	u.connected(a, c, "aaaaaaaA", "cccccccc")
	own := func(fill byte) []byte {
		id, _ := u.GenerateConnectionID()
		return append(shortPacket(string(id.Bytes()), 99), fill)
	}
	r1, r2, r3 := own(1), own(2), own(3)
	toB, toC := shortPacket("bbbbbbbb", 100), shortPacket("cccccccc", 100)
	last := shortPacket("bbbbbbbb", 40)
	left := a.says(r1, toB, toB, r2, toC, r3, toB, last)
	if !bytes.Equal(left, slices.Concat(r1, r2, r3)) {
		t.Errorf("%d bytes are left, want the three datagrams for the relay", len(left))
	}
	var b4, c4 int
	for _, d := range u.wire.taken() {
		switch {
		case d.to == b.at.addr && (d.data == string(toB) || d.data == string(last)):
			b4++
		case d.to == c.at.addr && d.data == string(toC):
			c4++
		default:
			t.Errorf("to %v: %.12x", d.to, d.data)
		}
	}
	if b4 != 4 || c4 != 1 {
		t.Errorf("b got %d datagrams and c %d, want 4 and 1", b4, c4)
	}
	// A batch of several messages of one flow is sent as it came.
	batch := []arrival{
		{from: a.at.addr, size: 100, data: slices.Concat(toB, toB)},
		{from: a.at.addr, size: 100, data: slices.Concat(toC, toB)},
		{from: a.at.addr, size: 40, data: slices.Clone(last)},
		{from: a.at.addr, size: 100, data: slices.Clone(toB)},
	}
	u.sides[0].take(batch)
	var got []string
	for _, d := range u.wire.taken() {
		if d.to == b.at.addr {
			got = append(got, d.data)
		}
	}
	if want := []string{string(toB), string(toB), string(toB), string(last), string(toB)}; !slices.Equal(got, want) {
		t.Errorf("b got %d datagrams, want 5 in the order sent", len(got))
	}
	for _, m := range batch {
		if len(m.data) != 0 {
			t.Errorf("%d bytes are left", len(m.data))
		}
	}
}

// When a direct path has won meanwhile, the bridge drops the dial, and the mate
// hears nothing of it.
func TestDirectWins(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2")
	a.told(b)
	a.says(longPacket(initial, "firstdest", "aaaaaaaa"))
	u.tick(40 * time.Millisecond)
	a.says(longPacket(initial, "firstdest", "aaaaaaaa")) // closes the connection
	u.tick(maxHold)
	u.due()
	b.got()
	// The dropped dial counts as no refusal, and its flow ends.
	u.tick(unansweredTime)
	u.sweep(u.now)
	u.counted(refusedBridgeUnanswered, 0)
	if f := u.flow(a, b); f != nil {
		t.Error("the flow is still there")
	}
}

// quic-go's first flight has two datagrams. Both are held, and both go.
func TestFirstFlightIsHeld(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2")
	a.at.rtt, b.at.rtt = 20*time.Millisecond, 40*time.Millisecond
	a.told(b)
	first, second := longPacket(initial, "firstdest", "aaaa"), longPacket(initial|1, "firstdest", "aaaa")
	a.says(first)
	u.tick(time.Millisecond)
	a.says(second)
	u.tick(minHold + 30*time.Millisecond - 2*time.Millisecond)
	u.due()
	b.got()
	u.tick(2 * time.Millisecond)
	u.due()
	b.got(first, second)
	// Nobody answers, so only a few retransmissions may go.
	for range 100 {
		u.tick(10 * time.Millisecond)
		a.says(first)
	}
	if n := len(u.wire.taken()); n != unansweredDatagrams-2 {
		t.Errorf("%d retransmissions went to a mate that has not answered, want %d", n, unansweredDatagrams-2)
	}
	u.counted(refusedBridgeUnanswered, 100-(unansweredDatagrams-2))
}

// A client that seemed to give up, but did not, gets through when it sends again.
func TestSlowDialGoesOn(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2")
	a.told(b)
	first := longPacket(initial, "firstdest", "aaaa")
	a.says(first)
	u.tick(50 * time.Millisecond)
	a.says(first)
	u.tick(maxHold)
	u.due()
	b.got()
	a.says(first)
	b.got(first)
	answer := longPacket(initial, "aaaa", "bbbb")
	b.says(answer)
	a.got(answer)
}

// quinn switches to another ID once, as server. It may have several mates at that
// moment.
func TestQuinnSwitchesItsID(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	server := u.actor("192.0.2.9:9")
	var mates []*actor
	for i := range 4 {
		m := u.actor(fmt.Sprintf("192.0.2.%d:1", i+1))
		mates = append(mates, m)
		u.connected(m, server, fmt.Sprintf("mate000%d", i), fmt.Sprintf("serv000%d", i))
		next := shortPacket(fmt.Sprintf("next000%d", i), 80)
		for range 3 {
			server.says(next)
			m.got(next)
		}
	}
	for i, m := range mates {
		d := shortPacket(fmt.Sprintf("next000%d", i), 80)
		server.says(d)
		m.got(d)
		d = shortPacket(fmt.Sprintf("serv000%d", i), 80)
		m.says(d)
		server.got(d)
	}
	// Packets with an ID that nobody gave out go to nobody.
	u.tick(switchTime)
	server.says(shortPacket("nobodys!", 80))
	u.wire.mu.Lock()
	defer u.wire.mu.Unlock()
	if len(u.wire.sent) != 0 {
		t.Error("an unknown ID was forwarded")
	}
}

// quic-go switches to another ID after the handshake, on both sides, and again after
// some thousand packets. This may happen with several mates at once.
func TestQuicGoSwitchesItsIDs(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a := u.actor("192.0.2.9:9")
	var mates []*actor
	id := func(of string, i, n int) string { return fmt.Sprintf("%s%d%d.", of, i, n) }
	for i := range 3 {
		m := u.actor(fmt.Sprintf("192.0.2.%d:1", i+1))
		mates = append(mates, m)
		if i == 1 {
			u.connected(a, m, id("a", i, 0), id("m", i, 0))
		} else {
			u.connected(m, a, id("m", i, 0), id("a", i, 0))
		}
		for range 3 { // a sends with the IDs that m gave out
			d := shortPacket(id("m", i, 1), 80)
			a.says(d)
			m.got(d)
			d = shortPacket(id("a", i, 1), 80)
			m.says(d)
			a.got(d)
		}
	}
	// All mates are busy, and each switches to another ID in its turn.
	for n := 1; n < 6; n++ {
		for i, m := range mates {
			for range switchPackets + 100 {
				for j, o := range mates {
					at := n
					if j < i {
						at = n + 1
					}
					d := shortPacket(id("m", j, at), 30)
					a.says(d)
					o.got(d)
					if t.Failed() {
						t.Fatal(n, i, j)
					}
				}
			}
			// Other mates send at the same moment, and some of these packets may go
			// out twice. Then no more do.
			d := shortPacket(id("m", i, n+1), 30)
			for range 5 {
				a.says(d)
				u.tick(10 * time.Millisecond)
				for j, o := range mates {
					if j != i {
						at := n
						if j < i {
							at = n + 1
						}
						a.says(shortPacket(id("m", j, at), 30))
						_ = o
					}
				}
			}
			arrived := slices.ContainsFunc(u.wire.taken(), func(s datagram) bool { return s.to == m.at.addr && s.data == string(d) })
			if !arrived {
				t.Fatalf("switch %d of mate %d never arrived", n, i)
			}
			a.says(d)
			m.got(d)
			u.sweep(u.now)
		}
	}
}

// Two mates call at the same moment. Until the callee has switched to the ID that it
// will use with the first, nobody could tell whom its next ID is for.
func TestOneHandshakeAtATime(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b, callee := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2"), u.actor("192.0.2.9:9")
	a.told(callee)
	b.told(callee)
	fromA, fromB := longPacket(initial, "firstdestA", "aaaaaaaa"), longPacket(initial, "firstdestB", "bbbbbbbb")
	a.says(fromA)
	u.tick(time.Millisecond)
	b.says(fromB)
	u.tick(maxHold)
	u.flow(a, callee).dials[0].release()
	callee.got(fromA)
	u.due()
	callee.got()
	answer := longPacket(initial, "aaaaaaaa", "cccccccA")
	callee.says(answer)
	a.got(answer)
	u.due()
	callee.got()
	for range 2 {
		callee.says(shortPacket("switched", 80))
		a.got(shortPacket("switched", 80))
	}
	u.due()
	callee.got(fromB)
}

// An Initial that follows no answer goes to the only mate that the client has not
// met, because another mate may have told of that one. Without such a mate it is
// dropped once, and then goes to quic-go.
func TestWhoseInitialItIs(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b, c := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2"), u.actor("192.0.2.3:3")
	if got := a.told(b, c); got != b.id {
		t.Errorf("offered %q, want the first mate", got)
	}
	u.connected(a, b, "aaaaaaaa", "bbbbbbbb")
	u.tick(time.Second)
	if got := a.told(b, c); got != c.id {
		t.Errorf("offered %q, want the mate not met yet", got)
	}
	u.tick(offerTime)
	d := longPacket(initial, "firstdestC", "aaaaaaaC")
	if left := a.says(d); len(left) != 0 {
		t.Error("the Initial went to quic-go")
	}
	u.tick(maxHold)
	u.due()
	c.got(d)
	u.connected(a, c, "aaaaaaac", "cccccccc")
	stray := longPacket(initial, "another!", "aaaaaaa2")
	if left := a.says(stray); len(left) != 0 {
		t.Error("a stray Initial went to quic-go at once")
	}
	u.counted(refusedBridgeStray, 1)
	if left := a.says(stray); !bytes.Equal(left, stray) {
		t.Error("a repeated stray Initial did not go to quic-go")
	}
	// A client that is no longer connected here wants the relay itself.
	a.closed = true
	again := longPacket(initial, "another!", "aaaaaaa3")
	if left := a.says(again); !bytes.Equal(left, again) {
		t.Error("the Initial of a client whose connection has ended did not go to quic-go")
	}
}

// A device that was killed and came back under the same ID has forgotten its mate.
// It is offered the mate again, though its old self still looks connected.
func TestBackUnderTheSameID(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2")
	u.connected(a, b, "aaaaaaaa", "bbbbbbbb")
	u.tick(busyHold + time.Second)
	if got := a.told(b); got != "" {
		t.Errorf("offered %v, want none because they have met", got)
	}
	back := u.actor("192.0.2.1:3")
	back.id = a.id
	u.connected(back, b, "aaaaaaaA", "bbbbbbbB")
}

// A relay that has restarted knows nobody. When a client dials it and, at the same
// moment, its mates, the relay must not answer in place of a mate.
func TestDialsOfNewcomersWait(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2")
	relay, mate := longPacket(initial, "firstdest", "toRelay!"), longPacket(initial, "firstdest", "toMate!!")
	if left := a.says(relay, mate); !bytes.Equal(left, relay) {
		t.Errorf("%d bytes are left, want the first Initial", len(left))
	}
	a.told(b) // meanwhile
	u.tick(time.Second)
	a.says(mate)
	u.tick(maxHold)
	u.due()
	b.got(mate)

	// Once the relay has answered a client's first dial, that moment is over.
	d, e := u.actor("192.0.2.4:4"), longPacket(initial, "firstdest", "toRelay2")
	own, _ := u.GenerateConnectionID()
	for _, p := range [][]byte{longPacket(initial, "firstdest", "toRelay1"), longPacket(handshaking, string(own.Bytes()), "toRelay1"), e} {
		if left := d.says(p); !bytes.Equal(left, p) {
			t.Errorf("%.24x was dropped", p)
		}
	}

	// A client that has no mates gets through.
	c := u.actor("192.0.2.3:3")
	for i := range 6 {
		d := longPacket(initial, "firstdest", fmt.Sprintf("dial%04d", i))
		left := c.says(d)
		if dropped := len(left) == 0; dropped != (i > 0 && i < newcomerDials) {
			t.Errorf("dial %d was dropped: %v", i, dropped)
		}
		if left := c.says(d); !bytes.Equal(left, d) {
			t.Errorf("dial %d was dropped twice", i)
		}
	}
}

// Mates that no answer named, but that other mates may have told of, are tried in
// turn.
func TestInitialsThatNoAnswerLedTo(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a := u.actor("192.0.2.1:1")
	var mates []*actor
	for i := range 3 {
		mates = append(mates, u.actor(fmt.Sprintf("192.0.2.%d:2", i+2)))
	}
	a.told(mates...)
	u.tick(offerTime)
	for i := range mates {
		a.says(longPacket(initial, fmt.Sprintf("firstdest%d", i), fmt.Sprintf("dial%04d", i)))
	}
	for _, m := range mates {
		if f := u.flow(a, m); f == nil || len(f.dials) != 1 {
			t.Errorf("%v was not dialled", m.id)
		}
	}
}

// A device that was killed and came back shares its address with its old self, which
// looks connected for a while. So its other mates come first.
func TestNearMatesComeLast(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	before, now, mate := u.actor("192.0.2.1:1"), u.actor("192.0.2.1:2"), u.actor("192.0.2.9:9")
	next, others := u.offer(now.id, now, []candidate{{before.id, before, true, false}, {mate.id, mate, false, false}}, u.now)
	if next != mate.id || !slices.Equal(others, []peer.ID{before.id}) {
		t.Errorf("offered %v over the bridge and %v without, want the far mate over it and the near one without", next, others)
	}
	u.connected(now, mate, "aaaaaaaa", "bbbbbbbb")
	if next, _ := u.offer(now.id, now, []candidate{{before.id, before, true, false}, {mate.id, mate, false, false}}, u.now); next != before.id {
		t.Errorf("offered %v, want the near mate, the only one not met", next)
	}
}

// Mates are offered one at a time, the newest first. Those with which the asker has
// another connection come last.
func TestOffersTakeTurns(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a := u.actor("192.0.2.1:1")
	var mates []*actor
	for i := range 3 {
		mates = append(mates, u.actor(fmt.Sprintf("192.0.2.%d:2", i+2)))
	}
	for _, want := range []int{0, 1, 2, 0, 1} {
		for range 2 { // asked again, the relay says the same, as the client may be dialling
			if got := a.told(mates...); got != mates[want].id {
				t.Errorf("offered %v, want mate %d", got, want)
			}
		}
		u.tick(notDialled + 1)
	}
	// The client dialled none, so it has connections with all. A new mate comes
	// first.
	fresh := u.actor("192.0.2.9:2")
	if got := a.told(append(mates, fresh)...); got != fresh.id {
		t.Errorf("offered %v, want the new mate", got)
	}
}

// A device in two groups has more mates than we keep offers for. It still learns where
// each of them is.
func TestMatesBeyondTheOffersAreNamed(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a := u.actor("192.0.2.1:1")
	var mates []candidate
	for i := range groupMembers + 3 {
		m := u.actor(fmt.Sprintf("198.51.100.%d:2", i))
		mates = append(mates, newCandidate(m.id, m, m.at.addr.Addr(), a.at.addr.Addr()))
	}
	next, others := u.offer(a.id, a, mates, u.now)
	if next != mates[0].id {
		t.Errorf("offered %v, want the first", next)
	}
	for _, m := range mates[groupMembers:] {
		if !slices.Contains(others, m.id) {
			t.Errorf("%v is not named at all", m.id)
		}
	}
}

// A client that gives up its dial during the hold has met its mate directly, so both
// are offered their other mates first.
func TestMatesWhoMetDirectlyComeLast(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b, c := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2"), u.actor("192.0.2.3:3")
	a.told(b)
	a.says(longPacket(initial, "firstdest", "aaaaaaaa"))
	u.tick(40 * time.Millisecond)
	a.says(longPacket(initial, "firstdest", "aaaaaaaa")) // closes the connection
	for _, pair := range [][2]*actor{{a, b}, {b, a}} {
		if got := pair[0].told(pair[1], c); got != c.id {
			t.Errorf("%v was offered %v, want the mate not met", pair[0].id, got)
		}
	}
}

// Devices of one IP version tell each other addresses of those of the other, where
// nothing answers. While a client dials there, it takes no offer, so such mates are
// offered again soon.
func TestMatesOfTheOtherVersionAreOfferedAgain(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, far := u.actor("192.0.2.1:1"), u.actor("[2001:db8::1]:2")
	mates := []*actor{far}
	for i := range 3 {
		mates = append(mates, u.actor(fmt.Sprintf("192.0.2.%d:2", i+2)))
	}
	offered := map[peer.ID]int{}
	for range 40 { // the client's ticks
		offered[a.told(mates...)]++
		u.tick(30 * time.Second)
	}
	for _, m := range mates[1:] {
		if offered[far.id] < 2*offered[m.id] {
			t.Errorf("the mate of the other version was offered %d times and %v %d times, want at least twice as often", offered[far.id], m.id, offered[m.id])
		}
	}
	// Dials that no answer led to are more likely for such a mate, too.
	a.says(longPacket(initial, "firstdest", "aaaaaaaa"))
	if u.flow(a, far) == nil {
		t.Error("the mate of the other version was not dialled")
	}
}

// A NAT may give a client another address. Both directions go on.
func TestBridgeFollowsAClient(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b := u.actor("192.0.2.1:1"), u.actor("[2001:db8::2]:2")
	u.connected(a, b, "aaaaaaaa", "bbbbbbbb")
	a.at.addr = netip.MustParseAddrPort("192.0.2.77:7")
	u.sweep(u.now)
	a.says(shortPacket("bbbbbbbb", 60))
	b.got(shortPacket("bbbbbbbb", 60))
	b.says(shortPacket("aaaaaaaa", 60))
	a.got(shortPacket("aaaaaaaa", 60))
	if n := len(u.sides[0].ends); n != 1 {
		t.Errorf("%d ends, want 1", n)
	}
	// Another client at the old address is not taken for this one.
	old := u.actor("192.0.2.1:1")
	if left := old.says(shortPacket("bbbbbbbb", 60)); len(left) == 0 {
		t.Error("a packet from a client's old address was forwarded")
	}
}

// A flow ends when a client has left, when one side is silent, and at the limits of
// a circuit's data and duration. Then nothing is left of it.
func TestFlowsEnd(t *testing.T) {
	tests := []struct {
		name string
		end  func(u *bridgeUnderTest, a, b *actor)
		gone bool // the flow is gone at once, not just closed
	}{
		{"a client has left", func(u *bridgeUnderTest, a, b *actor) {
			b.closed = true
			u.sweep(u.now)
			u.tick(flowAbsent + time.Second)
			a.says(shortPacket("bbbbbbbb", 60))
			u.wire.taken()
		}, true},
		{"both are silent", func(u *bridgeUnderTest, a, b *actor) { u.tick(flowIdle + time.Second) }, true},
		{"one is silent", func(u *bridgeUnderTest, a, b *actor) {
			u.tick(flowIdle + time.Second)
			a.says(shortPacket("bbbbbbbb", 60))
			u.wire.taken()
		}, true},
		{"--circuit-bytes", func(u *bridgeUnderTest, a, b *actor) {
			u.maxBytes = 10_000
			for range 20 {
				a.says(shortPacket("bbbbbbbb", 1000))
			}
			if n := len(u.wire.taken()); n > 10 {
				t.Errorf("%d of 20 datagrams of 1 kB passed, want at most 10", n)
			}
		}, false},
		{"--circuit-duration", func(u *bridgeUnderTest, a, b *actor) {
			u.maxAge = time.Minute
			for range 5 {
				u.tick(20 * time.Second)
				a.says(shortPacket("bbbbbbbb", 1000))
				b.says(shortPacket("aaaaaaaa", 1000))
			}
			u.wire.taken()
		}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			u := newBridgeUnderTest(t, 100)
			a, b := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2")
			u.connected(a, b, "aaaaaaaa", "bbbbbbbb")
			tt.end(u, a, b)
			u.sweep(u.now)
			a.says(shortPacket("bbbbbbbb", 60))
			b.got()
			if n := u.tally.bridges.Load(); n != 0 {
				t.Errorf("%d bridges are open, want none", n)
			}
			if (u.flow(a, b) == nil) != tt.gone {
				t.Errorf("flow = %v, want it removed: %v", u.flow(a, b), tt.gone)
			}
			u.tick(2 * groupAge)
			u.sweep(u.now)
			u.sweep(u.now)
			if u.flows != 0 || len(u.clients) != 0 || len(u.sides[0].ends) != 0 || len(u.sides[0].legs) != 0 {
				t.Errorf("left: %d flows, %d clients, %d ends, %d IDs", u.flows, len(u.clients), len(u.sides[0].ends), len(u.sides[0].legs))
			}
		})
	}
}

// A mate that has gone silent is not sent more than could be on its way.
func TestCreditIsRefilledByTheOtherEndAlone(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2")
	u.connected(a, b, "aaaaaaaa", "bbbbbbbb")
	d := bytes.Repeat(shortPacket("bbbbbbbb", 1000), 60)
	sent := 0
	for sent < 2*flowCredit {
		a.says(slices.Collect(slices.Chunk(slices.Clone(d), 1000))...)
		sent += len(d)
	}
	carried := func() (n int) {
		for _, s := range u.wire.taken() {
			n += len(s.data)
		}
		return n
	}
	if n := carried(); n > flowCredit || n < flowCredit-len(d) {
		t.Errorf("%d bytes went to a silent mate, want %d", n, flowCredit)
	}
	b.says(shortPacket("nobodys!", 60)) // such as a stateless reset
	carried()
	a.says(slices.Collect(slices.Chunk(slices.Clone(d), 1000))...)
	if carried() != 0 {
		t.Error("an ID that belongs to nobody refilled the credit")
	}
	b.says(shortPacket("aaaaaaaa", 60))
	carried()
	a.says(shortPacket("bbbbbbbb", 1000))
	if carried() != 1000 {
		t.Error("a packet of the flow did not refill the credit")
	}
}

// --max-bandwidth holds whatever is sent. The bridge gets the bandwidth that is
// left, even beside circuits that want more than the limit.
func TestBandwidthBoundsTheBridge(t *testing.T) {
	const perSecond, seconds = 1 << 20, 10
	for _, circuits := range []int{0, 3} {
		u := newBridgeUnderTest(t, 100)
		u.bandwidth = rate.NewLimiter(perSecond, perSecond/10)
		one := &callers{flows: 1}
		u.byCaller[one.network] = one
		start := u.clock()
		var carried, byCircuits int64
		next := make([]clock, circuits) // when each circuit may send again
		for now := start; now < start+seconds*time.Second; now += 10 * time.Millisecond {
			for i := range next {
				if now >= next[i] {
					const turn = perSecond / 10
					next[i] = now + u.bandwidth.ReserveN(u.began.Add(now), turn).DelayFrom(u.began.Add(now))
					byCircuits += turn
				}
			}
			carried += u.allowed(one, 60_000, 1000, now)
		}
		if all := carried + byCircuits; all > (seconds+3)*perSecond || all < (seconds-1)*perSecond || carried < seconds*perSecond/8 {
			t.Errorf("beside %d circuits the bridge carried %d bytes in %d s, and all together %d, want about %d", circuits, carried, seconds, all, seconds*perSecond)
		}
	}
}

// A bridge that wants all of --max-bandwidth leaves others their share of it.
func TestBandwidthIsShared(t *testing.T) {
	const perSecond, seconds = 1 << 20, 10
	u := newBridgeUnderTest(t, 100)
	u.bandwidth = rate.NewLimiter(perSecond, perSecond/10)
	greedy, modest := &callers{network: netip.MustParsePrefix("192.0.2.1/32")}, &callers{network: netip.MustParsePrefix("192.0.2.2/32")}
	u.byCaller[greedy.network], u.byCaller[modest.network] = greedy, modest
	start := u.clock()
	var carried, wanted, all int64
	for now := start; now < start+seconds*time.Second; now += 10 * time.Millisecond {
		all += u.allowed(greedy, 120_000, 1200, now) // twelve times the limit
		wanted += 1200
		carried += u.allowed(modest, 1200, 1200, now)
	}
	all += carried
	t.Logf("%d of %d bytes of the modest one were carried, and %d in all", carried, wanted, all)
	if carried < wanted {
		t.Errorf("the modest one got %d of the %d bytes that it wanted", carried, wanted)
	}
	if all > (seconds+3)*perSecond {
		t.Errorf("both carried %d bytes, want about %d", all, seconds*perSecond)
	}
}

// Nobody can make the bridge carry, hold or remember more than its limits.
func TestFloodsOfInitials(t *testing.T) {
	random := func() []byte {
		d := longPacket(initial, "12345678", "12345678")
		rand.Read(d[6:14])
		rand.Read(d[15:23])
		return d
	}
	u := newBridgeUnderTest(t, 10_000)
	victim := u.actor("192.0.2.9:9")
	before := liveHeap()

	// Send from unknown addresses, then from a client without an offer, then
	// different Initials and the same one after an offer.
	for i := range 1000 {
		s := u.actor(fmt.Sprintf("198.51.100.%d:%d", i%250+1, i+1))
		if d := random(); !bytes.Equal(s.says(d), d) {
			t.Fatal("a stranger's Initial did not go to quic-go")
		}
	}
	attacker := u.actor("192.0.2.1:1")
	u.end(attacker.id, attacker, u.now)
	for range 1000 {
		attacker.says(random())
	}
	victim.got()
	for round := range 50 {
		attacker.told(victim)
		same := random()
		for range 200 {
			if round%2 == 0 {
				attacker.says(random())
			} else {
				attacker.says(same)
			}
			u.tick(time.Millisecond)
			u.due()
		}
		u.tick(time.Second)
		u.sweep(u.now)
	}
	if n := len(u.wire.taken()); n > 50*unansweredDatagrams {
		t.Errorf("%d datagrams went to a victim that never answered, want at most %d for each of 50 offers", n, unansweredDatagrams)
	}
	// When all dials have ended, nothing is left of them.
	u.tick(2 * groupAge)
	u.sweep(u.now)
	u.sweep(u.now)
	if u.flows != 0 || u.holding != 0 || len(u.clients) != 0 {
		t.Errorf("left: %d flows, %d dials held, %d clients", u.flows, u.holding, len(u.clients))
	}
	if grown := int64(liveHeap()) - int64(before); grown > 1<<20 {
		t.Errorf("the heap grew by %d bytes", grown)
	}

	// Of thousands of dials at once, no more are held than limits allow.
	held, refused := 0, u.tally.refused[refusedBridge].Load()
	for i := range 5000 {
		a := u.actor(fmt.Sprintf("10.0.%d.%d:1", i/250, i%250+1))
		b := u.actor(fmt.Sprintf("10.1.%d.%d:1", i/250, i%250+1))
		a.told(b)
		a.says(random())
		held = max(held, u.holding)
	}
	if held != u.limits.holding() || u.flows > u.limits.flows() {
		t.Errorf("%d dials were held and %d flows open, want %d and at most %d", held, u.flows, u.limits.holding(), u.limits.flows())
	}
	u.counted(refusedBridge, refused+int64(5000-u.limits.holding()))
}

// One network that takes all places for dials, or all flows, takes them from nobody else.
func TestOneNetworkLeavesBridgesToOthers(t *testing.T) {
	for _, tt := range []struct {
		name string
		held bool // the attackers' dials are held, and not answered later
	}{{"dials", true}, {"flows", false}} {
		t.Run(tt.name, func(t *testing.T) {
			u := newBridgeUnderTest(t, 64)
			dial := func(i int, ips string) (refused bool) {
				a, b := u.actor(fmt.Sprintf("%s:%d", ips, 1+2*i)), u.actor(fmt.Sprintf("%s:%d", ips, 2+2*i))
				a.told(b)
				before := u.tally.refused[refusedBridge].Load()
				a.says(longPacket(initial, fmt.Sprintf("first%05d", i), fmt.Sprintf("id%06d", i)))
				return u.tally.refused[refusedBridge].Load() > before
			}
			next := 0
			attack := func() {
				for refused := false; !refused; next++ {
					refused = dial(next, "192.0.2.1")
					if !tt.held {
						u.tick(minHold)
						u.due()
					}
				}
			}
			attack()
			for i := range 12 {
				if dial(i, "198.51.100.1") {
					t.Fatalf("dial %d of another network is refused", i)
				}
				attack()
			}
			if u.holding > u.limits.holding() || u.flows > u.limits.flows() {
				t.Errorf("%d dials are held and there are %d flows", u.holding, u.flows)
			}
			held, mostHeld := 0, 0
			for _, dials := range u.held {
				held += len(dials)
				mostHeld = max(mostHeld, len(dials))
			}
			flows, mostFlows := 0, 0
			for _, c := range u.byCaller {
				flows += c.flows
				mostFlows = max(mostFlows, c.flows)
			}
			if held != u.holding || flows != u.flows {
				t.Errorf("networks have %d dials held and %d flows, want %d and %d", held, flows, u.holding, u.flows)
			}
			if u.heldRanks.most() != mostHeld || u.flowRanks.most() != mostFlows {
				t.Errorf("the most that a network has is counted as %d dials and %d flows, want %d and %d", u.heldRanks.most(), u.flowRanks.most(), mostHeld, mostFlows)
			}
			if others := u.byCaller[networkOf(netip.MustParseAddr("198.51.100.1"))]; others.flows != 12 {
				t.Errorf("the other network has %d flows, want 12", others.flows)
			}
			// All ends with the flows.
			u.tick(2 * groupAge)
			u.sweep(u.now)
			u.sweep(u.now)
			if len(u.held) != 0 || len(u.byCaller) != 0 || len(u.heldRanks) != 0 || len(u.flowRanks) != 0 {
				t.Errorf("left: %d networks with dials, %d with flows, %v and %v", len(u.held), len(u.byCaller), u.heldRanks, u.flowRanks)
			}
		})
	}
}

// The flows of one device are limited, and so are those of all.
func TestFlowsAreBounded(t *testing.T) {
	u := newBridgeUnderTest(t, 20)
	hub := u.actor("192.0.2.9:9")
	for i := range flowsPerClient + 8 {
		m := u.actor(fmt.Sprintf("10.0.0.%d:1", i+1))
		m.told(hub)
		m.says(longPacket(initial, fmt.Sprintf("firstdest%d", i), fmt.Sprintf("idid%04d", i)))
		u.tick(maxHold)
		u.due()
	}
	e := u.sides[0].ends[hub.at.addr]
	if len(e.flows) != flowsPerClient {
		t.Errorf("one client has %d flows, want %d", len(e.flows), flowsPerClient)
	}
	for i := range 4 * u.limits.flows() {
		a, b := u.actor(fmt.Sprintf("10.1.%d.%d:1", i/250, i%250)), u.actor(fmt.Sprintf("10.2.%d.%d:1", i/250, i%250))
		a.told(b)
		a.says(longPacket(initial, fmt.Sprintf("firstdest%d", i), "aaaaaaaa"))
		u.tick(maxHold)
		u.due()
	}
	if u.flows != u.limits.flows() {
		t.Errorf("%d flows, want %d", u.flows, u.limits.flows())
	}
	// A mate cannot take over another mate's packets by giving out the same IDs, and
	// cannot fill memory with IDs.
	v := newBridgeUnderTest(t, 100)
	a, b, evil := v.actor("192.0.2.1:1"), v.actor("192.0.2.2:2"), v.actor("192.0.2.3:3")
	v.connected(a, b, "aaaaaaaa", "bbbbbbbb")
	v.connected(a, evil, "aaaaaaaA", "evilevil")
	for i := range 1000 {
		evil.says(longPacket(handshaking, "aaaaaaaA", "bbbbbbbb"))
		evil.says(longPacket(handshaking, "aaaaaaaA", fmt.Sprintf("evil%04d", i)))
		evil.says(longPacket(handshaking, "aaaaaaaA", fmt.Sprintf("%c", i)))
	}
	v.wire.taken()
	a.says(shortPacket("bbbbbbbb", 60))
	b.got(shortPacket("bbbbbbbb", 60))
	if n := len(v.sides[0].legs); n > 4*legIDs {
		t.Errorf("the bridge keeps %d IDs for two flows, want at most %d", n, 4*legIDs)
	}
}

// Once the relay is about to stop, open flows go on and none begins.
func TestDrainRefusesNewFlows(t *testing.T) {
	u := newBridgeUnderTest(t, 100)
	a, b, c := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2"), u.actor("192.0.2.3:3")
	u.connected(a, b, "aaaaaaaa", "bbbbbbbb")
	a.told(c)
	u.drain()
	if left := a.says(longPacket(initial, "firstdestC", "aaaaaaaC")); len(left) != 0 || u.flow(a, c) != nil {
		t.Error("a flow began after drain")
	}
	if got := b.told(c); got != "" {
		t.Errorf("offered %v after drain", got)
	}
	a.says(shortPacket("bbbbbbbb", 60))
	b.got(shortPacket("bbbbbbbb", 60))
	u.counted(refusedStopping, 1)
}

// Whatever arrives, the reader of a socket goes on, and quic-go gets nothing that
// did not arrive.
func FuzzBridge(f *testing.F) {
	f.Add([]byte{0xc0, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0}, uint8(10))
	f.Add(longPacket(initial, "12345678", "12345678"), uint8(0))
	f.Add(append(shortPacket("bbbbbbbb", 60), shortPacket("aaaaaaaa", 60)...), uint8(60))
	f.Add([]byte{0x40}, uint8(1))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 21}, uint8(6))
	f.Fuzz(func(t *testing.T, data []byte, size uint8) {
		if dest, source, ok := longIDs(data); ok {
			if len(dest) > maxID || len(source) > maxID || !bytes.Contains(data, dest) || !bytes.Contains(data, source) {
				t.Errorf("longIDs = %x, %x", dest, source)
			}
		}
		u := newBridgeUnderTest(t, 10)
		a, b := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2")
		u.connected(a, b, "aaaaaaaa", "bbbbbbbb")
		for range 3 {
			batch := []arrival{{from: a.at.addr, size: max(int(size), 1), data: slices.Clone(data)}}
			u.sides[0].take(batch)
			left := len(batch[0].data)
			for _, d := range u.wire.taken() {
				left += len(d.data)
			}
			if left > len(data) {
				t.Errorf("%d bytes came out of %d", left, len(data))
			}
		}
	})
}

// Ten thousand open and idle flows take at most 8 MiB: those of two thousand clients
// in groups of eleven. The memory for the clients is set aside elsewhere
// (bridgeMemory).
func TestFlowsTakeLittleMemory(t *testing.T) {
	const clients, mates = 2000, 5
	u := newBridgeUnderTest(t, clients*mates)
	actors := make([]*actor, clients)
	for i := range actors {
		actors[i] = u.actor(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1).String())
	}
	before := int64(liveHeap())
	for i, a := range actors {
		for j := range mates {
			b := actors[(i+j+1)%clients]
			from := func(kind byte) string { return fmt.Sprintf("%c%04d%d..", kind, i, j) }
			u.connected(a, b, from('a'), from('b'))
			f := u.flow(a, b)
			f.legs[1].learn([]byte(from('c')), true)
			f.legs[1].switched = true
		}
	}
	u.tick(switchTime + 1)
	u.sweep(u.now) // forgets what only handshakes need
	taken := int64(liveHeap()) - before
	t.Logf("%d bytes for each flow, %d for each client", taken/(clients*mates), taken/clients)
	if n := u.tally.bridges.Load(); n != clients*mates || u.flows != clients*mates {
		t.Errorf("%d bridges and %d flows are open, want %d of each", n, u.flows, clients*mates)
	}
	if taken > 8<<20 {
		t.Errorf("%d flows take %d bytes, want at most 8 MiB", clients*mates, taken)
	}
	runtime.KeepAlive(u)
}

// A machine to which a whole network is routed has more addresses than anybody can
// count. What clients reach it at is forgotten with them.
func TestOwnAddressesAreForgotten(t *testing.T) {
	u := newBridgeUnderTest(t, 1)
	a := u.actor("[2001:db8::1]:1")
	before := int64(liveHeap())
	for i := range 20_000 {
		a.at.local = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 14: byte(i >> 8), 15: byte(i)})
		u.end(a.id, a, u.now)
	}
	if taken := int64(liveHeap()) - before; taken > 256<<10 {
		t.Errorf("one client that came to 20 000 addresses left %d bytes, want at most 256 KiB", taken)
	}
	runtime.KeepAlive(u)
}

// What one datagram costs, by sender.
func BenchmarkBridgeRoute(b *testing.B) {
	u := newBridgeUnderTest(b, 10_000)
	a, mate, other := u.actor("192.0.2.1:1"), u.actor("192.0.2.2:2"), u.actor("192.0.2.3:3")
	u.connected(a, mate, "aaaaaaaa", "bbbbbbbb")
	u.connected(a, other, "aaaaaaaA", "cccccccc")
	for i := range 10_000 {
		c := u.actor(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1).String())
		u.end(c.id, c, u.now)
	}
	for _, e := range u.sides[0].ends {
		for _, f := range e.flows {
			f.legs[0].credit.Store(1 << 60)
			f.legs[1].credit.Store(1 << 60)
		}
	}
	own, _ := u.GenerateConnectionID()
	message := func(ids ...string) (m []byte) {
		for i := range 32 {
			m = append(m, shortPacket(ids[i%len(ids)], 1200)...)
		}
		return m
	}
	silent := &silentWire{}
	for _, sd := range u.sides {
		sd.socket = silent
	}
	for _, tt := range []struct {
		name string
		from *actor
		data []byte
	}{
		{"from a stranger", u.actor("198.51.100.1:1"), message("bbbbbbbb")},
		{"to the relay, from a client that has flows", a, message(string(own.Bytes()))},
		{"to a mate", a, message("bbbbbbbb")},
		{"to two mates in turns", a, message("bbbbbbbb", "cccccccc")},
	} {
		b.Run(tt.name, func(b *testing.B) {
			batch := make([]arrival, 8)
			for b.Loop() {
				for i := range batch {
					batch[i] = arrival{from: tt.from.at.addr, size: 1200, data: tt.data}
				}
				u.sides[0].take(batch)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*8*32), "ns/datagram")
		})
	}
}

type silentWire struct{ udpSocket }

func (*silentWire) send([][]byte, int, byte, netip.AddrPort, source) {}

// The relay recognises its own connection IDs, and takes no others for them.
func TestRelayKnowsItsOwnIDs(t *testing.T) {
	u := newBridgeUnderTest(t, 1)
	for range 1000 {
		id, err := u.GenerateConnectionID()
		if err != nil || id.Len() != u.ConnectionIDLen() {
			t.Fatal(id, err)
		}
		if !u.isOurs(append(id.Bytes(), 1, 2, 3)) {
			t.Error("the relay does not recognise its own ID")
		}
		other := make([]byte, relayIDLength)
		binary.LittleEndian.PutUint64(other, mrand.Uint64())
		if u.isOurs(other) {
			t.Error("the relay takes a random ID for its own") // by chance in one of four million tests
		}
	}
	if u.isOurs([]byte{1, 2, 3}) {
		t.Error("the relay takes an ID that is too short for its own")
	}
}
