package main

// Pieces: what it costs quic-go to keep the small frames that clients send.
//
// quic-go keeps each STREAM and CRYPTO frame that it has received, in a map, until
// the application has read everything before it. Flow control counts the bytes in a
// frame, but not what keeping the frame costs: 32 KiB in frames of one byte take 6.8
// MiB. So each incoming connection has an account here. A tracer adds up what the
// frames cost, and a wrapper around libp2p's streams takes off what has been read.
// What the QUIC windows do not cover is booked in the memory that all connections
// share. When that memory runs out, the connection that has booked most is closed.
//
// The tracer also sees what clients have not acknowledged (flight.go), and what honest
// clients never do: send packets of hundreds of frames, each of which may take quic-go
// as long as a whole packet, and send packet after packet without any acknowledgement,
// so that quic-go has to keep all that it has sent. The wrapper also sees identify messages,
// which take many times their length, and makes requests and small reads wait that are
// beyond the budget of the client's network (budgets.go).
//
// This file relies on nothing inside quic-go except what a frame costs: see pieceCost.
// flight.go relies on more, and says where.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
	"golang.org/x/time/rate"
)

const (
	// smallPiece and largePiece give what a frame costs beyond its window, in bytes:
	// smallPiece with fewer than pooledFrame bytes of data, largePiece with more.
	// From wholeFrame bytes on, the window covers enough. TestPieceCosts measures the
	// costs: 175 for one byte of data, 280 for 127 bytes, 1752 for 128.
	smallPiece  = 288
	largePiece  = 1800
	pooledFrame = 128 // MinStreamFrameBufferSize in quic-go's params.go
	wholeFrame  = 896

	// pieceStep sets how much is booked or given back at a time, in bytes.
	pieceStep = 16 << 10

	// maxPieces caps what is booked for one connection's pieces, in bytes. After an outage,
	// clients send what was lost in frames that are cut in two. A whole window of these
	// takes 4.9 MiB, of which the window covers 1.5. Of 32 honest clients that lost all
	// of a full window eight times, the worst had 1.2 MiB booked.
	maxPieces = 7 << 19

	// usualFrames sets how many frames of a packet cost no budget. Of the frames
	// beyond that, a connection may send a fifth of framesPerSecond. When its network
	// has no budget left, it may still send sharedFrames in a burst. Attacks need 100
	// to 1 000 frames in each packet.
	usualFrames  = 8
	sharedFrames = 64

	// readsPerRequest sets how many reads of at most smallRead bytes cost as much of the
	// budget as a request. A whole request takes six or seven, from the protocol's name
	// on. Circuits read more at a time.
	smallRead       = 64
	readsPerRequest = 16

	// identifyPart sets what each byte of an identify message takes, in bytes, until
	// go-libp2p has read all of it. Such a message may have ten parts of 8 KiB. An empty
	// address in it has two bytes, and go-libp2p keeps a slice for it: 72 KiB took 988 KiB.
	// maxIdentify limits the whole message, in bytes, to two full parts. Clients send
	// about 1 KiB.
	identifyPart = 14
	maxIdentify  = 16 << 10

	// lookInterval limits how often makeRoom looks for clients that have stalled because a
	// circuit waits for memory. Looking at 10 000 connections takes 0.2 to 5 ms.
	lookInterval = 100 * time.Millisecond

	// usualCrypto sets how many CRYPTO frames a handshake may have. Those of the clients
	// have fewer than ten, and attacks 200 in each packet.
	usualCrypto = 64

	// ackTimeout limits how long a client may go on sending without acknowledging
	// anything. The clients' own connections end after 10 s.
	ackTimeout = 20 * time.Second

	// owedPerAck sets how many of the frames that quic-go keeps we count as
	// acknowledged when the client acknowledges something. When quic-go keeps many,
	// one packet carries hundreds.
	owedPerAck = 32
)

