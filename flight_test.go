//go:build linux

package main

// Tests of what the relay has sent and a client has not acknowledged.

import (
	"cmp"
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"
	"unsafe"

	"github.com/libp2p/go-libp2p/core/network"
	quicgo "github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlog"
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
	_, _, socket, account := greedyCircuit(t, r)
	socket.muted.Store(true)
	s, err := account.conn.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	stream := newFlyingStream(quicStream{s}, &account.flight)
	before, _ := account.inFlightNow()
	heap := liveHeap()
	counted := 0
	for range 500 { // as many packets as fit into the first window
		if _, err := stream.Write([]byte("m")); err != nil {
			t.Fatal(err)
		}
		counted += fullFrame
		eventually(t, "the byte is sent", func() bool { // or quic-go puts it together with the next
			held, _ := account.inFlightNow()
			return held >= before+counted
		})
	}
	took := int(liveHeap()) - int(heap)
	n := counted / fullFrame
	t.Logf("%d frames took %d KiB, %d bytes each, and count as %d KiB", n, took>>10, took/n, counted>>10)
	if took > counted+counted/10+64<<10 { // the test itself takes some
		t.Errorf("%d frames in flight took %d bytes of memory, but count as %d", n, took, counted)
	}
}

// isFull reports whether writers can book nothing more for what they write.
func (c *connPieces) isFull() bool {
	held, _ := c.inFlightNow()
	return held > freeFlight+maxFlight-fullFrame
}

// A client that stops acknowledging makes the relay hold no more than is booked. When it
// goes on, it gets everything, and nothing stays booked.
func TestFlightIsBounded(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	// quic-go's window has to have room for all of it. On a busy machine quic-go may take a
	// late packet for a lost one, and then the window does not grow that far.
	const window = maxFlight / fullFrame * 1200 * 11 / 10
	for range 20 {
		from, to, socket, account := greedyCircuit(t, r)
		sending := make(chan error, 1)
		over := make(chan struct{})
		var sent int64
		go func() {
			chunk := make([]byte, 64<<10)
			for {
				n, err := from.Write(chunk)
				sent += int64(n)
				select {
				case <-over:
					sending <- cmp.Or(err, from.Close())
					return
				default:
				}
				if err != nil {
					sending <- err
					return
				}
			}
		}()
		// As long as it acknowledges, its window grows.
		read := int64(0)
		for read < 16<<20 && account.conn.ConnectionStats().CongestionWindow < window {
			n, err := io.CopyN(io.Discard, to, 256<<10)
			if read += n; err != nil {
				t.Fatal(err)
			}
		}
		grown := account.conn.ConnectionStats().CongestionWindow >= window
		if grown {
			socket.muted.Store(true)
			eventually(t, "the relay sends nothing more", account.isFull)
			account.flight.mu.Lock()
			f := &account.flight
			// What is sent to a client that is silent may be cut, and that is booked, too.
			if f.held > freeFlight+f.booked || f.booked-f.cut > maxFlight {
				t.Errorf("%d bytes are held and %d booked, %d of them for cuts, want at most %d", f.held, f.booked, f.cut, maxFlight)
			}
			f.mu.Unlock()
			socket.muted.Store(false)
		}
		close(over)
		n, err := io.Copy(io.Discard, to)
		if err := <-sending; err != nil {
			t.Error(err)
		}
		if err != nil || read+n != sent {
			t.Errorf("%d bytes arrived of %d sent, %v", read+n, sent, err)
		}
		eventually(t, "nothing is in flight and nothing booked", func() bool {
			held, booked := account.inFlightNow()
			return held == 0 && booked == 0
		})
		if grown {
			return
		}
	}
	t.Skip("no window has grown: the machine is too busy")
}

func (c *connPieces) isGone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

