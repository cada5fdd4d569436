package main

// The throw-away clients of `check`: a key that is never stored and one QUIC
// connection to the relay. They speak identify, ping, the DHT and the circuit
// relay by themselves rather than through a libp2p host: a host would dial what a
// relay tells it, and a hostile relay could point it at others. These dial one
// address, and listen on nothing.

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

	// Latency is the shortest of checkRoundTrips; checkEchoBytes go through the circuit
	// and back.
	checkRoundTrips = 5
	checkEchoBytes  = 1 << 20
)

// checkClient is one throw-away client, connected to a relay. dialCheckClient makes
// it; end it with Close.
type checkClient struct {
	id      peer.ID
	relay   peer.ID // the one that answered
	sockets *quicreuse.ConnManager
	conn    transport.CapableConn
	serving sync.WaitGroup // the streams that the relay opens
}

// dialCheckClient makes a client and connects it to the relay at addr. An empty id
// takes whoever answers.
func dialCheckClient(ctx context.Context, addr ma.Multiaddr, id peer.ID) (_ *checkClient, err error) {
	key, pub, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, err
	}
	c := new(checkClient)
	// It listens on nothing, so nobody will see a token or a reset of these keys.
	if c.sockets, err = quicreuse.NewConnManager(quic.StatelessResetKey{}, quic.TokenGeneratorKey{}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	dialer, err := libp2pquic.NewTransport(key, c.sockets, nil, nil, nil)
	if err != nil {
		return nil, err
	}
	if c.conn, err = dialer.Dial(ctx, addr, id); err != nil {
		return nil, err
	}
	c.id = c.conn.LocalPeer()
	if c.relay, err = peer.IDFromPublicKey(c.conn.RemotePublicKey()); err != nil {
		return nil, err
	}
	c.serving.Go(func() { c.serve(pub) })
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

// serve answers the relay, which asks who we are and brings circuits, until the
// connection ends.
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
	if _, err := protodelim.MarshalTo(s, ok); err != nil {
		return err
	}
	_, err := io.Copy(s, io.LimitReader(s, 2*checkEchoBytes))
	return err
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

// echoOver sends checkEchoBytes over s, which sends them back. It returns how many
// came back, also if not all did, and how long they took from the first byte sent.
func echoOver(s io.ReadWriter) (n int, took time.Duration, err error) {
	sent, got := make([]byte, checkEchoBytes), make([]byte, checkEchoBytes)
	rand.Read(sent)
	begun := time.Now()
	go s.Write(sent) // until the stream is reset; what fails shows in what comes back
	n, err = io.ReadFull(s, got)
	if !bytes.Equal(got[:n], sent[:n]) {
		err = errors.New("what came back is not what was sent")
	}
	return n, time.Since(begun), err
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