// errTooManyPieces closes a connection that goes over a bound. libp2p has no
// counterpart to EXCESSIVE_LOAD in HTTP/3, so this is its code for a resource limit.
const errTooManyPieces = quic.ApplicationErrorCode(network.ConnResourceLimitExceeded)

// pieceCost returns what a frame with so many bytes of data costs beyond its window,
// in bytes.
func pieceCost(length int64) int {
	switch {
	case length == 0 || length >= wholeFrame:
		return 0
	case length < pooledFrame:
		return smallPiece
	default:
		return largePiece
	}
}

// pieces holds the accounts of all incoming connections. A nil *pieces keeps none.
type pieces struct {
	tally   *tally
	budgets *budgets

	// flooded, if it is not nil, is called with the connection ID of a handshake in too
	// many pieces. It cannot be closed before libp2p has accepted it, so nothing more
	// may reach it.
	flooded func(id []byte)

	mu      sync.Mutex
	conns   map[*connPieces]struct{}
	closing *connPieces // being closed to make room; nil: none
	looked  time.Time   // when makeRoom last looked for connections that have stalled
}

func newPieces(b *budgets, t *tally) *pieces {
	return &pieces{tally: t, budgets: b, conns: make(map[*connPieces]struct{})}
}

// begin makes the account of a new connection, which ends with its Done. The account
// replaces scope as the connection's scope in the resource manager. quic-go needs the
// context that begin returns, because the tracer finds the account in it. moves is called
// at the start, and when quic-go is about to send to another address of the client. On a
// nil *pieces, begin returns ctx and scope unchanged.
func (p *pieces) begin(ctx context.Context, scope network.ConnManagementScope, from net.Addr, moves func()) (context.Context, network.ConnManagementScope) {
	if p == nil {
		return ctx, scope
	}
	c := &connPieces{
		ConnManagementScope: scope,
		all:                 p,
		moves:               moves,
		over:                ctx.Done(),
		streams:             make(map[quic.StreamID]*streamPieces),
		free:                initialWindow,
		frames:              rate.NewLimiter(framesPerSecond/5, framesPerSecond),
		flight:              flight{scope: scope},
	}
	c.flight.short = func() {
		if !c.peerHasMuch() {
			p.makeRoom(nil, nil)
		}
	}
	c.flight.uncovered = func() {
		if c.peerHasMuch() {
			c.close(refusedMemory)
		} else {
			p.makeRoom(c, func(c *connPieces) int { return c.flight.excess() })
		}
	}
	c.flight.burst = func() { c.close(refusedMemory) }
	c.budget.Store(p.budgets.of(addrPort(from).Addr()))
	p.mu.Lock()
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	return context.WithValue(ctx, accountKey{}, c), c
}

type accountKey struct{}

// trace serves as the Tracer of quic.Config. It traces connections whose context has
// an account.
func (p *pieces) trace(ctx context.Context, _ bool, _ quic.ConnectionID) qlogwriter.Trace {
	if c, ok := ctx.Value(accountKey{}).(*connPieces); ok {
		return c
	}
	return nil
}

// connPieces combines one connection's account, the trace that fills it, and the
// scope that it is booked in.
type connPieces struct {
	network.ConnManagementScope
	all    *pieces
	moves  func()
	over   <-chan struct{}        // closed when the connection is
	budget atomic.Pointer[budget] // of the network where the client is now; nil: none

	// last points to the stream of the last frame, so that the next frame of the same
	// stream needs no look at the map. Only quic-go's goroutine uses it.
	last *streamPieces

	// Only the same goroutine uses these fields. sent numbers the last packet that
	// the client has to acknowledge, and acked the last that it has acknowledged.
	// stalled says since when it has acknowledged nothing, or is zero. owed counts
	// the frames that quic-go keeps until the client acknowledges them. frames limits
	// frames beyond usualFrames.
	sent, acked int64
	stalled     time.Time
	owed        int
	crypto      int // CRYPTO frames so far
	frames      *rate.Limiter

	// flight is what was sent and not acknowledged.
	flight flight

	held atomic.Int64 // what all pieces cost now, in bytes

	mu       sync.Mutex
	conn     *quic.Conn // nil before libp2p has accepted it
	free     int        // bytes of pieces that the windows cover
	booked   int        // bytes booked beyond free
	doomed   bool       // to be closed
	ended    bool       // has ended, or is being closed
	gone     bool       // has ended
	streams  map[quic.StreamID]*streamPieces
	accepted quic.StreamID // the next stream that libp2p will accept
}