// What quic-go keeps is counted and booked, even of somebody who makes the relay send all of
// it again and again, in ever smaller pieces: see loseAll.
func TestFlightOfLostFrames(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	from, to, socket, account := greedyCircuit(t, r)
	writing := make(chan struct{})
	go func() {
		defer close(writing)
		io.Copy(from, zeros{})
	}()
	if _, err := io.CopyN(io.Discard, to, 8<<20); err != nil {
		t.Fatal(err)
	}
	attacker, err := takeOver(socket, r.info)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(testContext(t))
	attacking := make(chan struct{})
	go func() {
		defer close(attacking)
		attacker.loseAll(ctx)
	}()
	ended := func() bool { return account.conn.Context().Err() != nil }
	first := account.conn.ConnectionStats().PacketsSent
	eventually(t, "much is sent again, or the connection is closed", func() bool {
		return ended() || account.conn.ConnectionStats().PacketsSent > first+1200
	})
	stop()
	<-attacking
	with := liveHeap()
	account.flight.mu.Lock()
	held, booked := account.flight.held, account.flight.booked
	account.flight.mu.Unlock()
	closed := ended()
	account.mu.Lock()
	if closed && !account.doomed {
		t.Errorf("the connection ended by itself: %v", context.Cause(account.conn.Context()))
	}
	account.mu.Unlock()
	account.conn.CloseWithError(0, "")
	from.CancelWrite(0)
	<-writing
	eventually(t, "the relay forgets the client", account.isGone)
	kept := int(with) - int(liveHeap())
	t.Logf("%d KiB were kept, %d counted, %d booked; closed before: %v", kept>>10, held>>10, booked>>10, closed)
	// What the other end has sent and nobody has read goes, too.
	if !closed && (kept > held+held/10+maxWindow*3/2 || held > booked+freeFlight) {
		t.Errorf("%d bytes were kept, %d counted and %d booked", kept, held, booked)
	}
}

