package main

// Circuits: traffic that the relay carries between two clients by Circuit Relay v2.
// go-libp2p's relay service makes them and copies. What is here admits and counts
// them (circuits), keeps anyone from taking all circuits of a device (hopHost), and
// paces what they carry (pacedHost, for --max-bandwidth).

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	circuit "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
)

// circuits admits and counts circuits, and refuses new ones once draining. It is
// the relay service's access control, and its metrics tracer: only as such can it
// see when a circuit ends.
type circuits struct {
	log     *slog.Logger
	tally   *tally
	most    int           // open at once
	reserve func(peer.ID) // is called with each peer that asks for a reservation

	// free reports whether an address is exempt from circuitsPerNetwork.
	free func(netip.Addr) bool

	mu          sync.Mutex
	parts       map[circuitPart]int // how many circuits there are, or are asked for, of each
	established int
	open        int // includes those that the destination has not accepted yet
	draining    bool
	drained     chan struct{} // closed when draining and none are open
}

func newCircuits(lim limits, log *slog.Logger, t *tally, reserve func(peer.ID)) *circuits {
	return &circuits{
		log: log, tally: t, most: lim.circuits(), reserve: reserve, free: lim.free,
		parts: make(map[circuitPart]int), drained: make(chan struct{}),
	}
}

// serve starts the relay service on h, where cfg limits each circuit, and bandwidth,
// unless it is nil, all of them together. Close the service before h.
func (c *circuits) serve(h host.Host, lim limits, cfg config, bandwidth *rate.Limiter) (*circuit.Relay, error) {
	h = hopHost{h, c}
	if bandwidth != nil {
		h = newPacedHost(h, bandwidth)
	}
	return circuit.New(h,
		circuit.WithResources(lim.circuitResources(cfg.circuitDuration, cfg.circuitBytes)),
		// All addresses that the host advertises: a rust client refuses a
		// reservation without one, and the default filter leaves none on a LAN
		// or behind a 1:1 NAT.
		circuit.WithReservationAddressFilter(func(ma.Multiaddr) bool { return true }),
		circuit.WithACL(c),
		circuit.WithMetricsTracer(c),
	)
}

// counts returns how many circuits were established since the start, and how many
// are open.
func (c *circuits) counts() (established, open int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.established, c.open
}

// drain refuses new reservations and circuits and waits until the open circuits
// have ended, or ctx is done. It returns how many are left.
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

func (c *circuits) AllowReserve(id peer.ID, _ ma.Multiaddr) bool {
	c.mu.Lock()
	draining := c.draining
	c.mu.Unlock()
	if draining {
		c.tally.refuse(refusedStopping)
		return false
	}
	c.reserve(id)
	return true
}

// AllowConnect comes just before ConnectionOpened, but not in one step with it:
// requests that come at the same moment may together open a few circuits more than
// c.most. Their buffers come out of the shared memory, so they cost no more of it.
func (c *circuits) AllowConnect(peer.ID, ma.Multiaddr, peer.ID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.draining:
		c.tally.refuse(refusedStopping)
	case c.open >= c.most:
		c.tally.refuse(refusedCircuit)
	default:
		return true
	}
	return false
}

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

// ConnectionRequestHandled comes once both ends are joined, or that has failed.
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
func (c *circuits) BytesTransferred(n int)  { c.tally.relayedBytes.Add(int64(n)) }
func (*circuits) RelayStatus(bool)          {}

// circuitPart is what circuits can have in common: the device that opened them, the
// device to which they are open, both, or the second and the network of the first.
type circuitPart struct {
	from, to peer.ID
	network  netip.Prefix
}

// begin counts a circuit, unless one of its parts has as many as it may. Call end
// when the circuit is over.
//
// The relay service has one count for each device, of circuits in both directions. With
// it alone, strangers could take all circuits of a device, and the device could open
// none itself.
func (c *circuits) begin(parts [4]circuitPart) bool {
	most := [4]int{circuitsPerPeer, circuitsPerPeer, circuitsPerPair, circuitsPerNetwork}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, p := range parts {
		if c.parts[p] >= most[i] && p != (circuitPart{}) {
			return false
		}
	}
	for _, p := range parts {
		c.parts[p]++
	}
	return true
}

