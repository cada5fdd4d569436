package main

// Pieces: what clients make quic-go keep in small pieces.
//
// quic-go keeps each STREAM and CRYPTO frame that it has received, in a map, until the
// application has read what comes before. Flow control counts the bytes in a frame, and
// not what it costs to keep: 32 KiB in frames of one byte take 6.8 MiB. So each incoming
// connection has an account here. A tracer adds up what the frames cost, and a stream
// around libp2p's takes off what has been read. What the QUIC windows do not account for
// is booked in the memory that all share. When that has no room left, the connection
// that has booked most is closed.
//
// The tracer also sees what honest clients never do: packets of hundreds of frames, of
// which each may take quic-go as long as a packet, and packets after packets without any
// acknowledgement, so that quic-go has to keep all that it has sent.
//
// Nothing here asks how quic-go works but what a frame costs: see pieceCost.

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/transport"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/qlog"
	"github.com/quic-go/quic-go/qlogwriter"
	"golang.org/x/time/rate"
)

const (
	// smallPiece and largePiece are what a frame costs beside the window, in bytes,
	// with less than pooledFrame bytes of data and with more. From wholeFrame on the
	// window accounts for enough. TestPieceCosts measures them: 175 for a byte, 280 for
	// 127 bytes, 1752 for 128.
	smallPiece  = 288
	largePiece  = 1800
	pooledFrame = 128 // MinStreamFrameBufferSize in quic-go's params.go
	wholeFrame  = 896

	// pieceStep is how much is booked or given back at a time, in bytes.
	pieceStep = 16 << 10

	// maxPieces is the most that is booked for one connection's pieces, in bytes.
	maxPieces = 3 << 19

	// usualFrames is how many frames a packet may have that costs no budget. Beyond it, a
	// connection may have a fifth of framesPerSecond; and sharedFrames in a burst when its
	// network has none left. Attacks need 100 to 1 000 frames in each packet.
	usualFrames  = 8
	sharedFrames = 64

	// ackTimeout is for how long a client may go on sending without acknowledging
	// anything. The clients' own connections end after 10 s.
	ackTimeout = 20 * time.Second

	// owedPerAck is how many frames that quic-go keeps are taken for acknowledged when
	// the client acknowledges something. While many are kept, a packet has hundreds.
	owedPerAck = 32
)

// errTooManyPieces is the error by which a connection is closed: EXCESSIVE_LOAD in HTTP/3
// has no counterpart in libp2p, whose code for a limit is this.
const errTooManyPieces = quic.ApplicationErrorCode(network.ConnResourceLimitExceeded)

// pieceCost returns what a frame with so many bytes of data costs beside the window, in
// bytes.
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

// pieces are the accounts of all incoming connections. nil keeps none.
type pieces struct {
	tally   *tally
	budgets *budgets

	mu      sync.Mutex
	booked  map[*connPieces]struct{} // those that have booked something
	closing *connPieces              // is being closed to make room; nil: none
}

func newPieces(b *budgets, t *tally) *pieces {
	return &pieces{tally: t, budgets: b, booked: make(map[*connPieces]struct{})}
}

// begin makes the account of a connection that begins, and ends with ctx. It is the
// connection's scope in the resource manager from now on. The context that begin returns
// has it, and is for quic-go. On nil it does nothing.
func (p *pieces) begin(ctx context.Context, scope network.ConnManagementScope, from net.Addr) (context.Context, network.ConnManagementScope) {
	if p == nil {
		return ctx, scope
	}
	c := &connPieces{
		ConnManagementScope: scope,
		all:                 p,
		budget:              p.budgets.of(addrPortOf(from).Addr()),
		streams:             make(map[quic.StreamID]*streamPieces),
		free:                initialWindow,
		frames:              rate.NewLimiter(framesPerSecond/5, framesPerSecond),
	}
	context.AfterFunc(ctx, c.end)
	return context.WithValue(ctx, accountKey{}, c), c
}

type accountKey struct{}

// trace is quic.Config's Tracer. It traces connections whose context has an account.
func (p *pieces) trace(ctx context.Context, _ bool, _ quic.ConnectionID) qlogwriter.Trace {
	if c, ok := ctx.Value(accountKey{}).(*connPieces); ok {
		return c
	}
	return nil
}

