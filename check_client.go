package main

// The throw-away clients of `check`: a key that is never stored and one QUIC
// connection to the relay. They speak identify, ping, the DHT and the circuit
// relay by themselves rather than through a libp2p host: a host would dial what a
// relay tells it, and a hostile relay could point it at others. These dial only
// the addresses that they are given, and listen on nothing.

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/core/transport"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/multiformats/go-multistream"
	"github.com/quic-go/quic-go"
	"google.golang.org/protobuf/encoding/protodelim"
	protobuf "google.golang.org/protobuf/proto"
)

const (
	// What each kind of step may take at most. checkDialTime is go-libp2p's own
	// timeout of a QUIC handshake.
	checkAskTime     = 3 * time.Second
	checkDialTime    = 5 * time.Second
	checkCircuitTime = 12 * time.Second

	// maxCheckMessage bounds one message of the relay's, in bytes: several times
	// what identify (8 KiB) and the DHT (16 KiB) of an honest one need.
	maxCheckMessage = 64 << 10

	// checkRoundTrips are made to measure latency; the shortest counts.
	checkRoundTrips = 5

	// checkEchoBytes go through the circuit and back.
	checkEchoBytes = 1 << 20
)

// checkClient is one throw-away client. Make it with newCheckClient, end it with
// Close.
type checkClient struct {
	id      peer.ID
	sockets *quicreuse.ConnManager
	dialer  transport.Transport // QUIC from these sockets, as id
	answers *multistream.MultistreamMuxer[protocol.ID]

	conn    transport.CapableConn // to the relay, after connect
	serving sync.WaitGroup        // the streams that the relay opens
}

func newCheckClient() (*checkClient, error) {
	key, pub, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, err
	}
	c := &checkClient{answers: multistream.NewMultistreamMuxer[protocol.ID]()}
	if c.id, err = peer.IDFromPublicKey(pub); err != nil {
		return nil, err
	}
	pubBytes, err := crypto.MarshalPublicKey(pub)
	if err != nil {
		return nil, err
	}
	// It listens on nothing, so nobody will see a token or a reset of these keys.
	if c.sockets, err = quicreuse.NewConnManager(quic.StatelessResetKey{}, quic.TokenGeneratorKey{}); err != nil {
		return nil, err
	}
	if c.dialer, err = libp2pquic.NewTransport(key, c.sockets, nil, nil, nil); err != nil {
		return nil, errors.Join(err, c.sockets.Close())
	}
	c.answers.AddHandler(identify.ID, func(_ protocol.ID, s io.ReadWriteCloser) error {
		_, err := protodelim.MarshalTo(s, &identifypb.Identify{
			PublicKey:       pubBytes,
			ProtocolVersion: new("/privstack/check/1.0.0"),
			AgentVersion:    new("privstack-relay-check/" + buildVersion()),
			Protocols:       protocol.ConvertToStrings(c.answers.Protocols()),
		})
		return err
	})
	c.answers.AddHandler(proto.ProtoIDv2Stop, func(_ protocol.ID, s io.ReadWriteCloser) error { return sendBack(s) })
	return c, nil
}

// Close hangs up and waits until no stream is served any more.
func (c *checkClient) Close() error {
	var err error
	if c.conn != nil {
		err = c.conn.Close()
	}
	c.serving.Wait()
	return errors.Join(err, c.sockets.Close())
}

// connect connects to the relay id at addr, and answers it until Close.
func (c *checkClient) connect(ctx context.Context, addr ma.Multiaddr, id peer.ID) (err error) {
	if c.conn, err = c.dialer.Dial(ctx, addr, id); err != nil {
		return err
	}
	c.serving.Go(func() {
		for {
			s, err := c.conn.AcceptStream()
			if err != nil {
				return
			}
			c.serving.Go(func() {
				defer s.Close()
				c.answers.Handle(s) // what fails shows in the steps
			})
		}
	})
	return nil
}

// sendBack takes a circuit and sends back what comes over it.
// https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#stop-protocol
func sendBack(s io.ReadWriter) error {
	if err := readMessage(s, new(circuitpb.StopMessage)); err != nil {
		return err
	}
	ok := &circuitpb.StopMessage{Type: circuitpb.StopMessage_STATUS.Enum(), Status: circuitpb.Status_OK.Enum()}
	if _, err := protodelim.MarshalTo(s, ok); err != nil {
		return err
	}
	_, err := io.Copy(s, io.LimitReader(s, 2*checkEchoBytes))
	return err
}

// openStream opens a stream that ends with ctx at the latest.
func openStream(ctx context.Context, conn network.MuxedConn, speaking protocol.ID) (network.MuxedStream, error) {
	s, err := conn.OpenStream(ctx)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { s.SetDeadline(time.Now()) })
	if err := multistream.SelectProtoOrFail(speaking, s); err != nil {
		s.Reset()
		return nil, err
	}
	return s, nil
}