// ReserveMemory books memory for windows that grow. libp2p calls it.
func (c *connPieces) ReserveMemory(n int, priority uint8) error {
	err := c.ConnManagementScope.ReserveMemory(n, priority)
	if err == nil {
		c.mu.Lock()
		c.free += n
		c.mu.Unlock()
	}
	return err
}

func (c *connPieces) ReleaseMemory(n int) {
	c.mu.Lock()
	c.free -= n
	c.mu.Unlock()
	c.ConnManagementScope.ReleaseMemory(n)
}

func (c *connPieces) AddProducer() qlogwriter.Recorder { return c }
func (*connPieces) SupportsSchemas(string) bool        { return false }

// RecordEvent counts what a packet carries. quic-go's goroutine for the connection
// calls it after it has handled a packet, and before it sends one.
func (c *connPieces) RecordEvent(e qlogwriter.Event) {
	switch packet := e.(type) {
	case qlog.PacketReceived:
		c.received(packet)
	case qlog.PacketSent:
		if packet.Header.PacketType != qlog.PacketType1RTT {
			return
		}
		if number := int64(packet.Header.PacketNumber); c.flight.sent(number, packet.Raw.Length, packet.Frames) {
			c.sent = number
		}
	case qlog.LossTimerUpdated:
		if packet.Type == qlog.LossTimerUpdateTypeExpired && packet.TimerType == qlog.TimerTypePTO &&
			qlog.EncryptionLevelToPacketType(packet.EncLevel) == qlog.PacketType1RTT {
			c.flight.probe()
		}
	case qlog.PacketLost:
		if packet.Header.PacketType == qlog.PacketType1RTT {
			c.flight.wasLost(int64(packet.Header.PacketNumber))
		}
	case qlog.RecoveryParametersSet:
		if packet.InitialCongestionWindow > 0 { // a new connection, or a new path
			c.flight.allLost()
			c.moves()
		}
	}
}

// received counts the frames of a packet.
func (c *connPieces) received(packet qlog.PacketReceived) {
	progress := false
	for _, f := range packet.Frames {
		switch f := f.Frame.(type) {
		case *qlog.StreamFrame:
			if f.Length < wholeFrame || f.Fin {
				c.add(f)
			}
		case *qlog.AckFrame:
			if packet.Header.PacketType != qlog.PacketType1RTT {
				continue
			}
			for _, r := range f.AckRanges {
				c.flight.acked(int64(r.Smallest), int64(r.Largest))
			}
			c.flight.settle()
			if largest := int64(f.LargestAcked()); largest > c.acked {
				c.acked, progress = largest, true
			}
		case *qlog.CryptoFrame:
			// quic-go reads CRYPTO frames itself, and keeps those that come out
			// of order for as long as the connection lasts.
			if f.Length > 0 {
				c.crypto++
				c.hold(smallPiece)
			}
		case *qlog.ResetStreamFrame:
			if s := c.stream(f.StreamID); s != nil {
				s.end(func(s *streamPieces) { s.final = true })
			}
			c.owe()
		case *qlog.NewConnectionIDFrame, *qlog.RetireConnectionIDFrame, *qlog.StopSendingFrame, *qlog.PathChallengeFrame:
			c.owe()
		}
	}
	if c.crypto > usualCrypto && packet.Header.PacketType != qlog.PacketType1RTT && c.all.flooded != nil {
		c.all.flooded(packet.Header.DestConnectionID.Bytes())
	}
	c.heard(progress)
	if extra := len(packet.Frames) - usualFrames; extra > 0 {
		c.spend(extra)
	}
}