func (c *circuits) end(parts [4]circuitPart) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range parts {
		if c.parts[p]--; c.parts[p] == 0 {
			delete(c.parts, p)
		}
	}
}

// partsOf returns the parts that begin wants, of a circuit from conn's peer to another.
func (c *circuits) partsOf(conn network.Conn, to peer.ID) [4]circuitPart {
	from := conn.RemotePeer()
	parts := [4]circuitPart{{from: from}, {to: to}, {from: from, to: to}}
	if ip := ipOf(conn.RemoteMultiaddr()); !c.free(ip) {
		parts[3] = circuitPart{to: to, network: networkOf(ip)}
	}
	return parts
}

// hopHost is the host that the relay service is given. The service tells nobody which
// circuit has ended. So hopHost reads each request before the service does, and knows
// that a circuit is over when the stream on which it was asked for is.
type hopHost struct {
	host.Host
	circuits *circuits
}

func (h hopHost) SetStreamHandler(id protocol.ID, handle network.StreamHandler) {
	h.Host.SetStreamHandler(id, func(s network.Stream) {
		s.SetReadDeadline(time.Now().Add(circuit.StreamTimeout)) // the service sets it again
		read, to, err := readHopRequest(s)
		if err != nil && !errors.Is(err, io.EOF) {
			s.Reset() // the client is gone, or has said nothing for long enough
			return
		}
		hop := &hopStream{Stream: s, unread: read, over: func() {}}
		if to != "" {
			parts := h.circuits.partsOf(s.Conn(), to)
			if !h.circuits.begin(parts) {
				h.circuits.refuse(s)
				return
			}
			hop.over = sync.OnceFunc(func() { h.circuits.end(parts) })
		}
		handle(hop)
	})
}

// refuse answers that there are too many circuits, as the service does.
func (c *circuits) refuse(s network.Stream) {
	c.tally.circuitRequest(requestConnect, circuitpb.Status_RESOURCE_LIMIT_EXCEEDED)
	s.SetWriteDeadline(time.Now().Add(circuit.StreamTimeout))
	_, err := protodelim.MarshalTo(s, &circuitpb.HopMessage{
		Type:   circuitpb.HopMessage_STATUS.Enum(),
		Status: circuitpb.Status_RESOURCE_LIMIT_EXCEEDED.Enum(),
	})
	if err != nil {
		s.Reset()
		return
	}
	s.Close()
}

// readHopRequest reads one message of the circuit protocol, a varint length and that
// many bytes. It returns what it has read, even of a broken one, and the device to
// which a circuit is asked for, or "" if it is another request. It returns an error,
// which is io.EOF where the stream has ended, only of reading.
func readHopRequest(s io.Reader) (read []byte, to peer.ID, err error) {
	length, n := uint64(0), 0
	for n == 0 && len(read) < binary.MaxVarintLen16 {
		var one [1]byte
		if _, err := io.ReadFull(s, one[:]); err != nil {
			return read, "", err
		}
		read = append(read, one[0])
		length, n = binary.Uvarint(read)
	}
	if n <= 0 || length > maxCircuitMessage {
		return read, "", nil // the service refuses it by the length
	}
	read = append(read, make([]byte, length)...)
	got, err := io.ReadFull(s, read[n:])
	if err != nil {
		if err == io.ErrUnexpectedEOF {
			err = io.EOF
		}
		return read[:n+got], "", err
	}
	msg := new(circuitpb.HopMessage)
	if proto.Unmarshal(read[n:], msg) != nil || msg.GetType() != circuitpb.HopMessage_CONNECT {
		return read, "", nil
	}
	to, _ = peer.IDFromBytes(msg.GetPeer().GetId()) // "" if it is none
	return read, to, nil
}

// hopStream is a stream on which the relay service gets a request that has been read.
type hopStream struct {
	network.Stream
	unread []byte
	over   func() // may be called again
}

func (s *hopStream) Read(p []byte) (int, error) {
	if len(s.unread) == 0 {
		return s.Stream.Read(p)
	}
	n := copy(p, s.unread)
	s.unread = s.unread[n:]
	if len(s.unread) == 0 {
		s.unread = nil // a circuit may live for hours
	}
	return n, nil
}