// connPieces is one connection's account, the trace that fills it, and the scope that it
// is booked in.
type connPieces struct {
	network.ConnManagementScope
	all    *pieces
	budget *budget // nil: none

	// last is where the last frame ended, and of which stream: what comes next in
	// order needs no look at the map. Only quic-go's goroutine uses it.
	last *streamPieces

	// These are for the same goroutine. sent and acked are the numbers of the last packet
	// that the client has to acknowledge, and that it has; stalled is since when it does
	// not, or zero; owed is how many frames quic-go keeps for it to acknowledge; frames
	// limits frames beyond usualFrames.
	sent, acked int64
	stalled     time.Time
	owed        int
	frames      *rate.Limiter

	held atomic.Int64 // what all pieces cost now, in bytes

	gone bool // has ended; under all.mu

	mu       sync.Mutex
	conn     *quic.Conn // nil before libp2p has accepted it
	free     int        // bytes of pieces that the windows account for
	booked   int        // bytes beyond
	doomed   bool       // is to be closed
	ended    bool       // or is being closed
	streams  map[quic.StreamID]*streamPieces
	accepted quic.StreamID // the next stream that libp2p accepts
}

// ReserveMemory is called by libp2p for windows that grow.
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

// RecordEvent is called by quic-go's goroutine for the connection when it has handled a
// packet, or is about to send one.
func (c *connPieces) RecordEvent(e qlogwriter.Event) {
	switch packet := e.(type) {
	case qlog.PacketReceived:
		progress := false
		for _, f := range packet.Frames {
			switch f := f.Frame.(type) {
			case *qlog.StreamFrame:
				if f.Length < wholeFrame || f.Fin {
					c.add(f)
				}
			case *qlog.AckFrame:
				if largest := int64(f.LargestAcked()); packet.Header.PacketType == qlog.PacketType1RTT && largest > c.acked {
					c.acked, progress = largest, true
				}
			case *qlog.CryptoFrame:
				// quic-go reads these itself, and keeps what comes out of order for as
				// long as the connection lasts. A handshake has fewer than ten.
				if f.Length > 0 {
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
		c.heard(progress)
		if extra := len(packet.Frames) - usualFrames; extra > 0 {
			c.spend(extra)
		}
	case qlog.PacketSent:
		// A packet of nothing but an acknowledgement is not acknowledged itself.
		if packet.Header.PacketType != qlog.PacketType1RTT {
			return
		}
		for _, f := range packet.Frames {
			if _, ack := f.Frame.(*qlog.AckFrame); !ack {
				c.sent = int64(packet.Header.PacketNumber)
				return
			}
		}
	}
}

// owe counts a frame that makes quic-go answer with one, which it keeps until the client
// has acknowledged it.
func (c *connPieces) owe() {
	c.owed++
	c.hold(smallPiece)
}

// heard is called with each packet, which has acknowledged something new or not. A client
// that goes on sending but acknowledges nothing is closed.
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

// spend takes frames beyond usualFrames from the budgets, and closes the connection if it
// sends so many that its network has none left, or many more than any client.
func (c *connPieces) spend(extra int) {
	own := c.frames.ReserveN(time.Now(), min(extra, framesPerSecond)).Delay() > 0
	all := c.budget != nil && c.budget.spend(c.budget.frames, extra) > 0
	if own || all && c.frames.Tokens() < framesPerSecond-sharedFrames {
		c.close(refusedBudget)
	}
}

func (*connPieces) Close() error { return nil }

// end forgets the connection, when it has ended. The scope has given back all by then,
// or is about to.
func (c *connPieces) end() {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	c.all.mu.Lock()
	c.gone = true
	delete(c.all.booked, c)
	if c.all.closing == c {
		c.all.closing = nil
	}
	c.all.mu.Unlock()
	c.budget.release()
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
		// A client's stream, which libp2p will accept.
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
		s.settle() // it may have been read already
	}
	if f.Fin {
		s.end(func(s *streamPieces) { s.final = true })
	}
}

// hold adds to what the connection's pieces cost, and books what the windows do not
// account for.
func (c *connPieces) hold(cost int) {
	held := int(c.held.Add(int64(cost)))
	if held <= initialWindow {
		return
	}
	c.mu.Lock()
	over := held - c.free - c.booked
	if over <= 0 || c.ended || c.doomed {
		c.mu.Unlock()
		return
	}
	n := (over + pieceStep - 1) / pieceStep * pieceStep
	priority := network.ReservationPriorityMedium // as windows
	if c.booked == 0 {
		priority = network.ReservationPriorityHigh // a little is more urgent than much
	}
	if c.booked+n > maxPieces {
		c.mu.Unlock()
		c.close(refusedMemory)
		return
	}
	c.mu.Unlock()
	// Only this goroutine books. Releasing meanwhile leaves too much booked, which the
	// next release puts right.
	if err := c.ConnManagementScope.ReserveMemory(n, priority); err != nil {
		if errors.Is(err, network.ErrResourceLimitExceeded) {
			c.all.makeRoom(c)
		}
		return
	}
	c.mu.Lock()
	c.booked += n
	c.mu.Unlock()
	c.all.mu.Lock()
	if !c.gone { // nobody would take it out
		c.all.booked[c] = struct{}{}
	}
	c.all.mu.Unlock()
}

// let takes from what the connection's pieces cost what has been read, and gives back
// what need not be booked any more.
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

// makeRoom closes the connection that has booked most, which may be asking. While one is
// being closed it closes no other, and who asks gets by.
func (p *pieces) makeRoom(asking *connPieces) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closing != nil {
		return
	}
	most, greediest := 0, asking
	for c := range p.booked {
		c.mu.Lock()
		if c.booked > most {
			most, greediest = c.booked, c
		}
		c.mu.Unlock()
	}
	p.closing = greediest
	greediest.close(refusedMemory)
}

// close closes the connection for a reason, as soon as libp2p has accepted it.
func (c *connPieces) close(why refusal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.doomed {
		c.all.tally.refuse(why)
	}
	c.doomed = true
	if c.conn != nil && !c.ended {
		c.ended = true
		go c.conn.CloseWithError(errTooManyPieces, "too many pieces") // which waits for this goroutine
	}
}

// streamPieces is one stream's account.
type streamPieces struct {
	conn *connPieces
	id   quic.StreamID

	read atomic.Int64 // bytes that the application has read
	cost atomic.Int64 // of both generations

	// A piece is let go when all up to the end of its generation has been read. Pieces
	// that come go into the young one, which becomes the old one then. So nothing is
	// let go too soon, and little too late.
	mu         sync.Mutex
	old, young generation
	final      bool // the client sends no more
	over       bool // the application reads no more
}

type generation struct {
	end  int64 // highest offset of a piece
	cost int
}

// add counts a piece that ends at that offset, and reports whether quic-go keeps it.
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

// settle lets go what has been read.
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

// end notes by note that one side is done with the stream. When both are, quic-go
// forgets it.
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

// watchedTransport is libp2p's QUIC transport, whose incoming connections tell their
// accounts what is read.
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
	return watchedConn{c, pieces, conn.Context()}, nil
}

