package main

// Thousands of clients from one process: each has an identity, a connection and
// answers identify, and shares its UDP socket with many others. Nothing of a
// libp2p host is below them, so they can also misbehave.

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	p2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/multiformats/go-multistream"
	quicgo "github.com/quic-go/quic-go"
	"google.golang.org/protobuf/encoding/protodelim"
	googleproto "google.golang.org/protobuf/proto"
)

// crowd makes light clients, whose connections end with the test.
type crowd struct {
	transports []*quicgo.Transport
	next       int
	mu         sync.Mutex
}

// crowdSocket is how many connections share one socket.
const crowdSocket = 500

func newCrowd(t testing.TB, clients int) *crowd {
	t.Helper()
	return newCrowdOn(t, (clients+crowdSocket-1)/crowdSocket)
}

// newCrowdOn is a crowd on so many sockets.
func newCrowdOn(t testing.TB, sockets int) *crowd {
	t.Helper()
	var conns []*net.UDPConn
	for range sockets {
		conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	return newCrowdFrom(t, conns)
}

// newCrowdFrom is a crowd on these sockets, which it closes.
func newCrowdFrom(t testing.TB, conns []*net.UDPConn) *crowd {
	t.Helper()
	c := &crowd{}
	for _, conn := range conns {
		tr := &quicgo.Transport{Conn: conn}
		t.Cleanup(func() {
			tr.Close()
			conn.Close()
		})
		c.transports = append(c.transports, tr)
	}
	return c
}

func (c *crowd) transport() *quicgo.Transport {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next++
	return c.transports[c.next%len(c.transports)]
}

// lightIdentity is one client before it connects.
type lightIdentity struct {
	id  peer.ID
	tls *p2ptls.Identity
	key crypto.PrivKey

	// listen is where it says that it listens; nil is an address in some LAN.
	listen []ma.Multiaddr

	// sees is under which address it says that it sees the relay; nil is not said.
	sees ma.Multiaddr

	// silent says that it does not tell that it takes circuits.
	silent bool
}

func newLightIdentity(t testing.TB) lightIdentity {
	t.Helper()
	who, err := makeLightIdentity()
	if err != nil {
		t.Fatal(err)
	}
	return who
}

func makeLightIdentity() (who lightIdentity, err error) {
	if who.key, _, err = crypto.GenerateEd25519Key(rand.Reader); err != nil {
		return who, err
	}
	if who.id, err = peer.IDFromPrivateKey(who.key); err != nil {
		return who, err
	}
	who.tls, err = p2ptls.NewIdentity(who.key)
	return who, err
}

// lightClient is a client's one connection to the relay.
type lightClient struct {
	lightIdentity
	*quicgo.Conn
	transport *quicgo.Transport // nil where it took over a connection

	// stops gets the streams on which the relay offers a circuit.
	stops chan *quicgo.Stream
}

func lightConfig() *quicgo.Config {
	return &quicgo.Config{
		InitialPacketSize: 1200, // as quinn's
		MaxIdleTimeout:    10 * time.Second,
		KeepAlivePeriod:   5 * time.Second,
	}
}

// over is who on an established connection, and answers once serve runs.
func (who lightIdentity) over(conn *quicgo.Conn) *lightClient {
	return &lightClient{who, conn, nil, make(chan *quicgo.Stream, 1)}
}

// dial connects as who, and answers the relay's identify requests until the
// connection ends.
func (c *crowd) dial(ctx context.Context, who lightIdentity, relay peer.AddrInfo) (*lightClient, error) {
	return who.dial(ctx, c.transport(), relay)
}

func (who lightIdentity) dial(ctx context.Context, tr *quicgo.Transport, relay peer.AddrInfo) (*lightClient, error) {
	addr, err := manet.ToNetAddr(relay.Addrs[0].Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		return nil, err
	}
	tlsConf, _ := who.tls.ConfigForPeer(relay.ID)
	// The clients' TLS (ring, in rust-libp2p) offers no post-quantum key exchange,
	// which would cost the relay 5 KiB more for each.
	tlsConf.CurvePreferences = []tls.CurveID{tls.X25519}
	conn, err := tr.Dial(ctx, addr, tlsConf, lightConfig())
	if err != nil {
		return nil, err
	}
	client := who.over(conn)
	client.transport = tr
	if who.listen == nil {
		client.listen = []ma.Multiaddr{ma.StringCast("/ip4/192.168.1.10/udp/5001/quic-v1")}
	}
	go client.serve()
	return client, nil
}

func (c *lightClient) serve() {
	public, err := crypto.MarshalPublicKey(c.key.GetPublic())
	if err != nil {
		panic(err)
	}
	said := &identifypb.Identify{
		ProtocolVersion: googleproto.String("/privstack/sync/1.0.0"),
		AgentVersion:    googleproto.String("PrivStack/crowd"),
		PublicKey:       public,
		Protocols:       []string{string(kadProtocol), identify.ID, proto.ProtoIDv2Stop},
	}
	if c.silent {
		said.Protocols = said.Protocols[:2]
	}
	if c.sees != nil {
		said.ObservedAddr = c.sees.Bytes()
	}
	// More than fits into one message goes into more of them, which the reader
	// merges, as identify's spec has it for large ones.
	parts := []*identifypb.Identify{said}
	for i, a := range c.listen {
		if i > 0 && i%150 == 0 {
			parts = append(parts, new(identifypb.Identify))
		}
		part := parts[len(parts)-1]
		part.ListenAddrs = append(part.ListenAddrs, a.Bytes())
	}
	mux := multistream.NewMultistreamMuxer[string]()
	mux.AddHandler(identify.ID, nil)
	mux.AddHandler(string(proto.ProtoIDv2Stop), nil)
	mux.AddHandler(string(kadProtocol), nil)
	for {
		s, err := c.AcceptStream(context.Background())
		if err != nil {
			return
		}
		go func() {
			chosen, _, err := mux.Negotiate(s)
			if err == nil && chosen == string(proto.ProtoIDv2Stop) {
				c.stops <- s
				return
			}
			defer s.CancelRead(0)
			defer s.Close()
			switch {
			case err != nil:
			case chosen == identify.ID:
				for _, part := range parts {
					protodelim.MarshalTo(s, part)
				}
			case chosen == string(kadProtocol):
				answerKad(s)
			}
		}()
	}
}

// answerKad answers as one who takes every record and knows nobody.
func answerKad(s *quicgo.Stream) {
	for {
		m := new(kadpb.Message)
		if protodelim.UnmarshalFrom(&byteReader{Reader: s}, m) != nil {
			return
		}
		if m.Type != kadpb.Message_PUT_VALUE {
			m = kadpb.NewMessage(m.Type, m.Key, 0)
		}
		if _, err := protodelim.MarshalTo(s, m); err != nil {
			return
		}
	}
}

// open opens a stream that speaks protocol.
func (c *lightClient) open(ctx context.Context, protocol string) (*quicgo.Stream, error) {
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		s.SetDeadline(deadline)
	}
	if err := multistream.SelectProtoOrFail(protocol, s); err != nil {
		s.CancelRead(0)
		s.CancelWrite(0)
		return nil, err
	}
	return s, nil
}

