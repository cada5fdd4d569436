//go:build linux

package main

// Tests of what the relay has sent and a client has not acknowledged.

import (
	"errors"
	"io"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	quicgo "github.com/quic-go/quic-go"
)

// greedyCircuit opens a circuit to a client that can be muted, and returns its account.
func greedyCircuit(t *testing.T, r testRelay) (from, to *quicgo.Stream, socket *mutedSocket, account *connPieces) {
	t.Helper()
	b, socket, err := dialGreedy(testContext(t), t, r.info)
	if err != nil {
		t.Fatal(err)
	}
	a, err := newCrowd(t, 1).newcomer(testContext(t), r.info)
	if err != nil {
		t.Fatal(err)
	}
	if from, to, err = a.circuitTo(testContext(t), b); err != nil {
		t.Fatal(err)
	}
	unlimited(from, to)
	return from, to, socket, piecesOf(r.host.Network().ConnsToPeer(b.id)[0])
}

// inFlightNow returns what a connection's flight costs and what is booked, in bytes.
func (c *connPieces) inFlightNow() (held, booked int) {
	c.flight.mu.Lock()
	defer c.flight.mu.Unlock()
	return c.flight.held + c.flight.writing, c.flight.booked
}

// The figures of flownCost are right for the quic-go that we link. If this fails, look at
// its send_stream.go and sent_packet_handler.go.
func TestFlightCosts(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	from, _, socket, account := greedyCircuit(t, r)
	socket.muted.Store(true)
	counted, _ := account.inFlightNow()
	before := liveHeap()
	pace := time.NewTicker(100 * time.Microsecond) // or quic-go puts them together
	defer pace.Stop()
	for range 2000 { // more than may be in flight
		from.Write([]byte("m"))
		<-pace.C
	}
	eventually(t, "nothing more is sent", account.isFull)
	held, _ := account.inFlightNow()
	counted = held - counted
	took := int(liveHeap()) - int(before)
	n := counted / flownFrame
	t.Logf("%d frames took %d KiB, %d bytes each, and count as %d KiB", n, took>>10, took/n, counted>>10)
	if took > counted+counted/10+64<<10 { // the test itself takes some
		t.Errorf("%d frames in flight took %d bytes of memory, but count as %d", n, took, counted)
	}
}

// isFull reports whether nothing more fits into what is booked.
func (c *connPieces) isFull() bool {
	held, booked := c.inFlightNow()
	return held > freeFlight+booked-flownFrame
}

// A client that stops acknowledging makes the relay hold no more than is booked. When it
// goes on, it gets everything, and nothing stays booked.
func TestFlightIsBounded(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	from, to, socket, account := greedyCircuit(t, r)
	var sent atomic.Int64
	sending := make(chan error, 1)
	go func() {
		chunk := make([]byte, 64<<10)
		for range 512 { // 32 MiB
			n, err := from.Write(chunk)
			if sent.Add(int64(n)); err != nil {
				sending <- err
				return
			}
		}
		sending <- from.Close()
	}()
	// As long as it acknowledges, its window grows.
	read := int64(8 << 20)
	if _, err := io.CopyN(io.Discard, to, read); err != nil {
		t.Fatal(err)
	}
	socket.muted.Store(true)
	eventually(t, "the relay sends nothing more", account.isFull)
	if held, booked := account.inFlightNow(); held > freeFlight+maxFlight || booked > maxFlight {
		t.Errorf("%d bytes are held and %d booked, want at most %d", held, booked, maxFlight)
	}
	socket.muted.Store(false)
	n, err := io.Copy(io.Discard, to)
	if err != nil || read+n != sent.Load() {
		t.Errorf("%d bytes arrived of %d sent, %v", read+n, sent.Load(), err)
	}
	if err := <-sending; err != nil {
		t.Error(err)
	}
	eventually(t, "nothing is in flight and nothing booked", func() bool {
		held, booked := account.inFlightNow()
		return held == 0 && booked == 0
	})
}

// On a path that loses packets everything arrives, and nothing stays counted.
func TestFlightWithLosses(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	from, to, socket, account := greedyCircuit(t, r)
	socket.loses.Store(20)
	const size = 512 << 10
	go func() {
		io.CopyN(from, zeros{}, size)
		from.Close()
	}()
	if n, err := io.Copy(io.Discard, to); n != size || err != nil {
		t.Fatalf("%d bytes arrived, %v, want %d", n, err, size)
	}
	socket.loses.Store(0)
	eventually(t, "nothing is in flight and nothing booked", func() bool {
		// Something has to be sent, so that the relay learns what of the last is lost.
		if _, err := to.Write([]byte("more")); err != nil {
			t.Fatal(err)
		}
		held, booked := account.inFlightNow()
		return held == 0 && booked == 0
	})
}

