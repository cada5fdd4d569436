package main

// The throw-away clients of `check`: libp2p hosts with keys that are never stored.
// They speak QUIC, identify and the client side of the circuit relay, listen on
// no socket, and dial only what they are told to.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/core/transport"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	circuitclient "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/multiformats/go-multistream"
	"github.com/quic-go/quic-go"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
)

const (
	// What each kind of step may take at most. checkDialTime is go-libp2p's own
	// timeout of a QUIC handshake.
	checkAskTime     = 3 * time.Second
	checkDialTime    = 5 * time.Second
	checkCircuitTime = 12 * time.Second

	// checkProtocol is what the throw-away clients say they speak, and their
	// protocol on the circuit: whatever comes is sent back.
	checkProtocol = "/privstack/check/1.0.0"

	// maxCheckMessage bounds one message of the relay's, in bytes: several times
	// what identify (8 KiB) and the DHT (16 KiB) of an honest one need.
	maxCheckMessage = 64 << 10

	// checkRoundTrips are made where latency is measured; the shortest counts.
	checkRoundTrips = 5

	// checkEchoBytes go through the circuit and back.
	checkEchoBytes = 1 << 20
)

// checkHost is one throw-away client. Make it with newCheckHost, end it with Close.
type checkHost struct {
	host.Host
	sockets *quicreuse.ConnManager
	direct  transport.Transport // QUIC over these sockets
	dials   *namedDials
}

// newCheckHost puts the host together from its parts: libp2p.New would link
// every transport that libp2p has.
func newCheckHost() (*checkHost, error) {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, err
	}
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, err
	}
	store, err := pstoremem.NewPeerstore()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(store.AddPrivKey(id, key), store.AddPubKey(id, key.GetPublic())); err != nil {
		return nil, err
	}
	// It listens on nothing, so nobody will see a token or a reset of these keys.
	sockets, err := quicreuse.NewConnManager(quic.StatelessResetKey{}, quic.TokenGeneratorKey{})
	if err != nil {
		return nil, err
	}
	h := &checkHost{sockets: sockets, dials: new(namedDials)}
	if h.direct, err = libp2pquic.NewTransport(key, sockets, nil, nil, nil); err != nil {
		return nil, err
	}
	bus := eventbus.NewBus()
	sw, err := swarm.NewSwarm(id, store, bus, swarm.WithConnectionGater(h.dials))
	if err != nil {
		return nil, err
	}
	if err := sw.AddTransport(h.direct); err != nil {
		return nil, err
	}
	basic, err := basichost.NewHost(sw, &basichost.HostOpts{
		EventBus:        bus,
		ProtocolVersion: checkProtocol,
		UserAgent:       "privstack-relay-check/" + buildVersion(),
	})
	if err != nil {
		return nil, err
	}
	basic.Start()
	h.Host = basic
	return h, h.speakCircuits(key)
}

// speakCircuits lets h open and accept circuits, and send back what comes over
// checkProtocol.
func (h *checkHost) speakCircuits(key crypto.PrivKey) error {
	// On the circuit both ends are ours: TLS, which QUIC has brought along.
	muxers := []upgrader.StreamMuxer{{ID: yamux.ID, Muxer: yamux.DefaultTransport}}
	security, err := libp2ptls.New(libp2ptls.ID, key, muxers)
	if err != nil {
		return err
	}
	upgrade, err := upgrader.New([]sec.SecureTransport{security}, muxers, nil, nil, h.dials)
	if err != nil {
		return err
	}
	h.SetStreamHandler(checkProtocol, func(s network.Stream) {
		defer s.Close()
		io.Copy(s, io.LimitReader(s, 2*checkEchoBytes))
	})
	return circuitclient.AddTransport(h, upgrade)
}

// Close ends the network first: a host waits for what it is telling its peers, and
// one that does not read would hold up the end by seconds.
func (h *checkHost) Close() error {
	return errors.Join(h.Network().Close(), h.Host.Close(), h.sockets.Close())
}

// namedDials is a connection gater that lets a host dial the addresses that were
// named to it. What a relay lists in identify or says in an answer is never
// dialled because of that. The zero value lets nothing through.
type namedDials struct {
	mu    sync.Mutex
	addrs []ma.Multiaddr
}

func (d *namedDials) name(a ma.Multiaddr) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.addrs = append(d.addrs, a)
}