// piecesOf returns the account of a connection of libp2p's, or nil if it has none.
func piecesOf(c interface{ As(any) bool }) *connPieces {
	var conn *quic.Conn
	if !c.As(&conn) {
		return nil
	}
	pieces, _ := conn.QlogTrace().(*connPieces)
	return pieces
}

type watchedConn struct {
	transport.CapableConn
	pieces *connPieces
	ctx    context.Context // done when the connection is closed
}

// AcceptStream waits while the client's network has opened more streams than it may. The
// client meanwhile has as many open as it can.
func (c watchedConn) AcceptStream() (network.MuxedStream, error) {
	s, err := c.CapableConn.AcceptStream()
	if err != nil {
		return nil, err
	}
	c.pieces.wait(c.ctx)
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
	return &watchedStream{s, account}
}

// wait waits until the client's network may make another request, or ctx is done.
func (c *connPieces) wait(ctx context.Context) {
	if c == nil || c.budget == nil {
		return
	}
	pace, wait := c.budget.spend(c.budget.pace, 1), c.budget.spend(c.budget.requests, 1)
	if wait > 0 {
		c.all.tally.refuse(refusedBudget)
	}
	if wait = max(wait, pace); wait <= 0 {
		return
	}
	select {
	case <-time.After(wait):
	case <-ctx.Done():
	}
}

// watchedStream tells its account what is read.
type watchedStream struct {
	network.MuxedStream
	pieces *streamPieces
}

func (s *watchedStream) Read(p []byte) (int, error) {
	n, err := s.MuxedStream.Read(p)
	if n > 0 {
		s.pieces.read.Add(int64(n))
		s.pieces.settle()
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		s.over()
	}
	return n, err
}

func (s *watchedStream) over() { s.pieces.end(func(p *streamPieces) { p.over = true }) }

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