// exchange sends req, unless it is nil, over a stream of its own, and reads the answer
// into resp.
func exchange(ctx context.Context, conn network.MuxedConn, speaking protocol.ID, req, resp protobuf.Message) error {
	s, err := openStream(ctx, conn, speaking)
	if err != nil {
		return err
	}
	defer s.Reset()
	if req != nil {
		protodelim.MarshalTo(s, req) // what fails shows when we read: it may have answered unasked
	}
	return readMessage(s, resp)
}

// readMessage reads one message behind its varint length. It may read beyond it: in
// every protocol here, the other side then waits for us.
func readMessage(r io.Reader, msg protobuf.Message) error {
	return protodelim.UnmarshalOptions{MaxSize: maxCheckMessage}.UnmarshalFrom(bufio.NewReader(r), msg)
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
// answers.
func (c *checkClient) probe(ctx context.Context, addr ma.Multiaddr, id peer.ID) probe {
	p := probe{addr: addr}
	begun := time.Now()
	conn, err := c.dialer.Dial(ctx, addr, id)
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
	// The first message has all but a signed copy of the addresses.
	// https://github.com/libp2p/specs/tree/master/identify
	p.identity = new(identifypb.Identify)
	if p.identifyErr = exchange(ctx, conn, identify.ID, nil, p.identity); p.identifyErr != nil {
		p.identity = nil
	}
	p.identifyTook = time.Since(begun)
	return p
}

// probeAsAnother is probe by a client of its own. A relay bounds the connections of
// one, and counts each as a peer served.
func probeAsAnother(ctx context.Context, addr ma.Multiaddr, id peer.ID) probe {
	c, err := newCheckClient()
	if err != nil {
		return probe{addr: addr, err: err}
	}
	defer c.Close()
	return c.probe(ctx, addr, id)
}

// ask sends one DHT request to the relay and returns its answer.
func (c *checkClient) ask(ctx context.Context, req *kadpb.Message) (*kadpb.Message, error) {
	resp := new(kadpb.Message)
	if err := exchange(ctx, c.conn, kadProtocol, req, resp); err != nil {
		return nil, err
	}
	return resp, nil
}

// hopStatus is a relay's refusal of a reservation or circuit.
type hopStatus circuitpb.Status

func (s hopStatus) Error() string { return "the relay says " + circuitpb.Status(s).String() }

// hop asks the relay for a reservation or a circuit. It returns the answer and the
// stream, which is the circuit from then on and the caller's to reset.
// https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#hop-protocol
func (c *checkClient) hop(ctx context.Context, req *circuitpb.HopMessage) (*circuitpb.HopMessage, network.MuxedStream, error) {
	s, err := openStream(ctx, c.conn, proto.ProtoIDv2Hop)
	if err != nil {
		return nil, nil, err
	}
	protodelim.MarshalTo(s, req) // as in exchange
	resp := new(circuitpb.HopMessage)
	if err = readMessage(s, resp); err == nil && resp.GetStatus() != circuitpb.Status_OK {
		err = hopStatus(resp.GetStatus())
	}
	if err != nil {
		s.Reset()
		return nil, nil, err
	}
	return resp, s, nil
}

// ping measures the round trip to the relay.
func (c *checkClient) ping(ctx context.Context) (time.Duration, error) {
	s, err := openStream(ctx, c.conn, ping.ID)
	if err != nil {
		return 0, err
	}
	defer s.Reset()
	return pingOver(s)
}

// pingOver is the shortest of checkRoundTrips of a ping over s, which sends back what
// comes.
func pingOver(s io.ReadWriter) (best time.Duration, err error) {
	for range checkRoundTrips {
		begun := time.Now()
		if _, err := s.Write(make([]byte, ping.PingSize)); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(s, make([]byte, ping.PingSize)); err != nil {
			return 0, err
		}
		if rtt := time.Since(begun); best == 0 || rtt < best {
			best = rtt
		}
	}
	return best, nil
}

// echoOver sends checkEchoBytes over a circuit. It returns how many came back as they
// were sent, also if not all did, and how long they took from the first byte sent.
func echoOver(circuit io.ReadWriter) (n int, took time.Duration, err error) {
	sent := make([]byte, checkEchoBytes)
	rand.Read(sent)
	begun := time.Now()
	go circuit.Write(sent) // until the stream is reset; what fails shows in what comes back
	got := make([]byte, 16<<10)
	for n < len(sent) {
		m, err := circuit.Read(got)
		if !bytes.Equal(got[:m], sent[n:min(n+m, len(sent))]) {
			return n, 0, errors.New("what came back is not what was sent")
		}
		n += m
		if err != nil && n < len(sent) {
			return n, 0, err
		}
	}
	return n, time.Since(begun), nil
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