// A writer that waits for room stops waiting at its deadline, when the stream is reset
// and when the connection ends.
func TestWaitingForRoomEnds(t *testing.T) {
	for name, end := range map[string]func(s network.MuxedStream, c *connPieces){
		"deadline":   func(s network.MuxedStream, _ *connPieces) {},
		"reset":      func(s network.MuxedStream, _ *connPieces) { s.Reset() },
		"connection": func(_ network.MuxedStream, c *connPieces) { c.conn.CloseWithError(0, "") },
	} {
		t.Run(name, func(t *testing.T) {
			r := newTestRelay(t, defaultConfig(t))
			_, _, socket, account := greedyCircuit(t, r)
			socket.muted.Store(true)
			s, err := account.conn.OpenStream()
			if err != nil {
				t.Fatal(err)
			}
			stream := newFlyingStream(quicStream{s}, &account.flight)
			written := make(chan error, 1)
			if name == "deadline" {
				stream.SetWriteDeadline(time.Now().Add(time.Second))
			}
			go func() {
				_, err := stream.Write(make([]byte, 2*maxFlight))
				written <- err
			}()
			if name != "deadline" {
				eventually(t, "nothing more is sent", account.isFull)
			}
			end(stream, account)
			select {
			case err := <-written:
				if err == nil || name == "deadline" && !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("the write ended with %v", err)
				}
			case <-time.After(testTimeout):
				t.Error("the write still waits")
			}
		})
	}
}

// quicStream is one of quic-go's streams, as far as flyingStream needs more.
type quicStream struct{ *quicgo.Stream }

func (s quicStream) CloseRead() error  { s.CancelRead(0); return nil }
func (s quicStream) CloseWrite() error { return s.Stream.Close() }
func (s quicStream) Reset() error      { return s.ResetWithError(0) }

func (s quicStream) ResetWithError(code network.StreamErrorCode) error {
	s.CancelRead(quicgo.StreamErrorCode(code))
	s.CancelWrite(quicgo.StreamErrorCode(code))
	return nil
}

// What is counted follows what quic-go keeps: lost data until it has arrived, and nothing
// else.
func TestFlightOfPackets(t *testing.T) {
	f := &flight{scope: &network.NullScope{}}
	send := func(number int64) { f.sent(number, 1200, flownFrame) }
	held := func(what string, packets int) {
		t.Helper()
		f.settle()
		if f.held != packets*flownFrame {
			t.Errorf("%s: %d packets are held, want %d", what, f.held/flownFrame, packets)
		}
	}
	for n := range int64(10) {
		send(n)
		f.inFlight(int(n+1) * 1200)
	}
	held("sent", 10)
	f.acked(0, 3)
	f.acked(6, 6)
	held("acknowledged", 5)
	f.acked(0, 6)
	held("acknowledged again, and another", 3)
	f.wasLost(7)
	f.wasLost(7)
	f.wasLost(3)
	held("lost", 3)
	send(10) // what 7 had
	held("sent again", 3)
	send(11)
	held("sent", 4)
	f.inFlight(3 * 1200) // 8 was replaced by a probe, which 11 is
	held("probed", 3)
	f.allLost()
	held("moved", 3)
	f.sent(12, 60, 0) // a short packet: nothing waits to be sent
	held("nothing left", 0)
	if f.cost != 0 || f.bytes != 0 || len(f.packets) != 0 {
		t.Errorf("cost %d, bytes %d and %d packets are left", f.cost, f.bytes, len(f.packets))
	}
}

// What is booked is given back, and where nothing can be booked, a little gets through.
func TestFlightBooks(t *testing.T) {
	scope := &countingScope{most: maxFlight}
	f := &flight{scope: scope, short: func() {}}
	bytes, cost, again, _ := f.claim(2 * maxFlight)
	if again != nil || bytes < maxFlight/2 || scope.booked > maxFlight {
		t.Errorf("%d bytes may be written, %d are booked, want at most %d", bytes, scope.booked, maxFlight)
	}
	if _, _, again, _ := f.claim(maxFlight); again == nil {
		t.Error("more than the most may be written")
	}
	f.wrote(cost)
	if scope.booked != 0 {
		t.Errorf("%d bytes stay booked", scope.booked)
	}
	scope.most = 0
	bytes, cost, again, denied := f.claim(2 * maxFlight)
	if again != nil || !denied || cost > freeFlight || bytes == 0 {
		t.Errorf("without memory %d bytes may be written, which count as %d, want at most %d", bytes, cost, freeFlight)
	}
	_, _, again, denied = f.claim(1)
	if again == nil || !denied {
		t.Error("without memory, more may be written")
	}
	f.wrote(cost)
	select {
	case <-again:
	default:
		t.Error("nobody is told that there is room")
	}
}

// countingScope books up to most bytes.
type countingScope struct {
	network.NullScope
	booked, most int
}

func (s *countingScope) ReserveMemory(n int, _ uint8) error {
	if s.booked+n > s.most {
		return network.ErrResourceLimitExceeded
	}
	s.booked += n
	return nil
}

func (s *countingScope) ReleaseMemory(n int) { s.booked -= n }

// Somebody who acknowledges nothing is closed for others who need the memory, and nobody
// who acknowledges.
func TestStalledIsClosedFirst(t *testing.T) {
	p := newPieces(newBudgets(limits{perNetwork: 1}), new(tally))
	stalled, busy, small := newAccount(t, p), newAccount(t, p), newAccount(t, p)
	for _, c := range []*connPieces{stalled, busy} {
		c.flight.claim(maxFlight)
		c.flight.sent(1, 1200, flownFrame)
	}
	stalled.flight.heard = time.Now().Add(-stallTime)
	small.hold(initialWindow + pieceStep)
	p.makeRoom(nil)
	if !stalled.doomed || busy.doomed || small.doomed {
		t.Errorf("closed: stalled %v, busy %v, small %v, want only the stalled one", stalled.doomed, busy.doomed, small.doomed)
	}
	stalled.Done()
	p.looked = time.Time{}
	p.makeRoom(nil)
	if busy.doomed || small.doomed {
		t.Error("somebody was closed although nobody has stalled")
	}
}
