//go:build linux

package main

// Tests of what small frames count as, compared with what they take; and tests of
// the budgets.

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlog"
	"google.golang.org/protobuf/encoding/protodelim"
)

// rawOn returns a connection to r that writes its own packets, and its account at
// the relay.
func rawOn(t *testing.T, r testRelay) (*rawConn, *connPieces) {
	t.Helper()
	before := map[peer.ID]bool{}
	for _, id := range r.host.Network().Peers() {
		before[id] = true
	}
	raw, err := dialRawLocally(testContext(t), t, r.info)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range r.host.Network().Conns() {
		if !before[c.RemotePeer()] {
			return raw, piecesOf(c)
		}
	}
	t.Fatal("the relay does not know the connection")
	return nil, nil
}

// The figures of pieceCost are right for the quic-go that we link: pieces take no
// more memory than they count as. If this fails, look at frame_sorter.go.
func TestPieceCosts(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	for _, size := range []int{1, pooledFrame - 1, pooledFrame} {
		t.Run(fmt.Sprint(size, " bytes"), func(t *testing.T) {
			// On several connections, because one has room for few pieces, and the heap
			// changes by 100 KiB while nothing happens.
			type conn struct {
				*rawConn
				account *connPieces
			}
			var conns []conn
			for range 8 {
				raw, account := rawOn(t, r)
				conns = append(conns, conn{raw, account})
			}
			held := func() (all int64) {
				for _, c := range conns {
					all += c.account.held.Load()
				}
				return all
			}
			counted, before := held(), liveHeap()
			pieces := min((initialWindow-1024)/(size+1), 4000)
			for _, c := range conns {
				// The first byte never comes, so nothing can be read.
				err := c.sendAll(testContext(t), func(yield func([]byte) bool) {
					for i := range pieces {
						if !yield(streamFrame(40, uint64(1+i*size), make([]byte, size))) {
							return
						}
					}
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			want := int64(len(conns) * pieces * pieceCost(int64(size)))
			eventually(t, "most pieces have arrived", func() bool { return held()-counted >= want*9/10 })
			took := int64(liveHeap()) - int64(before)
			counted = held() - counted // only now, as the last pieces may have come meanwhile
			n := counted / int64(pieceCost(int64(size)))
			t.Logf("%d pieces took %d KiB, %d bytes each, and count as %d KiB", n, took>>10, took/n, counted>>10)
			// Each connection takes 46 KiB for what it begins to use meanwhile.
			if took > counted+counted/10+int64(len(conns))*64<<10 {
				t.Errorf("pieces of %d bytes took %d bytes of memory, but count as %d", size, took, counted)
			}
		})
	}
}

// An honest client's pieces are let go as they are read, so it never comes near a
// limit, however long it stays.
func TestPiecesThatAreReadAreLetGo(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c := newCrowd(t, 2)
	a, b := c.pair(testContext(t), t, r, [2]lightIdentity{newLightIdentity(t), newLightIdentity(t)})
	account := func(id peer.ID) *connPieces {
		return piecesOf(r.host.Network().ConnsToPeer(id)[0])
	}
	from, to, err := a.circuitTo(testContext(t), b)
	if err != nil {
		t.Fatal(err)
	}
	one := make([]byte, 1)
	for range 2000 {
		if _, err := from.Write([]byte("m")); err != nil {
			t.Fatal(err)
		}
		if _, err := to.Read(one); err != nil {
			t.Fatal(err)
		}
	}
	s, err := a.open(testContext(t), string(kadProtocol))
	if err != nil {
		t.Fatal(err)
	}
	r2 := &byteReader{Reader: s}
	for range 300 { // on one stream
		if _, err := protodelim.MarshalTo(s, findMessage([]byte(b.id))); err != nil {
			t.Fatal(err)
		}
		if err := protodelim.UnmarshalFrom(r2, new(kadpb.Message)); err != nil {
			t.Fatal(err)
		}
	}
	for range 300 { // on a new stream each
		a.mustAsk(t, findMessage([]byte(b.id)))
	}
	eventually(t, "all pieces are let go", func() bool {
		return account(a.id).held.Load() < 16<<10 && account(b.id).held.Load() < 16<<10
	})
	p := account(a.id)
	eventually(t, "streams that are over are forgotten", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.streams) <= 8
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.booked != 0 || p.doomed {
		t.Errorf("an honest client has %d bytes booked, and doomed is %v, want 0 and false", p.booked, p.doomed)
	}
}

// newAccount returns the account of a connection that always has room.
func newAccount(t *testing.T, p *pieces) *connPieces {
	_, scope := p.begin(t.Context(), &network.NullScope{}, &net.UDPAddr{}, func() {})
	return scope.(*connPieces)
}

// When memory runs out, only the connection that has booked most is closed.
func TestGreediestIsClosed(t *testing.T) {
	counts := new(tally)
	p := newPieces(newBudgets(limits{perNetwork: 1}), counts)
	small, large := newAccount(t, p), newAccount(t, p)
	small.hold(initialWindow + pieceStep)
	large.hold(initialWindow + 3*pieceStep)
	if small.booked != pieceStep || large.booked != 3*pieceStep {
		t.Errorf("%d and %d bytes are booked, want %d and %d", small.booked, large.booked, pieceStep, 3*pieceStep)
	}
	p.makeRoom(small, (*connPieces).bookedForPieces)
	p.makeRoom(small, (*connPieces).bookedForPieces) // the large one is still being closed
	if small.doomed || !large.doomed {
		t.Errorf("closed: small %v, large %v, want only the large one", small.doomed, large.doomed)
	}
	large.Done()
	p.makeRoom(small, (*connPieces).bookedForPieces)
	if !small.doomed {
		t.Error("the small one was not closed when it asked alone")
	}
	if n := counts.refused[refusedMemory].Load(); n != 2 {
		t.Errorf("%d refusals were counted, want 2", n)
	}
}

// Who has taken all that one peer may take has nobody else closed, neither for small pieces,
// nor for frames that are cut, nor for what its circuits would like to send.
func TestPeerAtItsLimitIsClosedItself(t *testing.T) {
	lim := limits{clients: 10_000, perNetwork: 256}
	manager, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(lim.resourceLimits(0)))
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	p := newPieces(newBudgets(lim), new(tally))
	connect := func(id peer.ID) *connPieces {
		scope, err := manager.OpenConnection(network.DirInbound, false, ma.StringCast("/ip4/11.0.0.1/udp/1/quic-v1"))
		if err != nil {
			t.Fatal(err)
		}
		_, scope = p.begin(t.Context(), scope, &net.UDPAddr{}, func() {})
		t.Cleanup(scope.Done)
		if err := scope.SetPeer(id); err != nil {
			t.Fatal(err)
		}
		return scope.(*connPieces)
	}
	honest := connect(newTestPeerID(t)) // in the middle of an outage, with much in flight and many pieces
	honest.hold(initialWindow + maxPieces/2)
	honest.flight.claim(maxFlight)
	honest.flight.sent(1, 1200, streamFrames(0, 1100))
	honest.flight.heard = time.Now().Add(-stallTime)
	for what, asks := range map[string]func(c *connPieces){
		"small pieces": func(c *connPieces) { c.hold(initialWindow + pieceStep) },
		"frames cut":   func(c *connPieces) { c.flight.uncovered() },
		"data for it":  func(c *connPieces) { c.flight.short() },
	} {
		id := newTestPeerID(t)
		greedy, other := connect(id), connect(id)
		for size := 1 << 20; size > 0; size /= 2 {
			for other.ReserveMemory(size, network.ReservationPriorityAlways) == nil {
			}
		}
		p.looked = time.Time{}
		asks(greedy)
		if honest.doomed {
			t.Fatalf("%s: the honest client is closed", what)
		}
		if want := what != "data for it"; greedy.doomed != want {
			t.Errorf("%s: the greedy one is closed %v, want %v", what, greedy.doomed, want)
		}
		greedy.Done()
		other.Done()
	}
}

// Whoever loses a packet of each stream, and sends all the rest in frames that quic-go or
// quinn has cut in two, is not closed. In pieces half as long, it is.
func TestWindowInHalfFramesIsHeld(t *testing.T) {
	const window = maxWindow * 3 / 2
	for _, tt := range []struct {
		length int64
		doomed bool
	}{{flownData / 2, false}, {flownData / 4, true}} {
		c := newAccount(t, newPieces(newBudgets(limits{perNetwork: 1}), new(tally)))
		c.ReserveMemory(window-initialWindow, 0) // the window has grown
		for id := range quic.StreamID(2) {
			for at := int64(flownData); at < window/2; at += tt.length {
				c.RecordEvent(qlog.PacketReceived{Frames: []qlog.Frame{{Frame: &qlog.StreamFrame{StreamID: 4 * id, Offset: at, Length: tt.length}}}})
			}
		}
		if c.doomed != tt.doomed {
			t.Errorf("in pieces of %d bytes: closed %v with %d bytes held and %d booked, want %v", tt.length, c.doomed, c.held.Load(), c.booked, tt.doomed)
		}
		for id := range quic.StreamID(2) {
			s := c.stream(4 * id)
			s.read.Store(window)
			s.settle()
		}
		if c.held.Load() != 0 || c.booked != 0 {
			t.Errorf("in pieces of %d bytes: once all is read, %d bytes are held and %d booked", tt.length, c.held.Load(), c.booked)
		}
	}
}

// A piece counts until everything up to its end has been read, and no longer.
func TestPiecesOfAStream(t *testing.T) {
	c := newAccount(t, newPieces(newBudgets(limits{perNetwork: 1}), new(tally)))
	s := c.stream(0)
	steps := []struct {
		end, read int64 // end of the piece that comes, and bytes read after that
		want      int64
	}{
		{10, 0, 1},   // out of order
		{20, 5, 2},   //
		{30, 10, 3},  // shares a generation with a piece that has not been read
		{40, 30, 1},  // the old pieces are gone
		{20, 30, 1},  // read before it was counted
		{100, 99, 1}, //
		{100, 100, 0},
	}
	for i, step := range steps {
		if s.add(step.end, 1) {
			c.hold(1)
		}
		s.read.Store(step.read)
		s.settle()
		if got := s.cost.Load(); got > step.want+1 || got < min(step.want, 1) || got != c.held.Load() {
			t.Errorf("step %d: %d pieces count for the stream and %d for the connection, want about %d", i, got, c.held.Load(), step.want)
		}
	}
	if s.cost.Load() != 0 {
		t.Errorf("%d pieces count at the end, want none", s.cost.Load())
	}
}

// The clients of one network wait when its budget is spent, and those of another do
// not.
func TestBudgetIsOfOneNetwork(t *testing.T) {
	b := newBudgets(limits{perNetwork: 10})
	one, other := b.of(addrPort(&net.UDPAddr{IP: net.ParseIP("11.0.0.1")}).Addr()), b.of(addrPort(&net.UDPAddr{IP: net.ParseIP("11.0.0.2")}).Addr())
	for i := range 10 * requestsPerClient {
		if wait := one.spend(one.requests, 1); wait > 0 {
			t.Fatalf("request %d waits for %v, want no wait within %d", i, wait, 10*requestsPerClient)
		}
	}
	if one.spend(one.requests, 2) <= 0 {
		t.Error("a request beyond the budget does not wait")
	}
	if other.spend(other.requests, 1) > 0 {
		t.Error("a request from another network waits")
	}
	if again := b.of(one.network.Addr()); again != one {
		t.Error("another connection of the same network has a separate budget")
	}
	if b.of(addrPort(&net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}).Addr()) != nil {
		t.Error("loopback has a budget")
	}
}

// Nobody gets a full budget for leaving and coming back.
func TestBudgetOutlivesItsClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, addr := newBudgets(limits{perNetwork: 10}), netip.MustParseAddr("192.0.2.1")
		b.of(addr).release()
		time.Sleep(budgetAge - time.Second)
		again := b.of(addr)
		again.spend(again.requests, again.requests.Burst())
		for range again.requests.Burst() { // they wait when the client leaves
			again.spend(again.requests, 1)
		}
		again.release()
		for _, pass := range []time.Duration{2 * time.Second, budgetAge - time.Second} {
			time.Sleep(pass)
			synctest.Wait()
			if b.of(addr) != again {
				t.Fatalf("%v later a client has a new budget, although the old one is not full yet", pass)
			}
			again.release()
		}
		time.Sleep(3 * budgetAge)
		synctest.Wait()
		if len(b.by) > 0 {
			t.Error("a budget that is full and that nobody uses is kept")
		}
	})
}
