package main

// Circuits: counting and admitting them, --max-bandwidth, and a fair share of the
// open streams for everybody.

import (
	"context"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	ma "github.com/multiformats/go-multiaddr"
	"golang.org/x/time/rate"
)

// maxCircuitMessage is the longest message of the circuit protocol, in bytes, in
// go-libp2p. Whatever is read into more room than that is payload.
const maxCircuitMessage = 4096

// turnTime is about how long a round takes in which each circuit that waits gets
// its turn: long enough that what it takes to wake up is little beside the turn.
const turnTime = 400 * time.Millisecond

// minTurn and maxTurn bound what a circuit carries between two waits, in bytes.
// The more at a time the less CPU: at 5 MiB/s by 8 circuits 38 s per GiB with 16
// KiB and 13 with 256 KiB, where the same traffic, paced by its senders in
// messages of 16 KiB, takes 14.
const (
	minTurn = 1 << 10
	maxTurn = 256 << 10
)

// pacedHost is the host that the circuit relay is given: it paces what is read
// from the streams of circuits, and leaves the protocol's own messages alone.
//
// Each circuit carries one turn at a time, and rate.Limiter serves those who wait
// in the order in which they came: so all that have something to carry get the
// same share.
type pacedHost struct {
	host.Host
	limiter   *rate.Limiter
	bandwidth int64         // bytes per second
	waiting   *atomic.Int64 // circuits
}

// newPacedHost shares bandwidth, in bytes per second, among all circuits.
func newPacedHost(h host.Host, bandwidth int64) pacedHost {
	// What a busy machine oversleeps is caught up with: up to a tenth of a second.
	burst := int(min(max(bandwidth/10, circuitBuffer), 1<<30))
	return pacedHost{h, rate.NewLimiter(rate.Limit(bandwidth), burst), bandwidth, new(atomic.Int64)}
}

// turn is how many bytes a circuit carries before it waits for the others.
func (h pacedHost) turn() int {
	round := int64(float64(h.bandwidth) * turnTime.Seconds())
	return int(min(max(round/(h.waiting.Load()+1), minTurn), maxTurn))
}

func (h pacedHost) SetStreamHandler(id protocol.ID, handle network.StreamHandler) {
	h.Host.SetStreamHandler(id, func(s network.Stream) { handle(h.pace(s)) })
}

func (h pacedHost) NewStream(ctx context.Context, id peer.ID, protocols ...protocol.ID) (network.Stream, error) {
	s, err := h.Host.NewStream(ctx, id, protocols...)
	if err != nil {
		return nil, err
	}
	return h.pace(s), nil
}

func (h pacedHost) pace(s network.Stream) network.Stream {
	return &pacedStream{Stream: s, host: h}
}

type pacedStream struct {
	network.Stream
	host     pacedHost
	carried  int          // bytes since it waited; the relay reads in one goroutine
	deadline atomic.Int64 // for reads, in Unix nanoseconds; 0: none
}

// Read waits after it has read, so that the other end is held up by QUIC's flow
// control, and not longer than the stream's deadline allows.
func (s *pacedStream) Read(p []byte) (int, error) {
	if len(p) <= maxCircuitMessage {
		return s.Stream.Read(p)
	}
	turn := s.host.turn()
	n, err := s.Stream.Read(p[:min(len(p), turn)])
	// All is counted at once. Who carries less than a turn, such as a short message,
	// need not wait, unless there are so many of those that the cap would not hold.
	wait := s.host.limiter.ReserveN(time.Now(), n).Delay()
	if s.carried += n; s.carried < turn && wait < 2*turnTime {
		return n, err
	}
	s.carried = 0
	if !s.sleep(wait) {
		return 0, os.ErrDeadlineExceeded
	}
	return n, err
}

// sleep reports whether the stream's deadline has let it sleep for so long.
func (s *pacedStream) sleep(wait time.Duration) bool {
	s.host.waiting.Add(1)
	defer s.host.waiting.Add(-1)
	if at := s.deadline.Load(); at != 0 {
		if left := time.Until(time.Unix(0, at)); left < wait {
			time.Sleep(left)
			return false
		}
	}
	time.Sleep(wait)
	return true
}