// The service ends a stream by one of these when its circuit is over, or has failed.

func (s *hopStream) Close() error {
	s.over()
	return s.Stream.Close()
}

func (s *hopStream) Reset() error {
	s.over()
	return s.Stream.Reset()
}

func (s *hopStream) ResetWithError(code network.StreamErrorCode) error {
	s.over()
	return s.Stream.ResetWithError(code)
}

const (
	// maxCircuitMessage is the longest message of the circuit protocol, in bytes, in
	// go-libp2p. A read into more room than that is a read of payload.
	maxCircuitMessage = 4096

	// turnTime is about how long a round takes in which each waiting circuit gets
	// its turn: long enough that waking up costs little compared with the turn.
	turnTime = 400 * time.Millisecond

	// minTurn and maxTurn bound what a circuit carries between two waits, in bytes.
	// Larger turns cost less CPU. Measured at 5 MiB/s by 8 circuits: 38 s per GiB
	// with 16 KiB, 13 s with 256 KiB; the same traffic, paced by its senders in
	// messages of 16 KiB, costs 14 s.
	minTurn = 1 << 10
	maxTurn = 256 << 10
)

// pacedHost is the host that the relay service is given under --max-bandwidth. It
// caps what all circuits carry together, and leaves the protocol's own messages
// alone. The service copies by itself, so its streams are paced underneath it.
//
// Each circuit carries one turn at a time, and rate.Limiter serves the waiting ones
// in the order in which they came. So all that have something to carry get the same
// share.
type pacedHost struct {
	host.Host
	bandwidth *rate.Limiter
	waiting   *atomic.Int64 // circuits
}

// newBandwidth limits what is carried to so many bytes per second.
func newBandwidth(bytes int64) *rate.Limiter {
	// A busy machine oversleeps. It may catch up with a tenth of a second.
	return rate.NewLimiter(rate.Limit(bytes), int(min(max(bytes/10, circuitBuffer), 1<<30)))
}

// newPacedHost shares bandwidth among all circuits.
func newPacedHost(h host.Host, bandwidth *rate.Limiter) pacedHost {
	return pacedHost{h, bandwidth, new(atomic.Int64)}
}

// turn returns how many bytes a circuit carries before it waits for the others.
func (h pacedHost) turn() int {
	round := int64(float64(h.bandwidth.Limit()) * turnTime.Seconds())
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
	carried  int      // bytes since it waited; the relay reads in one goroutine
	deadline deadline // for reads
}

// Read waits after it has read, so that QUIC's flow control holds up the sender. It
// waits no longer than the stream's deadline allows.
func (s *pacedStream) Read(p []byte) (int, error) {
	if len(p) <= maxCircuitMessage {
		return s.Stream.Read(p)
	}
	turn := s.host.turn()
	n, err := s.Stream.Read(p[:min(len(p), turn)])
	// Bytes are charged at once. A circuit that has carried less than its turn, such
	// as a short message, need not wait, unless there are so many of those that the
	// cap would not hold.
	wait := s.host.bandwidth.ReserveN(time.Now(), n).Delay()
	if s.carried += n; s.carried < turn && wait < 2*turnTime {
		return n, err
	}
	s.carried = 0
	if !s.sleep(wait) {
		return 0, os.ErrDeadlineExceeded
	}
	return n, err
}

// sleep waits, and reports whether the stream's deadline was far enough away.
func (s *pacedStream) sleep(wait time.Duration) bool {
	s.host.waiting.Add(1)
	defer s.host.waiting.Add(-1)
	if left, ok := s.deadline.left(); ok && left < wait {
		time.Sleep(left)
		return false
	}
	time.Sleep(wait)
	return true
}

func (s *pacedStream) SetDeadline(t time.Time) error {
	s.deadline.set(t)
	return s.Stream.SetDeadline(t)
}

func (s *pacedStream) SetReadDeadline(t time.Time) error {
	s.deadline.set(t)
	return s.Stream.SetReadDeadline(t)
}