// ask sends one DHT request and returns the answer.
func (c *lightClient) ask(ctx context.Context, req *kadpb.Message) (*kadpb.Message, error) {
	s, err := c.open(ctx, string(kadProtocol))
	if err != nil {
		return nil, err
	}
	defer s.CancelRead(0)
	if _, err := protodelim.MarshalTo(s, req); err != nil {
		return nil, err
	}
	s.Close()
	resp := new(kadpb.Message)
	return resp, protodelim.UnmarshalFrom(&byteReader{Reader: s}, resp)
}

// named reports whether the relay's answer names id, with an address.
func (c *lightClient) named(ctx context.Context, id peer.ID) (bool, error) {
	resp, err := c.ask(ctx, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(id), 0))
	for _, p := range resp.GetCloserPeers() {
		if peer.ID(p.Id) == id && len(p.Addrs) > 0 {
			return true, err
		}
	}
	return false, err
}

// reserve makes a reservation for a circuit.
func (c *lightClient) reserve(ctx context.Context) error {
	reserve := circuitpb.HopMessage_RESERVE
	s, resp, err := c.hop(ctx, &circuitpb.HopMessage{Type: &reserve})
	if err != nil {
		return err
	}
	s.CancelRead(0)
	s.Close()
	if len(resp.GetReservation().GetAddrs()) == 0 {
		return errors.New("a reservation without an address")
	}
	return nil
}

// circuit opens a circuit to id. What comes on the stream next is id's.
func (c *lightClient) circuit(ctx context.Context, id peer.ID) (*quicgo.Stream, error) {
	connect := circuitpb.HopMessage_CONNECT
	s, _, err := c.hop(ctx, &circuitpb.HopMessage{Type: &connect, Peer: &circuitpb.Peer{Id: []byte(id)}})
	return s, err
}

// hop asks the relay's circuit service, and returns its answer where it agrees.
func (c *lightClient) hop(ctx context.Context, req *circuitpb.HopMessage) (*quicgo.Stream, *circuitpb.HopMessage, error) {
	s, err := c.open(ctx, string(proto.ProtoIDv2Hop))
	if err != nil {
		return nil, nil, err
	}
	resp := new(circuitpb.HopMessage)
	_, err = protodelim.MarshalTo(s, req)
	if err == nil {
		err = protodelim.UnmarshalFrom(&byteReader{Reader: s}, resp)
	}
	if err == nil && resp.GetStatus() != circuitpb.Status_OK {
		err = errors.New("refused: " + resp.GetStatus().String())
	}
	if err != nil {
		s.CancelRead(0)
		s.CancelWrite(0)
		return nil, nil, err
	}
	return s, resp, nil
}

// accept takes a circuit that the relay offers. What comes on the stream next is
// the other end's.
func (c *lightClient) accept(ctx context.Context) (*quicgo.Stream, error) {
	select {
	case s := <-c.stops:
		if err := protodelim.UnmarshalFrom(&byteReader{Reader: s}, new(circuitpb.StopMessage)); err != nil {
			return nil, err
		}
		status, ok := circuitpb.StopMessage_STATUS, circuitpb.Status_OK
		_, err := protodelim.MarshalTo(s, &circuitpb.StopMessage{Type: &status, Status: &ok})
		return s, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
