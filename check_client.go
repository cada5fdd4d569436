package main

// The throw-away clients of `check`: a key that is never stored and one QUIC
// connection to the relay. They speak identify, ping, the DHT and the circuit
// relay by themselves rather than through a libp2p host: a host would dial what a
// relay tells it, and a hostile relay could point it at others. These dial one
// address, the relay's, also to reach each other, and take connections from each other
// alone.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

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
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	libp2pquic "github.com/libp2p/go-libp2p/p2p/transport/quic"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/multiformats/go-multistream"
	"github.com/quic-go/quic-go"
	"google.golang.org/protobuf/encoding/protodelim"
	protobuf "google.golang.org/protobuf/proto"
)

const (
	checkAskTime  = 3 * time.Second  // for a question and its answer
	checkDialTime = 5 * time.Second  // for a handshake, as go-libp2p has it
	checkEchoTime = 12 * time.Second // for checkEchoBytes through the relay and back

	maxCheckMessage = 64 << 10 // bytes of an answer; an honest relay sends 16 KiB at most
	checkRoundTrips = 5        // the shortest is the latency
	checkEchoBytes  = 1 << 20  // through the relay and back
)

// checkClient is one throw-away client. Make it with dialCheckClient, end it with close.
type checkClient struct {
	id      peer.ID
	relayID peer.ID // of the relay that answered
	sockets *quicreuse.ConnManager
	quic    transport.Transport // which dials and listens on one socket
	conn    transport.CapableConn
	serving sync.WaitGroup // the streams that the relay opens, and the other client's
}

// dialCheckClient makes a client and connects it to the relay at addr. An empty id
// takes whoever answers.
func dialCheckClient(ctx context.Context, addr ma.Multiaddr, id peer.ID) (*checkClient, error) {
	key, pub, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, err
	}
	certificate, err := certificateTemplate()
	if err != nil {
		return nil, err
	}
	c := new(checkClient)
	// It listens for seconds, and to one: nobody gains from a token or a reset of these keys.
	if c.sockets, err = quicreuse.NewConnManager(quic.StatelessResetKey{}, quic.TokenGeneratorKey{}); err != nil {
		return nil, err
	}
	c.quic, err = libp2pquic.NewTransport(key, c.sockets, nil, nil, nil,
		libp2pquic.WithTLSIdentityOption(libp2ptls.WithCertTemplate(certificate)))
	if err == nil {
		c.conn, err = c.quic.Dial(ctx, addr, id)
	}
	if err != nil {
		return nil, errors.Join(err, c.sockets.Close())
	}
	c.id = c.conn.LocalPeer()
	c.relayID, _ = peer.IDFromPublicKey(c.conn.RemotePublicKey()) // the handshake has read it
	c.serving.Go(func() { c.serve(pub) })
	return c, nil
}

// close hangs up and waits until no stream is served any more.
func (c *checkClient) close() {
	c.conn.Close()
	c.serving.Wait()
	c.sockets.Close()
}

// serve answers identify and takes circuits until the connection ends.
func (c *checkClient) serve(pub crypto.PubKey) {
	mux := multistream.NewMultistreamMuxer[protocol.ID]()
	mux.AddHandler(proto.ProtoIDv2Stop, func(_ protocol.ID, s io.ReadWriteCloser) error { return sendBack(s) })
	mux.AddHandler(identify.ID, func(_ protocol.ID, s io.ReadWriteCloser) error {
		key, _ := crypto.MarshalPublicKey(pub)
		_, err := protodelim.MarshalTo(s, &identifypb.Identify{
			PublicKey:       key,
			ProtocolVersion: new("/privstack/check/1.0.0"),
			AgentVersion:    new("privstack-relay-check/" + buildVersion()),
			Protocols:       protocol.ConvertToStrings(mux.Protocols()),
			// At which the relay may offer its bridge.
			ObservedAddr: c.conn.RemoteMultiaddr().Bytes(),
		})
		return err
	})
	for {
		s, err := c.conn.AcceptStream()
		if err != nil {
			return
		}
		c.serving.Go(func() {
			defer s.Close()
			mux.Handle(s) // what fails shows in the steps
		})
	}
}