// owe counts a frame that quic-go answers with a frame of its own, which it keeps
// until the client has acknowledged it.
func (c *connPieces) owe() {
	c.owed++
	c.hold(smallPiece)
}

// heard notes a packet from the client; progress says that it acknowledged something
// new. It closes a client that goes on sending but acknowledges nothing.
func (c *connPieces) heard(progress bool) {
	switch {
	case progress:
		c.stalled = time.Time{}
		if n := min(c.owed, owedPerAck); n > 0 {
			c.owed -= n
			c.let(n * smallPiece)
		}
	case c.sent <= c.acked:
		c.stalled = time.Time{}
	case c.stalled.IsZero():
		c.stalled = time.Now()
	case time.Since(c.stalled) > ackTimeout:
		c.close(refusedBudget)
	}
}

// spend takes frames beyond usualFrames from the budgets. It closes the connection
// if the network's budget is spent and the connection sends many of them, or if it
// sends many more than any client does.
func (c *connPieces) spend(extra int) {
	own := c.frames.ReserveN(time.Now(), min(extra, framesPerSecond)).Delay() > 0
	budget := c.budget.Load()
	all := budget != nil && budget.spend(budget.frames, extra) > 0
	if own || all && c.frames.Tokens() < framesPerSecond-sharedFrames {
		c.close(refusedBudget)
	}
}

func (*connPieces) Close() error { return nil }

// Done forgets a connection that has ended. It may be called more than once.
func (c *connPieces) Done() {
	c.mu.Lock()
	c.ended, c.gone = true, true
	c.mu.Unlock()
	c.all.mu.Lock()
	delete(c.all.conns, c)
	if c.all.closing == c {
		c.all.closing = nil
	}
	c.all.mu.Unlock()
	c.budget.Swap(nil).release()
	c.ConnManagementScope.Done() // gives back all memory
}

// moved makes the network that addr is in pay for the client from now on.
func (c *connPieces) moved(addr netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.gone {
		c.budget.Swap(c.all.budgets.of(addr)).release()
	}
}