func (s *pacedStream) SetDeadline(t time.Time) error {
	s.keep(t)
	return s.Stream.SetDeadline(t)
}

func (s *pacedStream) SetReadDeadline(t time.Time) error {
	s.keep(t)
	return s.Stream.SetReadDeadline(t)
}

func (s *pacedStream) keep(t time.Time) {
	at := int64(0)
	if !t.IsZero() {
		at = t.UnixNano()
	}
	s.deadline.Store(at)
}

// circuits counts circuits and, once draining, refuses new ones. It is the
// circuit relay's metrics tracer, for its only view of a circuit's ends, and its
// access control.
type circuits struct {
	log     *slog.Logger
	tally   *tally
	reserve func(peer.ID) // is told who asks for a reservation

	mu          sync.Mutex
	established int
	open        int           // being opened or open
	draining    bool          //
	drained     chan struct{} // closed when draining and none are open
}

func newCircuits(log *slog.Logger, t *tally, reserve func(peer.ID)) *circuits {
	return &circuits{log: log, tally: t, reserve: reserve, drained: make(chan struct{})}
}

func (c *circuits) counts() (established, open int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.established, c.open
}

func (c *circuits) drain(ctx context.Context) (left int) {
	c.mu.Lock()
	c.draining = true
	c.closeIfDrained()
	c.mu.Unlock()
	select {
	case <-c.drained:
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open
}

func (c *circuits) closeIfDrained() {
	if c.draining && c.open == 0 {
		select {
		case <-c.drained:
		default:
			close(c.drained)
		}
	}
}

func (c *circuits) allow() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.draining
}

func (c *circuits) AllowReserve(id peer.ID, _ ma.Multiaddr) bool {
	if !c.allow() {
		return false
	}
	c.reserve(id)
	return true
}

func (c *circuits) AllowConnect(peer.ID, ma.Multiaddr, peer.ID) bool { return c.allow() }

// ConnectionOpened comes before the destination has been asked.
func (c *circuits) ConnectionOpened() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open++
}

// ConnectionClosed comes for each ConnectionOpened.
func (c *circuits) ConnectionClosed(time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open--
	c.closeIfDrained()
}

// ConnectionRequestHandled comes once both ends are joined, or it failed.
func (c *circuits) ConnectionRequestHandled(status circuitpb.Status) {
	c.tally.circuitRequest(requestConnect, status)
	if status != circuitpb.Status_OK {
		return
	}
	c.mu.Lock()
	c.established++
	n := c.established
	c.mu.Unlock()
	c.log.Debug("circuit established", "relayed_connections", n)
}

func (c *circuits) ReservationRequestHandled(status circuitpb.Status) {
	c.tally.circuitRequest(requestReserve, status)
}

func (c *circuits) ReservationAllowed(renewal bool) {
	if !renewal {
		c.tally.reservations.Add(1)
	}
}

func (c *circuits) ReservationClosed(n int) { c.tally.reservations.Add(-int64(n)) }

func (c *circuits) BytesTransferred(n int) { c.tally.relayedBytes.Add(int64(n)) }

func (*circuits) RelayStatus(bool) {}

// fairStreams is a resource manager under which nobody's open streams keep
// others from opening any: once more are open than can be beside everybody's
// share, a peer that has its share opens no more. Those of one address alone could
// hold them all.
type fairStreams struct {
	network.ResourceManager
	unshared int // see limits
}

func (f fairStreams) OpenStream(id peer.ID, dir network.Direction) (network.StreamManagementScope, error) {
	open := 0
	count := func(stat network.ScopeStat) error {
		open = stat.NumStreamsInbound + stat.NumStreamsOutbound
		return nil
	}
	f.ViewSystem(func(s network.ResourceScope) error { return count(s.Stat()) })
	if open > f.unshared {
		f.ViewPeer(id, func(s network.PeerScope) error { return count(s.Stat()) })
		if open >= streamShare {
			return nil, network.ErrResourceLimitExceeded
		}
	}
	scope, err := f.ResourceManager.OpenStream(id, dir)
	if err != nil {
		return nil, err
	}
	if err := scope.ReserveMemory(streamMemory, network.ReservationPriorityAlways); err != nil {
		scope.Done()
		return nil, err
	}
	return scope, nil
}