// On a path that loses packets and delivers others late, everything arrives both ways, nobody
// is closed, and nothing stays counted.
func TestFlightWithLosses(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	from, to, socket, account := greedyCircuit(t, r)
	socket.loses.Store(20)
	const size = 512 << 10
	arrived := make(chan int64, 2)
	for _, ends := range [][2]*quicgo.Stream{{from, to}, {to, from}} {
		go io.CopyN(ends[0], zeros{}, size)
		go func() {
			n, _ := io.CopyN(io.Discard, ends[1], size)
			arrived <- n
		}()
	}
	for range 2 {
		if n := <-arrived; n != size {
			t.Fatalf("%d bytes arrived, want %d", n, size)
		}
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
	account.mu.Lock()
	defer account.mu.Unlock()
	if account.doomed {
		t.Error("the client is to be closed")
	}
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

// streamFrames returns what is logged of a packet with STREAM frames of one stream, each
// given as where it begins and ends.
func streamFrames(ends ...int64) (frames []qlog.Frame) {
	for i := 0; i < len(ends); i += 2 {
		frames = append(frames, qlog.Frame{Frame: &qlog.StreamFrame{Offset: ends[i], Length: ends[i+1] - ends[i]}})
	}
	return frames
}

// What is counted follows what quic-go keeps: lost data until it has arrived, in as many
// frames as quic-go has made of it, and nothing else.
func TestFlightOfPackets(t *testing.T) {
	f := &flight{scope: &network.NullScope{}}
	held := func(what string, frames int) {
		t.Helper()
		f.settle()
		if f.held != frames*fullFrame {
			t.Errorf("%s: %d bytes are held, which is %d frames, want %d", what, f.held, f.held/fullFrame, frames)
		}
	}
	for n := range int64(10) {
		f.sent(n, 1200, streamFrames(n*1000, n*1000+1000))
	}
	held("sent", 10)
	f.acked(0, 3)
	f.acked(6, 6)
	held("acknowledged", 5)
	f.acked(0, 6)
	held("acknowledged again, and two others", 3)
	f.wasLost(7)
	f.wasLost(7)
	f.wasLost(3)
	held("lost", 3)
	f.sent(10, 300, []qlog.Frame{{Frame: &qlog.PingFrame{}}})
	held("an acknowledgement with a PING", 3)
	f.sent(11, 1200, streamFrames(7000, 7600))
	held("the first part is sent again", 4)
	f.sent(12, 1200, streamFrames(7600, 8000, 10000, 10600))
	held("the second is, and something new", 5)
	f.probe()
	f.sent(13, 1200, streamFrames(8000, 8900))
	held("a probe with a part of the oldest packet", 6)
	f.acked(8, 8)
	held("what came of the oldest packet is acknowledged", 6)
	f.sent(14, 1200, streamFrames(8900, 9000))
	held("a probe with the rest", 6)
	f.allLost()
	held("moved", 6)
	f.acked(9, 14)
	held("what was sent before is acknowledged", 6)
	f.sent(15, 60, []qlog.Frame{{Frame: &qlog.ResetStreamFrame{}}}) // a short packet: nothing waits
	held("the stream is reset", 0)
	f.sent(16, 1200, streamFrames(11000, 11800))
	f.sent(17, 1200, streamFrames(11800, 12800))
	f.wasLost(16)
	held("a frame of it is lost", 1)
	f.acked(17, 17)
	held("the last is acknowledged", 0)
	if f.cost != 0 || f.lostCost != 0 || f.live != 0 || len(f.frames) != 0 || f.lost != nil {
		t.Errorf("%d and %d bytes, %d of %d frames and %v are left, want none", f.cost, f.lostCost, f.live, len(f.frames), f.lost)
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

// What quic-go cuts is booked. Without memory, room is asked for; beyond the most that a
// connection may have, the connection is to be closed.
func TestFlightBooksCuts(t *testing.T) {
	scope := &countingScope{most: 2 * flightStep}
	asked, most := 0, 0
	f := &flight{scope: scope, uncovered: func() { asked++ }, burst: func() { most++ }}
	const size = 4 << 10
	first, next := int64(0), int64(0) // packets
	for length := int64(1024); length >= 1; length /= 2 {
		for n := first; n < next; n++ {
			f.wasLost(n)
		}
		first = next
		for at := int64(0); at < size; at += length {
			f.sent(next, 1200, streamFrames(at, at+length))
			next++
		}
		frames := int(size / length)
		if f.held != frames*fullFrame {
			t.Fatalf("%d bytes are held, want %d frames", f.held, frames)
		}
		missing := f.held > freeFlight+scope.most+freeFlight
		if f.booked != scope.booked || !missing && f.held > freeFlight+f.booked || missing != (asked > 0) {
			t.Errorf("%d frames: %d bytes are booked, and room was asked for %d times", frames, f.booked, asked)
		}
		if tooMany := f.held > freeFlight+maxFlight+maxCut; tooMany != (most > 0) {
			t.Errorf("%d frames: the connection was to be closed %d times", frames, most)
		}
	}
	f.acked(first, next)
	f.settle()
	if f.held != 0 || f.booked != 0 || f.cut != 0 || scope.booked != 0 {
		t.Errorf("%d bytes stay held and %d booked", f.held, scope.booked)
	}
}

// Who has had most cut is closed when there is no memory for more, and nobody else.
func TestWhoHasMostCutIsClosed(t *testing.T) {
	p := newPieces(newBudgets(limits{perNetwork: 1}), new(tally))
	asking, greedy, honest := newAccount(t, p), newAccount(t, p), newAccount(t, p)
	honest.hold(initialWindow + 4*pieceStep)
	honest.flight.claim(maxFlight)
	for c, frames := range map[*connPieces]int64{asking: 10, greedy: 20} {
		for n := range frames {
			c.flight.sent(n, 1200, streamFrames(n, n+1))
		}
	}
	asking.flight.uncovered()
	if asking.doomed || !greedy.doomed || honest.doomed {
		t.Errorf("closed: asking %v, greedy %v, honest %v, want only the greedy one", asking.doomed, greedy.doomed, honest.doomed)
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
		c.flight.sent(1, 1200, streamFrames(0, 1100))
	}
	stalled.flight.heard = time.Now().Add(-stallTime)
	small.hold(initialWindow + pieceStep)
	p.makeRoom(nil, nil)
	if !stalled.doomed || busy.doomed || small.doomed {
		t.Errorf("closed: stalled %v, busy %v, small %v, want only the stalled one", stalled.doomed, busy.doomed, small.doomed)
	}
	stalled.Done()
	p.looked = time.Time{}
	p.makeRoom(nil, nil)
	if busy.doomed || small.doomed {
		t.Error("somebody was closed although nobody has stalled")
	}
}

// A stream's time does not end, and does not grow, when the machine's clock is put right.
func TestDeadlineIgnoresTheClock(t *testing.T) {
	for _, shift := range []time.Duration{-24 * time.Hour, 24 * time.Hour} {
		// As if the clock had been put right by so much since at was computed.
		at := time.Now().Add(time.Hour)
		before := at.Round(0)
		*(*int64)(unsafe.Pointer(&at)) += int64(shift/time.Second) << 30 // the seconds by the clock, in time.Time
		if at.Round(0).Sub(before) != shift {
			t.Fatal("package time has another layout now")
		}
		var d deadline
		d.set(at)
		if left, ok := d.left(); !ok || left <= 0 || left > time.Hour {
			t.Errorf("a deadline in an hour, by a clock that is off by %v: %v left, %v", shift, left, ok)
		}
		d.set(time.Time{})
		if left, ok := d.left(); ok {
			t.Errorf("no deadline: %v left", left)
		}
	}
}