// stream returns the account of a stream, or nil if the stream is over.
func (c *connPieces) stream(id quic.StreamID) *streamPieces {
	if c.last != nil && c.last.id == id {
		return c.last
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.streams[id]
	if s == nil && id%4 == 0 && id >= c.accepted {
		// A client opened this stream, and libp2p will accept it.
		s = &streamPieces{conn: c, id: id}
		c.streams[id] = s
	}
	c.last = s
	return s
}

// add counts a frame.
func (c *connPieces) add(f *qlog.StreamFrame) {
	s := c.stream(f.StreamID)
	if s == nil {
		return
	}
	if cost := pieceCost(f.Length); cost > 0 && s.add(f.Offset+f.Length, cost) {
		c.hold(cost)
		s.settle() // the application may have read it already
	}
	if f.Fin {
		s.end(func(s *streamPieces) { s.final = true })
	}
}

// hold adds to what the connection's pieces cost, and books what the windows do not
// cover. If there is no room, a connection is closed.
func (c *connPieces) hold(cost int) {
	switch err := c.book(int(c.held.Add(int64(cost)))); {
	case err == errMaxPieces, errors.Is(err, network.ErrResourceLimitExceeded) && c.peerHasMuch():
		c.close(refusedMemory)
	case errors.Is(err, network.ErrResourceLimitExceeded):
		c.all.makeRoom(c, (*connPieces).bookedForPieces)
	}
}

// peerHasMuch reports whether the connection's peer has more than one connection may take.
// It may then be at the peer's own limit that there is no room, and nobody else is closed
// for that.
func (c *connPieces) peerHasMuch() bool {
	p := c.PeerScope()
	return p != nil && p.Stat().Memory > peerMemory/connsPerPeer
}

// take is hold for those who can do without: if there is no room, it returns an error.
func (c *connPieces) take(cost int) error {
	err := c.book(int(c.held.Add(int64(cost))))
	if err != nil {
		c.held.Add(-int64(cost))
		c.all.tally.refuse(refusedMemory)
	}
	return err
}

// errMaxPieces says that a connection has as much booked as it may.
var errMaxPieces = errors.New("the connection holds too many pieces")

// book books what the windows do not cover of held bytes.
func (c *connPieces) book(held int) error {
	if held <= initialWindow {
		return nil
	}
	c.mu.Lock()
	over := held - c.free - c.booked
	if over <= 0 || c.ended || c.doomed {
		c.mu.Unlock()
		return nil
	}
	n := (over + pieceStep - 1) / pieceStep * pieceStep
	priority := network.ReservationPriorityMedium // as for windows
	if c.booked == 0 {
		priority = network.ReservationPriorityHigh // the first booking is small, and more urgent than a large one
	}
	if c.booked+n > maxPieces {
		c.mu.Unlock()
		return errMaxPieces
	}
	c.mu.Unlock()
	// If another goroutine books or releases memory meanwhile, too much stays booked until
	// the next release.
	if err := c.ConnManagementScope.ReserveMemory(n, priority); err != nil {
		return err
	}
	c.mu.Lock()
	c.booked += n
	c.mu.Unlock()
	return nil
}

// let takes what has been read off the cost of the connection's pieces, and gives
// back the memory that need not be booked any more.
func (c *connPieces) let(cost int) {
	held := int(c.held.Add(-int64(cost)))
	c.mu.Lock()
	n := c.booked
	if held > c.free {
		n -= (held - c.free + pieceStep) / pieceStep * pieceStep // and one step to spare
	}
	n = max(n, 0)
	c.booked -= n
	c.mu.Unlock()
	if n > 0 {
		c.ConnManagementScope.ReleaseMemory(n)
	}
}

// makeRoom closes the connection that has most in flight and acknowledges nothing. If
// there is none, it closes the connection for which taken returns most, which may be the
// one that asks. If asking is nil, it then closes none, and does not need taken. While one
// is being closed, makeRoom closes no other, and the connection that asks goes on.
func (p *pieces) makeRoom(asking *connPieces, taken func(*connPieces) int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.closing != nil || asking == nil && now.Sub(p.looked) < lookInterval {
		return
	}
	p.looked = now
	most, greediest := 0, asking
	for c := range p.conns {
		booked := c.flight.stalled(now)
		if booked > 0 {
			booked += peerMemory // before all others
		} else if asking != nil {
			booked = taken(c)
		}
		if booked > most {
			most, greediest = booked, c
		}
	}
	if greediest != nil {
		p.closing = greediest
		greediest.close(refusedMemory)
	}
}

func (c *connPieces) bookedForPieces() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.booked
}

// close closes the connection for the given reason, as soon as libp2p has accepted
// it.
func (c *connPieces) close(why refusal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.doomed {
		c.all.tally.refuse(why)
	}
	c.doomed = true
	if c.conn != nil && !c.ended {
		c.ended = true
		// In a goroutine, because CloseWithError waits for this one.
		go c.conn.CloseWithError(errTooManyPieces, "resource limit exceeded")
	}
}

// streamPieces holds one stream's account.
type streamPieces struct {
	conn *connPieces
	id   quic.StreamID

	read atomic.Int64 // bytes that the application has read
	cost atomic.Int64 // of both generations

	// We let a generation of pieces go when everything up to its end has been read.
	// New pieces go into the young generation, which then becomes the old one. So no
	// piece is let go too soon, and few too late.
	mu         sync.Mutex
	old, young generation
	final      bool // the client sends no more
	over       bool // the application reads no more
}

