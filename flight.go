package main

// Flight: what the relay has sent to a client, and the client has not acknowledged.
//
// quic-go keeps all of it, to send it again, and lets it grow with the congestion
// window: up to 12 MB for each connection, if the client acknowledges fast and then
// stops. No option of quic-go bounds that. But quic-go can only keep what it is
// given. So a stream's Write waits here until there is room: a little is free for each
// connection, more is booked in the memory that all share. When that memory runs out,
// writers wait for acknowledgements, and a connection that has not acknowledged anything
// for a while may be closed.
//
// The tracer in pieces.go tells what is sent, acknowledged and lost. Lost data has no
// packet until quic-go sends it again, which it does before anything new (Append in its
// framer.go).

import (
	"cmp"
	"context"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
)

const (
	// flownFrame is what quic-go keeps for a STREAM frame with data that it has sent, in
	// bytes: a buffer for a whole packet, whatever is in it, and what belongs to the
	// packet. TestFlightCosts measures 1 750 to 1 910, with a little that is its own.
	// emptyFrame is the same without data.
	flownFrame = 1900
	emptyFrame = 288

	// flownData is how much data of a long write a packet carries at least, in bytes.
	flownData = 1100

	// flightStep sets how much is booked or given back at a time, in bytes.
	flightStep = 16 << 10

	// stallTime is how long a client may acknowledge nothing while others need the memory
	// that it holds: half of the time after which the clients give up a connection.
	stallTime = 5 * time.Second

	// unfilledPacket is less than any packet has that quic-go has filled, in bytes: of the
	// 1200 in sockets.go it leaves up to 128 free (MinStreamFrameSize in its params.go).
	// After a shorter packet, nothing waits to be sent again.
	unfilledPacket = 1200 - 256
)

// flownCost returns what a STREAM frame with so many bytes of data costs, in bytes.
func flownCost(length int64) int {
	if length == 0 {
		return emptyFrame
	}
	return flownFrame
}

// flight is one connection's, and books in scope.
type flight struct {
	scope network.ResourceScope
	short func() // is called when a writer finds no more memory to book

	// Only quic-go's goroutine uses these fields. packets are those with stream data, by
	// their numbers; cost and bytes are the sums over them. lost is what the frames cost
	// that were lost and not sent again. sentNow says that the last event was a packet
	// for packets.
	packets     []flownPacket
	cost, bytes int
	lost        int
	sentNow     bool

	mu      sync.Mutex
	flying  int           // cost
	held    int           // cost and lost
	writing int           // what Writes that have not returned may add
	booked  int           // beyond freeFlight
	heard   time.Time     // when something was acknowledged, or nothing was in flight
	room    chan struct{} // closed when there may be room; nil: nobody waits
}

// flownPacket is a packet that quic-go keeps. One that it does not keep any more has
// cost 0, until all before it are gone.
type flownPacket struct {
	number int64
	cost   int32
	size   int32
}

// sent notes a packet of the given size that is to be acknowledged. cost is that of its
// STREAM frames.
func (f *flight) sent(number int64, size, cost int) {
	f.lost -= min(f.lost, cost)
	if size < unfilledPacket {
		f.lost = 0
	}
	if f.sentNow = cost > 0; f.sentNow {
		f.packets = append(f.packets, flownPacket{number, int32(cost), int32(size)})
		f.cost += cost
		f.bytes += size
	}
	f.settle()
}

// inFlight notes how many bytes quic-go says are in flight. It says so after each packet
// that it sends. Of lost packets it reports only some: a probe takes the data of the
// oldest packet (QueueProbePacket in its sent_packet_handler.go), and the packet is gone.
func (f *flight) inFlight(bytes int) {
	if !f.sentNow {
		return // 0 may also mean that nothing has changed
	}
	f.sentNow = false
	for f.bytes > bytes {
		f.drop(0)
		f.trim()
	}
	f.settle()
}

// acked notes that packets first to last have arrived. Call settle after the last range.
func (f *flight) acked(first, last int64) {
	for i := f.find(first); i < len(f.packets) && f.packets[i].number <= last; i++ {
		f.drop(i)
	}
}

// wasLost notes that the data of a packet has to be sent again.
func (f *flight) wasLost(number int64) {
	if i := f.find(number); i < len(f.packets) && f.packets[i].number == number {
		f.lost += f.drop(i)
		f.trim()
	}
}

// allLost notes that all has to be sent again, because the client has moved.
func (f *flight) allLost() {
	f.lost += f.cost
	f.packets, f.cost, f.bytes = nil, 0, 0
}

// find returns the index of the first packet from that number on.
func (f *flight) find(number int64) int {
	i, _ := slices.BinarySearchFunc(f.packets, number, func(p flownPacket, n int64) int { return cmp.Compare(p.number, n) })
	return i
}

// drop forgets a packet, and returns what it cost.
func (f *flight) drop(i int) int {
	p := &f.packets[i]
	cost := int(p.cost)
	f.cost -= cost
	f.bytes -= int(p.size)
	p.cost, p.size = 0, 0
	return cost
}

func (f *flight) trim() {
	for len(f.packets) > 0 && f.packets[0].cost == 0 {
		f.packets = f.packets[1:]
	}
}