func (d *namedDials) InterceptAddrDial(_ peer.ID, a ma.Multiaddr) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.ContainsFunc(d.addrs, a.Equal)
}

func (*namedDials) InterceptPeerDial(peer.ID) bool              { return true }
func (*namedDials) InterceptAccept(network.ConnMultiaddrs) bool { return true }
func (*namedDials) InterceptSecured(network.Direction, peer.ID, network.ConnMultiaddrs) bool {
	return true
}
func (*namedDials) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }

// dial connects to id at addr alone.
func (h *checkHost) dial(ctx context.Context, id peer.ID, addr ma.Multiaddr) error {
	h.dials.name(addr)
	h.Peerstore().AddAddr(id, addr, peerstore.TempAddrTTL)
	_, err := h.Network().DialPeer(network.WithAllowLimitedConn(ctx, "check"), id)
	return err
}

// probe is what one address answered.
type probe struct {
	addr ma.Multiaddr

	// err is why there was no handshake. The rest is set if there was one.
	err  error
	took time.Duration // also of the attempt that failed
	id   peer.ID       // whose key it has

	// identity is what identify said; nil if identifyErr.
	identity     *identifypb.Identify
	identifyErr  error
	identifyTook time.Duration
}

// probe dials addr, for one identify, and hangs up. An empty id takes whoever
// answers. asAnother dials with a new identity: a relay bounds the connections of
// one, and counts each as a peer served.
func (h *checkHost) probe(ctx context.Context, addr ma.Multiaddr, id peer.ID, asAnother bool) probe {
	p := probe{addr: addr}
	direct := h.direct
	if asAnother {
		var key crypto.PrivKey
		if key, _, p.err = crypto.GenerateEd25519Key(rand.Reader); p.err != nil {
			return p
		}
		if direct, p.err = libp2pquic.NewTransport(key, h.sockets, nil, nil, nil); p.err != nil {
			return p
		}
	}
	begun := time.Now()
	conn, err := direct.Dial(ctx, addr, id)
	p.took = time.Since(begun)
	if err != nil {
		p.err = err
		return p
	}
	defer conn.Close()
	if p.id, p.err = peer.IDFromPublicKey(conn.RemotePublicKey()); p.err != nil {
		return p
	}
	begun = time.Now()
	p.identity, p.identifyErr = readIdentify(ctx, conn)
	p.identifyTook = time.Since(begun)
	return p
}

// seenAs is the IP address and port under which the relay saw the probe.
func (p probe) seenAs() (netip.AddrPort, error) {
	if p.identity == nil {
		return netip.AddrPort{}, errors.New("identify gave no answer")
	}
	addr, err := ma.NewMultiaddrBytes(p.identity.GetObservedAddr())
	if err != nil {
		return netip.AddrPort{}, err
	}
	udp, _, err := quicreuse.FromQuicMultiaddr(addr)
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(udp.AddrPort().Addr().Unmap(), udp.AddrPort().Port()), nil
}

// readIdentify asks the peer at the other end of conn who it is and under which
// address it sees us. https://github.com/libp2p/specs/tree/master/identify
func readIdentify(ctx context.Context, conn network.MuxedConn) (*identifypb.Identify, error) {
	s, err := conn.OpenStream(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Reset()
	if deadline, ok := ctx.Deadline(); ok {
		s.SetDeadline(deadline)
	}
	if err := multistream.SelectProtoOrFail[protocol.ID](identify.ID, s); err != nil {
		return nil, err
	}
	// The first message has all but a signed copy of the addresses.
	msg := new(identifypb.Identify)
	return msg, readMessage(s, msg)
}

// readMessage reads one message behind its varint length.
func readMessage(r io.Reader, msg proto.Message) error {
	return protodelim.UnmarshalOptions{MaxSize: maxCheckMessage}.UnmarshalFrom(bufio.NewReader(r), msg)
}

// ask sends one DHT request to id and returns its answer.
func (h *checkHost) ask(ctx context.Context, id peer.ID, req *kadpb.Message) (*kadpb.Message, error) {
	s, err := h.open(ctx, id, kadProtocol)
	if err != nil {
		return nil, err
	}
	defer s.Reset()
	if _, err := protodelim.MarshalTo(s, req); err != nil {
		return nil, err
	}
	if err := s.CloseWrite(); err != nil {
		return nil, err
	}
	resp := new(kadpb.Message)
	return resp, readMessage(s, resp)
}

// open begins a stream that ends with ctx at the latest.
func (h *checkHost) open(ctx context.Context, id peer.ID, speaking protocol.ID) (network.Stream, error) {
	s, err := h.NewStream(network.WithAllowLimitedConn(ctx, "check"), id, speaking)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		s.SetDeadline(deadline)
	}
	return s, nil
}