type generation struct {
	end  int64 // the highest offset of a piece
	cost int
}

// add counts a piece that ends at the given offset, and reports whether quic-go
// keeps it.
func (s *streamPieces) add(end int64, cost int) bool {
	if end <= s.read.Load() {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return false
	}
	s.young.end = max(s.young.end, end)
	s.young.cost += cost
	s.cost.Add(int64(cost))
	return true
}

// settle lets go of the pieces that have been read.
func (s *streamPieces) settle() {
	if s.cost.Load() == 0 {
		return
	}
	s.mu.Lock()
	let, read := 0, s.read.Load()
	for s.old.end <= read && s.old.cost+s.young.cost > 0 {
		let += s.old.cost
		s.old, s.young = s.young, generation{}
	}
	s.cost.Add(-int64(let))
	s.mu.Unlock()
	if let > 0 {
		s.conn.let(let)
	}
}

// end calls note, which marks one side as done with the stream. When both sides are
// done, quic-go forgets the stream, and so does end.
func (s *streamPieces) end(note func(*streamPieces)) {
	s.mu.Lock()
	note(s)
	let := 0
	if gone := s.final && s.over; gone {
		let = s.old.cost + s.young.cost
		s.old, s.young = generation{}, generation{}
		s.cost.Store(0)
		s.conn.mu.Lock()
		delete(s.conn.streams, s.id)
		s.conn.mu.Unlock()
	}
	s.mu.Unlock()
	if let > 0 {
		s.conn.let(let)
	}
}

// watchedTransport wraps libp2p's QUIC transport. Its incoming connections tell
// their accounts what has been read.
type watchedTransport struct{ transport.Transport }

func (t watchedTransport) Listen(at ma.Multiaddr) (transport.Listener, error) {
	l, err := t.Transport.Listen(at)
	if err != nil {
		return nil, err
	}
	return watchedListener{l}, nil
}

func (t watchedTransport) Close() error { return t.Transport.(io.Closer).Close() }

type watchedListener struct{ transport.Listener }

func (l watchedListener) Accept() (transport.CapableConn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	pieces := piecesOf(c)
	if pieces == nil {
		return c, nil
	}
	var conn *quic.Conn
	c.As(&conn)
	pieces.mu.Lock()
	pieces.conn = conn
	doomed := pieces.doomed
	pieces.mu.Unlock()
	if doomed {
		pieces.close(refusedMemory)
	}
	return watchedConn{c, pieces}, nil
}

// piecesOf returns the account of one of libp2p's connections, or nil if it has
// none.
func piecesOf(c interface{ As(any) bool }) *connPieces {
	var conn *quic.Conn
	if !c.As(&conn) {
		return nil
	}
	return accountOf(conn)
}

// accountOf returns the account of a connection, or nil if it has none.
func accountOf(c *quic.Conn) *connPieces {
	account, _ := c.QlogTrace().(*connPieces)
	return account
}

type watchedConn struct {
	transport.CapableConn
	pieces *connPieces
}

// AcceptStream waits while the client's network has spent its budget of requests.
// Meanwhile the client can open streams only up to its limit.
func (c watchedConn) AcceptStream() (network.MuxedStream, error) {
	s, err := c.CapableConn.AcceptStream()
	if err != nil {
		return nil, err
	}
	c.pieces.wait(1)
	return c.watch(s), nil
}

func (c watchedConn) OpenStream(ctx context.Context) (network.MuxedStream, error) {
	s, err := c.CapableConn.OpenStream(ctx)
	if err != nil {
		return nil, err
	}
	return c.watch(s), nil
}

