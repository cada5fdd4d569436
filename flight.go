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
// The tracer in pieces.go tells what is sent, acknowledged and lost. A lost frame has no
// packet until quic-go sends it again, which it does before anything new (Append in its
// framer.go). Where a packet has less room than the frame needs, quic-go cuts the frame in
// two, and each part takes as much memory as the whole. So a client that acknowledges little
// makes quic-go keep more and more, without any Write. That is booked, too, and a client
// for which too much is cut is closed.

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
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlog"
)

const (
	// fullFrame is what quic-go keeps for a STREAM frame with data that it has sent, in
	// bytes: a buffer for a whole packet, whatever is in it, and what belongs to the
	// packet. TestFlightCosts measures 1 680 to 1 910, with a little that the test takes.
	// emptyFrame is the same without data.
	fullFrame  = 1900
	emptyFrame = 288

	// flownData is how much data of a long write a packet carries at least, in bytes.
	flownData = 1100

	// flightStep sets how much is booked or given back at a time, in bytes.
	flightStep = 16 << 10

	// stallTime is how long a client may acknowledge nothing while others need the memory
	// that it holds: half of the time after which the clients give up a connection.
	stallTime = 5 * time.Second

	// unfilledPacket is the size below which quic-go has sent all that it had, in bytes. It
	// leaves at most 128 bytes of a packet free (MinStreamFrameSize in its params.go), and
	// a packet has 1200 (sockets.go).
	unfilledPacket = 1200 - 256

	// mostResets limits how many streams that were reset are remembered: as many as the
	// client can have open, and as many after them.
	mostResets = 2 * maxIncomingStreams
)

// flownCost returns what a STREAM frame with so many bytes of data costs, in bytes.
func flownCost(length int64) int {
	if length == 0 {
		return emptyFrame
	}
	return fullFrame
}

// flight is one connection's, and books in scope.
type flight struct {
	scope     network.ResourceScope
	short     func() // called when a writer finds no more memory to book
	uncovered func() // called when there is no memory to book for what quic-go has cut
	burst     func() // called when more is held than one connection may ever have

	// Only quic-go's goroutine uses these fields. frames has the frames of packets whose
	// acknowledgement quic-go waits for, in the order of the packets' numbers. lost has
	// those that are to be sent again: where each begins, and the offset at which it ends.
	// cost and lostCost are what they cost.
	frames         []flownFrame
	live           int // how many of frames are not gone
	lost           map[flownPlace]int64
	cost, lostCost int
	probes         int                        // packets that are still to be sent for a timeout
	reset          map[quic.StreamID]struct{} // streams of which nothing is sent again

	mu      sync.Mutex
	flying  int           // cost
	held    int           // cost and lostCost
	writing int           // what Writes that have not returned may add
	booked  int           // beyond freeFlight
	cut     int           // the part of booked that is for what quic-go has cut
	heard   time.Time     // when something was acknowledged, or nothing was in flight
	room    chan struct{} // closed when there may be room; nil: nobody waits
}

// flownFrame is a STREAM frame in a packet. A packet without any has one entry, with noData.
type flownFrame struct {
	number int64 // of the packet
	flownPlace
	length int32
	state  flownState
}

type flownState byte

const (
	withData flownState = iota
	noData
	gone // quic-go no longer waits for it
)

// flownPlace says where the data of a frame begins. No two frames begin at one place.
type flownPlace struct {
	stream quic.StreamID
	offset int64
}

// sent notes a packet of the given size, and reports whether it is to be acknowledged.
func (f *flight) sent(number int64, size int, frames []qlog.Frame) (eliciting bool) {
	usual, path := false, false
	for _, frame := range frames {
		switch frame := frame.Frame.(type) {
		case *qlog.AckFrame:
			continue // a packet with nothing else is not acknowledged itself
		case *qlog.PingFrame:
		case *qlog.PathChallengeFrame, *qlog.PathResponseFrame:
			path = true
		case *qlog.ResetStreamFrame:
			f.forget(frame.StreamID)
			usual = true
		default:
			usual = true
		}
		eliciting = true
	}
	if !eliciting || path && !usual {
		return eliciting // quic-go counts packets for another path apart
	}
	if f.probes > 0 {
		// quic-go takes the frames of the oldest packet, and forgets the packet
		// (QueueProbePacket in its sent_packet_handler.go).
		f.probes--
		f.trim()
		if len(f.frames) > 0 {
			f.lose(f.frames[0].number)
		}
	}
	data := false
	for _, frame := range frames {
		if s, ok := frame.Frame.(*qlog.StreamFrame); ok {
			f.again(s)
			f.frames = append(f.frames, flownFrame{number, flownPlace{s.StreamID, s.Offset}, int32(s.Length), withData})
			f.cost += flownCost(s.Length)
			f.live++
			data = true
		}
	}
	if !data {
		f.frames = append(f.frames, flownFrame{number: number, state: noData})
		f.live++
	}
	// If frames waited to be sent again, they would have filled this packet. So none waits,
	// and what is left in lost belongs to streams that were reset. A packet with a PING alone
	// says nothing: quic-go adds one to acknowledgements, also while the window is full.
	if usual && size < unfilledPacket {
		f.lost, f.lostCost = nil, 0
	}
	f.settle()
	return true
}