// reserve takes a place at the relay, which must be connected.
func (h *checkHost) reserve(ctx context.Context, relay peer.ID) (*circuitclient.Reservation, error) {
	// The client of circuitv2 has a deadline of its own, of a minute, and none
	// of ctx's: whoever hangs is hung up on.
	stop := context.AfterFunc(ctx, func() { h.Network().ClosePeer(relay) })
	defer stop()
	return circuitclient.Reserve(ctx, h, peer.AddrInfo{ID: relay})
}

// ping is the shortest of checkRoundTrips to id.
func (h *checkHost) ping(ctx context.Context, id peer.ID) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx) // which ends the series
	defer cancel()
	var best time.Duration
	results := ping.Ping(ctx, h, id)
	for range checkRoundTrips {
		r, ok := <-results
		switch {
		case !ok:
			return 0, ctx.Err()
		case r.Error != nil:
			return 0, r.Error
		case best == 0 || r.RTT < best:
			best = r.RTT
		}
	}
	return best, nil
}

// echoed is what went there and back over a circuit.
type echoed struct {
	bytes int           // that came back as they were sent
	took  time.Duration // from the first byte sent to the last received
	rtt   time.Duration // shortest of checkRoundTrips of a single byte
}

// echo opens a stream to mate, which is a checkHost, over the circuit between
// them and has checkEchoBytes sent back.
func (h *checkHost) echo(ctx context.Context, mate peer.ID) (e echoed, err error) {
	s, err := h.open(ctx, mate, checkProtocol)
	if err != nil {
		return e, err
	}
	defer s.Reset()
	if _, err := s.Conn().RemoteMultiaddr().ValueForProtocol(ma.P_CIRCUIT); err != nil {
		return e, fmt.Errorf("connected over %v, which is no circuit", s.Conn().RemoteMultiaddr())
	}
	one := make([]byte, 1)
	for range checkRoundTrips {
		begun := time.Now()
		if _, err := s.Write(one); err != nil {
			return e, err
		}
		if _, err := io.ReadFull(s, one); err != nil {
			return e, err
		}
		if rtt := time.Since(begun); e.rtt == 0 || rtt < e.rtt {
			e.rtt = rtt
		}
	}

	sent := make([]byte, checkEchoBytes)
	rand.Read(sent)
	begun := time.Now()
	go s.Write(sent) // until the stream is reset; what fails shows in what comes back
	got := make([]byte, 16<<10)
	for e.bytes < len(sent) {
		n, err := s.Read(got)
		if !bytes.Equal(got[:n], sent[e.bytes:min(e.bytes+n, len(sent))]) {
			return e, errors.New("what came back is not what was sent")
		}
		e.bytes += n
		e.took = time.Since(begun)
		if err != nil && e.bytes < len(sent) {
			return e, err
		}
	}
	return e, nil
}

// errText is the part of a QUIC error that a reader can use.
func errText(err error) string {
	mismatch := sec.ErrPeerIDMismatch{}
	switch {
	case errors.As(err, &mismatch):
		return fmt.Sprintf("is %s, and was promised to be %s", mismatch.Actual, mismatch.Expected)
	case isTimeout(err):
		return "no answer"
	case isRefusal(err):
		return "the relay refuses the connection"
	case errors.Is(err, network.ErrReset):
		return "the stream was reset"
	}
	return err.Error()
}

func isTimeout(err error) bool {
	timeout := net.Error(nil) // which quic-go's timeouts are
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// isRefusal reports whether the relay, at a limit, hung up: before the handshake,
// or with one of libp2p's codes after it.
func isRefusal(err error) bool {
	if e := (*quic.TransportError)(nil); errors.As(err, &e) && e.ErrorCode == quic.ConnectionRefused {
		return true
	}
	e := (*quic.ApplicationError)(nil)
	return errors.As(err, &e) && (e.ErrorCode == quic.ApplicationErrorCode(network.ConnResourceLimitExceeded) || e.ErrorCode == quic.ApplicationErrorCode(network.ConnRateLimited))
}
