package main

// Thousands of clients in one process. Each has an identity and a connection and answers
// identify; many share one UDP socket. They are written on quic-go without a libp2p host,
// so they are small, and can misbehave.

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
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
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
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

// newCrowd makes a crowd with sockets for that many clients.
func newCrowd(t testing.TB, clients int) *crowd {
	t.Helper()
	return newCrowdOn(t, (clients+crowdSocket-1)/crowdSocket)
}

// newCrowdOn makes a crowd on that many sockets.
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

// newCrowdFrom makes a crowd on these sockets and closes them with the test.
func newCrowdFrom(t testing.TB, conns []*net.UDPConn) *crowd {
	t.Helper()
	c := &crowd{}
	for _, conn := range conns {
		tr := &quicgo.Transport{Conn: conn}
		c.transports = append(c.transports, tr)
	}
	t.Cleanup(c.close)
	return c
}

// close ends all connections.
func (c *crowd) close() {
	var closing sync.WaitGroup
	for _, tr := range c.transports {
		closing.Go(func() { // each takes its time
			tr.Close()
			tr.Conn.Close()
		})
	}
	closing.Wait()
}

func (c *crowd) transport() *quicgo.Transport {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next++
	return c.transports[c.next%len(c.transports)]
}

// lightIdentity is a client that has not connected yet.
type lightIdentity struct {
	id  peer.ID
	tls *p2ptls.Identity
	key crypto.PrivKey

	// listen are the addresses that it reports; nil stands for one in a LAN.
	listen []ma.Multiaddr

	// sees is the address at which it says that it sees the relay; nil: it does not say.
	sees ma.Multiaddr

	// silent says that it does not tell that it takes circuits.
	silent bool

	// patient leaves it to the relay to keep the connection alive, every 15 s. The packets
	// that ten thousand connections send every 5 s would take a core.
	patient bool
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

// lightClient is a client with one connection, to the relay.
type lightClient struct {
	lightIdentity
	*quicgo.Conn
	transport *quicgo.Transport // nil for a connection that was accepted

	// stops receives the streams on which the relay offers a circuit.
	stops chan *quicgo.Stream
}

func lightConfig() *quicgo.Config {
	return &quicgo.Config{
		InitialPacketSize: 1200, // as quinn's
		MaxIdleTimeout:    10 * time.Second,
		KeepAlivePeriod:   5 * time.Second,
	}
}

// over makes a client of who on an established connection. It answers once serve runs.
func (who lightIdentity) over(conn *quicgo.Conn) *lightClient {
	return &lightClient{who, conn, nil, make(chan *quicgo.Stream, 1)}
}

// dial connects as who, and answers the relay's identify requests until the
// connection ends.
func (c *crowd) dial(ctx context.Context, who lightIdentity, relay peer.AddrInfo) (*lightClient, error) {
	return who.dial(ctx, c.transport(), relay)
}

// newcomer connects as a client that has never been here.
func (c *crowd) newcomer(ctx context.Context, relay peer.AddrInfo) (*lightClient, error) {
	who, err := makeLightIdentity()
	if err != nil {
		return nil, err
	}
	return c.dial(ctx, who, relay)
}

func (who lightIdentity) dial(ctx context.Context, tr *quicgo.Transport, relay peer.AddrInfo) (*lightClient, error) {
	addr, err := manet.ToNetAddr(relay.Addrs[0].Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		return nil, err
	}
	tlsConf, _ := who.tls.ConfigForPeer(relay.ID)
	// The deployed clients' TLS (ring, in rust-libp2p) offers no post-quantum key
	// exchange. With one, each client would cost the relay 5 KiB more.
	tlsConf.CurvePreferences = []tls.CurveID{tls.X25519}
	conf := lightConfig()
	if who.patient {
		conf.MaxIdleTimeout, conf.KeepAlivePeriod = time.Minute, 0
	}
	conn, err := tr.Dial(ctx, addr, tlsConf, conf)
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

// serve answers streams that the relay opens, until the connection ends.
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
	// What does not fit into one message goes into more of them, and the reader merges
	// them: https://github.com/libp2p/specs/blob/master/identify/README.md
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

// answerKad answers DHT requests: it accepts every record and knows nobody.
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

// open opens a stream for protocol, with the deadline of ctx.
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

// ask sends a DHT request and returns the answer.
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

// named asks the relay for id, and reports whether the answer names it with an address.
func (c *lightClient) named(ctx context.Context, id peer.ID) (bool, error) {
	resp, err := c.ask(ctx, kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(id), 0))
	for _, p := range resp.GetCloserPeers() {
		if peer.ID(p.Id) == id && len(p.Addrs) > 0 {
			return true, err
		}
	}
	return false, err
}

// reserve makes a reservation, so that others can open circuits to this client.
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

// circuit opens a circuit to id. What comes on the stream then is from id.
func (c *lightClient) circuit(ctx context.Context, id peer.ID) (*quicgo.Stream, error) {
	connect := circuitpb.HopMessage_CONNECT
	s, _, err := c.hop(ctx, &circuitpb.HopMessage{Type: &connect, Peer: &circuitpb.Peer{Id: []byte(id)}})
	return s, err
}

// hop sends a request to the relay's circuit service, and returns the answer if the relay
// agrees.
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

// accept waits for a circuit that the relay offers, and takes it. What comes on the stream
// then is from the other end.
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

// joinCrowd connects that many clients to r and waits until all are identified.
func joinCrowd(t testing.TB, r testRelay, clients int) []*lightClient {
	t.Helper()
	c := newCrowd(t, clients)
	joined := make([]*lightClient, clients)
	for i := range joined {
		joined[i] = c.join(t, r, newLightIdentity(t))
	}
	eventually(t, "all are identified", func() bool {
		return !slices.ContainsFunc(joined, func(c *lightClient) bool { return !r.knows(c.id) })
	})
	return joined
}

// join connects who to r.
func (c *crowd) join(t testing.TB, r testRelay, who lightIdentity) *lightClient {
	t.Helper()
	client, err := c.dial(testContext(t), who, r.info)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// pair connects two clients to r.
func (c *crowd) pair(ctx context.Context, t *testing.T, r testRelay, who [2]lightIdentity) (a, b *lightClient) {
	t.Helper()
	a, err := c.dial(ctx, who[0], r.info)
	if err != nil {
		t.Fatal(err)
	}
	if b, err = c.dial(ctx, who[1], r.info); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// mustAsk sends a DHT request and returns the peers that the answer names, with their
// addresses.
func (c *lightClient) mustAsk(t testing.TB, req *kadpb.Message) map[peer.ID][]ma.Multiaddr {
	t.Helper()
	resp, err := c.ask(testContext(t), req)
	if err != nil {
		t.Fatalf("%v: %v", req.Type, err)
	}
	if n := len(resp.CloserPeers); n > maxNamed {
		t.Errorf("%v: %d peers are named, want at most %d", req.Type, n, maxNamed)
	}
	named := make(map[peer.ID][]ma.Multiaddr)
	for _, p := range resp.CloserPeers {
		if len(p.Addrs) == 0 {
			t.Errorf("%v: %v is named without an address", req.Type, peer.ID(p.Id))
		}
		named[peer.ID(p.Id)] = p.Addresses()
	}
	if _, ok := named[c.id]; ok && !bytes.Equal(req.Key, []byte(c.id)) {
		t.Errorf("%v: the answer names the asker", req.Type)
	}
	return named
}

// seenAt returns the address at which the relay sees the client.
func (c *lightClient) seenAt() ma.Multiaddr {
	addr, err := quicreuse.ToQuicMultiaddr(c.LocalAddr(), quicgo.Version1)
	if err != nil {
		panic(err) // of a connection's own address
	}
	return addr
}

// put stores a record such as clients store, under a key of that name.
func (c *lightClient) put(ctx context.Context, name string) error {
	return c.putValue(ctx, name, `{"device_name":"bench","addresses":["/ip4/192.168.1.10/udp/5001/quic-v1"],"timestamp":1700000000}`)
}

// putValue stores a record with that value.
func (c *lightClient) putValue(ctx context.Context, name, value string) error {
	key := []byte(recordPrefix + "syncgroup/" + name)
	req := kadpb.NewMessage(kadpb.Message_PUT_VALUE, key, 0)
	req.Record = rustRecord(key, value, c.id, 60)
	_, err := c.ask(ctx, req)
	return err
}

// circuitTo opens a circuit to b and returns both ends.
func (c *lightClient) circuitTo(ctx context.Context, b *lightClient) (s, taken *quicgo.Stream, err error) {
	if err := b.reserve(ctx); err != nil {
		return nil, nil, err
	}
	type end struct {
		*quicgo.Stream
		error
	}
	accepted := make(chan end, 1)
	go func() {
		s, err := b.accept(ctx)
		accepted <- end{s, err}
	}()
	if s, err = c.circuit(ctx, b.id); err != nil {
		return nil, nil, err
	}
	other := <-accepted
	return s, other.Stream, other.error
}

// link is a stream between two clients, over a circuit or a direct connection.
type link struct{ from, to *quicgo.Stream }

// unlimited takes away the deadlines that opening the streams has left.
func unlimited(streams ...*quicgo.Stream) {
	for _, s := range streams {
		s.SetDeadline(time.Time{})
	}
}

// flood sends as fast as l takes it, or each bytes per second if that is not 0. It counts
// what arrives, and returns when l ends.
func (l link) flood(got *atomic.Int64, each int64) {
	go func() {
		chunk := make([]byte, 64<<10)
		if each > 0 {
			chunk = chunk[:16<<10]
		}
		for next := time.Now(); ; {
			if each > 0 {
				next = next.Add(time.Duration(int64(len(chunk)) * int64(time.Second) / each))
				time.Sleep(time.Until(next))
			}
			if _, err := l.from.Write(chunk); err != nil {
				return
			}
		}
	}()
	p := make([]byte, 64<<10)
	for {
		n, err := l.to.Read(p)
		got.Add(int64(n))
		if err != nil {
			return
		}
	}
}

// loopbackCrowd makes a crowd on an address of 127.0.0.0/8. To the relay's store each such
// address is a network.
func loopbackCrowd(t *testing.T, ip string, sockets int) *crowd {
	t.Helper()
	var conns []*net.UDPConn
	for range sockets {
		conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(ip), 0)))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	return newCrowdFrom(t, conns)
}