// sendBack takes a circuit and sends back what comes over it.
// https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#stop-protocol
func sendBack(s io.ReadWriter) error {
	if err := readMessage(s, new(circuitpb.StopMessage)); err != nil {
		return err
	}
	ok := &circuitpb.StopMessage{Type: circuitpb.StopMessage_STATUS.Enum(), Status: circuitpb.Status_OK.Enum()}
	_, err := protodelim.MarshalTo(s, ok)
	if err == nil {
		_, err = io.Copy(s, io.LimitReader(s, 2*checkEchoBytes))
	}
	return err
}

// takeFrom takes connections from the client id, on the socket over which c is connected
// to the relay, and sends back what comes over the first stream of each. It returns at
// once, and ends with ctx.
func (c *checkClient) takeFrom(ctx context.Context, id peer.ID) error {
	listener, err := c.quic.Listen(c.conn.LocalMultiaddr())
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	c.serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			context.AfterFunc(ctx, func() { conn.Close() })
			if conn.RemotePeer() != id {
				conn.Close()
			} else if s, err := conn.AcceptStream(); err == nil {
				io.Copy(s, io.LimitReader(s, 2*checkEchoBytes)) // what fails shows in what comes back
			}
		}
	})
	return nil
}

// request opens a stream, sends req over it and reads the answer into resp; either may
// be nil. The stream is reset when ctx ends. After an error, resp holds nothing of use.
func (c *checkClient) request(ctx context.Context, speaking protocol.ID, req, resp protobuf.Message) (network.MuxedStream, error) {
	s, err := c.conn.OpenStream(ctx)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { s.Reset() })
	err = multistream.SelectProtoOrFail(speaking, s)
	if err == nil && req != nil {
		protodelim.MarshalTo(s, req) // what fails shows when we read: it may have answered unasked
	}
	if err == nil && resp != nil {
		err = readMessage(s, resp)
	}
	if err != nil {
		s.Reset()
		return nil, cmp.Or(ctx.Err(), err)
	}
	return s, nil
}

// readMessage reads one message behind its varint length. It may read beyond it: in
// every protocol here, the other side then waits for us.
func readMessage(r io.Reader, msg protobuf.Message) error {
	return protodelim.UnmarshalOptions{MaxSize: maxCheckMessage}.UnmarshalFrom(bufio.NewReader(r), msg)
}

// pingOver returns the shortest of checkRoundTrips over s, which sends back what comes.
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

// echoOver sends checkEchoBytes over s, after some pings. It returns how many came back,
// even after an error, the shortest round trip, and how many MiB went in a second.
func echoOver(s io.ReadWriter) (n int, rtt time.Duration, rate float64, err error) {
	if rtt, err = pingOver(s); err != nil {
		return 0, 0, 0, err
	}
	sent, got := make([]byte, checkEchoBytes), make([]byte, checkEchoBytes)
	rand.Read(sent)
	begun := time.Now()
	go s.Write(sent) // until the stream is reset; what fails shows in what comes back
	n, err = io.ReadFull(s, got)
	if !bytes.Equal(got[:n], sent[:n]) {
		err = errors.New("what came back is not what was sent")
	}
	return n, rtt, checkEchoBytes / float64(1<<20) / time.Since(begun).Seconds(), err
}

// errText says in plain words what a QUIC error means.
func errText(err error) string {
	mismatch := sec.ErrPeerIDMismatch{}
	switch {
	case errors.As(err, &mismatch):
		return fmt.Sprintf("answers with peer ID %s, but %s was promised", mismatch.Actual, mismatch.Expected)
	case isTimeout(err):
		return "no answer"
	case isRefusal(err):
		return "the relay refused the connection"
	case errors.Is(err, network.ErrReset):
		return "the relay reset the stream"
	}
	return err.Error()
}

func isTimeout(err error) bool {
	timeout := net.Error(nil) // which quic-go's timeouts are
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// isRefusal reports whether the relay hung up, before the handshake or after it. It does
// so at a limit.
func isRefusal(err error) bool {
	e := (*quic.TransportError)(nil)
	return errors.As(err, &e) && e.ErrorCode == quic.ConnectionRefused || errors.As(err, new(*quic.ApplicationError))
}