// again notes that a frame, if it was lost, is sent again: all of it, or its first part.
func (f *flight) again(s *qlog.StreamFrame) {
	place := flownPlace{s.StreamID, s.Offset}
	end, was := f.lost[place]
	if !was {
		return
	}
	delete(f.lost, place)
	if rest := s.Offset + s.Length; rest < end {
		f.lost[flownPlace{s.StreamID, rest}] = end
		return // the rest costs as much as the whole did
	}
	if f.lostCost -= flownCost(s.Length); len(f.lost) == 0 {
		f.lost = nil // maps do not shrink
	}
}

// forget notes that a stream was reset.
func (f *flight) forget(stream quic.StreamID) {
	if f.reset == nil || len(f.reset) >= mostResets {
		f.reset = make(map[quic.StreamID]struct{})
	}
	f.reset[stream] = struct{}{}
}

// probe notes that quic-go has waited too long, and sends two packets to find out what has
// arrived.
func (f *flight) probe() { f.probes += 2 }

// acked notes that packets first to last have arrived. Call settle after the last range.
func (f *flight) acked(first, last int64) {
	for i := f.find(first); i < len(f.frames) && f.frames[i].number <= last; i++ {
		if f.frames[i].state != gone {
			f.drop(i)
			f.probes = 0
		}
	}
}

// wasLost notes that the data of a packet has to be sent again. quic-go reports lost packets
// from the oldest on, so it no longer has any that is older.
func (f *flight) wasLost(number int64) {
	for i := 0; i < len(f.frames) && f.frames[i].number < number; i++ {
		f.drop(i)
	}
	f.lose(number)
	f.trim()
}

// allLost notes that all has to be sent again, because the client has moved.
func (f *flight) allLost() {
	for i := range f.frames {
		f.wait(i)
	}
	f.frames = nil
}

// lose notes that the frames of a packet have to be sent again.
func (f *flight) lose(number int64) {
	for i := f.find(number); i < len(f.frames) && f.frames[i].number == number; i++ {
		f.wait(i)
	}
}

// wait makes a frame wait to be sent again.
func (f *flight) wait(i int) {
	if p := f.frames[i]; p.state == withData {
		if _, over := f.reset[p.stream]; !over {
			if f.lost == nil {
				f.lost = make(map[flownPlace]int64)
			}
			f.lost[p.flownPlace] = p.offset + int64(p.length)
			f.lostCost += flownCost(int64(p.length))
		}
	}
	f.drop(i)
}

// find returns the index of the first frame in a packet from that number on.
func (f *flight) find(number int64) int {
	i, _ := slices.BinarySearchFunc(f.frames, number, func(p flownFrame, n int64) int { return cmp.Compare(p.number, n) })
	return i
}

// drop forgets a frame.
func (f *flight) drop(i int) {
	p := &f.frames[i]
	if p.state == gone {
		return
	}
	if p.state == withData {
		f.cost -= flownCost(int64(p.length))
	}
	p.state = gone
	f.live--
}

// trim gives up the places of frames that are gone.
func (f *flight) trim() {
	for len(f.frames) > 0 && f.frames[0].state == gone {
		f.frames = f.frames[1:]
	}
	if len(f.frames) > 2*f.live+64 {
		f.frames = slices.DeleteFunc(f.frames, func(p flownFrame) bool { return p.state == gone })
	}
	if f.live == 0 && len(f.lost) == 0 {
		f.reset = nil
	}
}

// settle lets writers see what has changed, and gives back what need not be booked.
func (f *flight) settle() {
	f.trim()
	f.mu.Lock()
	less := f.cost+f.lostCost < f.held
	if less || f.held == 0 {
		f.heard = time.Now()
	}
	f.flying, f.held = f.cost, f.cost+f.lostCost
	if less {
		f.wake()
	}
	over := f.held - freeFlight - f.booked
	if over > 0 {
		over -= f.cover(over)
	}
	tooMuch := f.held > freeFlight+maxFlight+maxCut
	f.mu.Unlock()
	switch {
	case tooMuch:
		f.burst()
	case over > freeFlight: // more than a few packets, for which nobody is closed
		f.uncovered()
	}
}

// cover books n bytes more for frames that quic-go has cut, or as much as it can, and
// returns how much. It is called with the lock.
func (f *flight) cover(n int) int {
	priority := network.ReservationPriorityHigh // higher than for writers, who can wait
	if f.cut == 0 {
		priority = network.ReservationPriorityAlways // the first booking is small, and more urgent than a large one
	}
	n = (n + flightStep - 1) / flightStep * flightStep
	if f.booked+n > maxFlight+maxCut || f.scope.ReserveMemory(n, priority) != nil {
		return 0
	}
	f.booked += n
	f.cut += n
	return n
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
		f.cut = min(f.cut, f.booked)
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

// excess returns how much is held that no writer has booked, in bytes.
func (f *flight) excess() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return max(0, f.held-freeFlight-(f.booked-f.cut))
}

// claim returns how many of n bytes may be written now, and what they count as until
// wrote is called. If none may, it returns a channel that is closed when it is time to
// try again. denied says that it could not book enough.
func (f *flight) claim(n int) (bytes, cost int, again <-chan struct{}, denied bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	want := (n + flownData - 1) / flownData * fullFrame
	room := freeFlight + min(f.booked, maxFlight) - f.held - f.writing
	if room < want && f.booked < maxFlight {
		room += f.book(want - room)
		denied = room < want && f.booked < maxFlight
	}
	frames := min(want, room) / fullFrame
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
	cost = frames * fullFrame
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
// keeps the reading of the monotonic clock, too. With that of the wall clock alone, a circuit
// of an hour would end at once when the wall clock is put forward by an hour.
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