// settle lets writers see what has changed, and gives back what need not be booked.
func (f *flight) settle() {
	f.trim()
	f.mu.Lock()
	defer f.mu.Unlock()
	less := f.cost+f.lost < f.held
	if less || f.held == 0 {
		f.heard = time.Now()
	}
	f.flying, f.held = f.cost, f.cost+f.lost
	if less {
		f.wake()
	}
}

// wake lets writers try again. It is called with the lock.
func (f *flight) wake() {
	if f.room != nil {
		close(f.room)
		f.room = nil
	}
	// Do not give back a little each time: a circuit needs it again in a moment.
	if need := max(0, f.held+f.writing-freeFlight); f.booked > 0 && need <= f.booked/4 {
		n := f.booked - (need+flightStep-1)/flightStep*flightStep
		f.booked -= n
		f.scope.ReleaseMemory(n)
	}
}

// stalled returns how much is booked, if the client has not acknowledged anything for a
// while, or 0.
func (f *flight) stalled(now time.Time) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held == 0 || now.Sub(f.heard) < stallTime {
		return 0
	}
	return f.booked
}

// claim returns how many of n bytes may be written now, and what they count as until
// wrote is called. If none may, it returns a channel that is closed when it is time to
// try again. denied says that it could not book enough.
func (f *flight) claim(n int) (bytes, cost int, again <-chan struct{}, denied bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	want := (n + flownData - 1) / flownData * flownFrame
	room := freeFlight + f.booked - f.held - f.writing
	if room < want && f.booked < maxFlight {
		room += f.book(want - room)
		denied = room < want && f.booked < maxFlight
	}
	frames := min(want, room) / flownFrame
	// With nothing in flight, nothing would ever make room.
	if frames <= 0 && f.flying+f.writing == 0 {
		frames = 1
	}
	if frames <= 0 {
		if f.room == nil {
			f.room = make(chan struct{})
		}
		return 0, 0, f.room, denied
	}
	cost = frames * flownFrame
	f.writing += cost
	return min(n, frames*flownData), cost, nil, denied
}

// book books at least n more bytes, or as many as it can, and returns how many. It is
// called with the lock.
func (f *flight) book(n int) (got int) {
	if f.booked == 0 { // enough for most answers, and small, so more urgent than a large one
		got = f.reserve(flightStep, network.ReservationPriorityHigh)
	}
	if got < n && f.booked > 0 {
		// Windows and pieces come first, because connections end without room for them.
		got += f.reserve(n-got, network.ReservationPriorityLow)
	}
	return got
}

func (f *flight) reserve(n int, priority uint8) int {
	n = min((n+flightStep-1)/flightStep*flightStep, maxFlight-f.booked)
	if n <= 0 || f.scope.ReserveMemory(n, priority) != nil {
		return 0
	}
	f.booked += n
	return n
}

// wrote ends what claim began: the bytes are in flight by now, or will be in a moment, or
// never.
func (f *flight) wrote(cost int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writing -= cost
	f.wake()
}

// flyingStream is a stream whose writes wait for room.
type flyingStream struct {
	network.MuxedStream
	flight *flight
	over   <-chan struct{} // closed when nothing more can be sent

	deadline deadline // for writes
}

// newFlyingStream returns one of quic-go's streams, wrapped.
func newFlyingStream(s network.MuxedStream, f *flight) *flyingStream {
	return &flyingStream{MuxedStream: s, flight: f, over: s.(interface{ Context() context.Context }).Context().Done()}
}

func (s *flyingStream) Write(p []byte) (written int, err error) {
	if len(p) == 0 {
		return s.MuxedStream.Write(p)
	}
	for {
		n, cost, again, denied := s.flight.claim(len(p))
		if denied {
			s.flight.short()
		}
		if again != nil {
			if err := s.wait(again); err != nil {
				return written, err
			}
			continue
		}
		n, err = s.MuxedStream.Write(p[:n])
		s.flight.wrote(cost)
		written += n
		if p = p[n:]; err != nil || len(p) == 0 {
			return written, err
		}
	}
}

// wait waits until there may be room. It returns an error if there is none before the
// deadline, which it looks at once.
func (s *flyingStream) wait(again <-chan struct{}) error {
	var late <-chan time.Time
	if left, ok := s.deadline.left(); ok {
		timer := time.NewTimer(left)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case <-again:
		return nil
	case <-late:
		return os.ErrDeadlineExceeded
	case <-s.over:
		_, err := s.MuxedStream.Write(nil) // says why
		return cmp.Or(err, io.ErrClosedPipe)
	}
}

func (s *flyingStream) SetDeadline(t time.Time) error {
	s.deadline.set(t)
	return s.MuxedStream.SetDeadline(t)
}

func (s *flyingStream) SetWriteDeadline(t time.Time) error {
	s.deadline.set(t)
	return s.MuxedStream.SetWriteDeadline(t)
}

// deadline keeps when a stream's reads or writes have to end. The zero value is none. It
// keeps the monotonic clock's reading, too: by the other clock, a circuit of an hour would
// end at once when that is put right by an hour.
type deadline struct{ at atomic.Pointer[time.Time] } // nil: none

func (d *deadline) set(t time.Time) {
	if t.IsZero() {
		d.at.Store(nil)
		return
	}
	d.at.Store(&t)
}

// left returns how long there is until the deadline, and false if there is none.
func (d *deadline) left() (time.Duration, bool) {
	at := d.at.Load()
	if at == nil {
		return 0, false
	}
	return time.Until(*at), true
}