func (c watchedConn) watch(s network.MuxedStream) network.MuxedStream {
	id := s.(interface{ StreamID() quic.StreamID }).StreamID()
	c.pieces.mu.Lock()
	defer c.pieces.mu.Unlock()
	account := c.pieces.streams[id]
	if account == nil {
		account = &streamPieces{conn: c.pieces, id: id}
		c.pieces.streams[id] = account
	}
	if id%4 == 0 {
		c.pieces.accepted = max(c.pieces.accepted, id+4)
	}
	return &watchedStream{MuxedStream: newFlyingStream(s, &c.pieces.flight), pieces: account}
}

// wait waits until the client's network may make n more requests, or the connection has
// ended.
func (c *connPieces) wait(n int) {
	if c == nil || n == 0 {
		return
	}
	budget := c.budget.Load()
	if budget == nil {
		return
	}
	pace, wait := budget.spend(budget.pace, n), budget.spend(budget.requests, n)
	if wait > 0 {
		c.all.tally.refuse(refusedBudget)
	}
	if wait = max(wait, pace); wait <= 0 {
		return
	}
	select {
	case <-time.After(wait):
	case <-c.over:
	}
}

// watchedStream tells its account what has been read.
type watchedStream struct {
	network.MuxedStream
	pieces *streamPieces
	small  int // reads of at most smallRead bytes so far; only one goroutine reads

	identifies atomic.Bool  // the stream carries an identify message
	parts      atomic.Int64 // what has been read of that takes so much, in bytes
	ended      atomic.Bool  // nothing more is read
}

// identifying has what the relay writes before it reads an identify message: when it accepts
// a push, and when it asks for one itself.
// https://github.com/multiformats/multistream-select
var identifying = []string{
	fmt.Sprintf("%c%s\n", len(identify.IDPush)+1, identify.IDPush),
	fmt.Sprintf("\x13/multistream/1.0.0\n%c%s\n", len(identify.ID)+1, identify.ID),
}

var errIdentifyTooLong = fmt.Errorf("identify message is above %d bytes", maxIdentify)

// Write notices that the stream carries an identify message. At this level, only the
// messages that choose the protocol tell.
func (s *watchedStream) Write(p []byte) (int, error) {
	if len(p) <= smallRead && slices.Contains(identifying, string(p)) {
		s.identifies.Store(true)
	}
	return s.MuxedStream.Write(p)
}

// Read waits if the stream is read in many small parts and the client's network has spent
// its budget. Each proposal of a protocol that the relay does not speak takes two such reads,
// and a ping takes one. Without this, 64 connections with nothing else took a core, and other
// clients' requests took 100 ms, 1.1 s at worst.
func (s *watchedStream) Read(p []byte) (int, error) {
	if len(p) <= smallRead {
		if s.small++; s.small%readsPerRequest == 0 {
			s.pieces.conn.wait(1)
		}
	}
	n, err := s.MuxedStream.Read(p)
	if n > 0 {
		s.pieces.read.Add(int64(n))
		s.pieces.settle()
		if s.identifies.Load() {
			if err := s.pieces.conn.take(n * identifyPart); err != nil {
				return 0, err
			}
			all := s.parts.Add(int64(n) * identifyPart)
			if s.ended.Load() {
				s.over()
			}
			if all > maxIdentify*identifyPart {
				return 0, errIdentifyTooLong
			}
		}
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		s.over()
	}
	return n, err
}

func (s *watchedStream) over() {
	s.ended.Store(true)
	if parts := s.parts.Swap(0); parts > 0 {
		s.pieces.conn.let(int(parts))
	}
	s.pieces.end(func(p *streamPieces) { p.over = true })
}

func (s *watchedStream) Close() error {
	err := s.MuxedStream.Close()
	s.over()
	return err
}

func (s *watchedStream) CloseRead() error {
	err := s.MuxedStream.CloseRead()
	s.over()
	return err
}

func (s *watchedStream) Reset() error {
	err := s.MuxedStream.Reset()
	s.over()
	return err
}

func (s *watchedStream) ResetWithError(code network.StreamErrorCode) error {
	err := s.MuxedStream.ResetWithError(code)
	s.over()
	return err
}
