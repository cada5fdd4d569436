package main

// What clients get from a running relay. They are real libp2p hosts, on loopback.

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	kb "github.com/libp2p/go-libp2p-kbucket"
	libp2pconfig "github.com/libp2p/go-libp2p/config"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/record"
	circuitclient "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/client"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/encoding/protodelim"
)

// What the relay is for: two devices that know only the relay find each other through it
// and connect.
func TestTwoClientsMeetThroughRelay(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	a, b := newClient(t), newClient(t)
	kadA, kadB := serveKad(t, a), serveKad(t, b)
	connect(t, a, r)
	connect(t, b, r)
	eventually(t, "both know the relay as a DHT server", func() bool {
		return kadA.RoutingTable().Find(r.info.ID) != "" && kadB.RoutingTable().Find(r.info.ID) != ""
	})
	waitFound(t, a, r, b.ID()) // or the relay may not have identified b yet

	info, err := kadA.FindPeer(testContext(t), b.ID())
	if err != nil {
		t.Fatalf("FindPeer(b): %v", err)
	}
	if want := observed(t, b, r); !slices.ContainsFunc(info.Addrs, want.Equal) {
		t.Errorf("FindPeer(b) = %v, want b's observed address %v among them", info.Addrs, want)
	}
	if err := a.Connect(testContext(t), info); err != nil {
		t.Errorf("connect to the addresses that were found: %v", err)
	}
	if _, err := kadB.FindPeer(testContext(t), a.ID()); err != nil {
		t.Errorf("FindPeer(a): %v", err)
	}
}

// Thirty devices come back at once after a power cut, and each finds every other.
func TestThirtyClientsJoinAtOnce(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := make([]host.Host, 30)
	for i := range clients {
		clients[i] = newClient(t)
		serveKad(t, clients[i])
	}
	joined := make(chan error)
	for _, c := range clients {
		go func() { joined <- c.Connect(testContext(t), r.info) }()
	}
	for range clients {
		if err := <-joined; err != nil {
			t.Fatalf("join: %v", err)
		}
	}
	for _, a := range clients {
		for _, b := range clients {
			if a == b {
				continue
			}
			addrs := waitFound(t, a, r, b.ID())
			if want := observed(t, b, r); !slices.ContainsFunc(addrs, want.Equal) {
				t.Errorf("answer = %v, want the observed address %v among them", addrs, want)
			}
		}
	}
	if got := r.counters().peersServed; got != len(clients) {
		t.Errorf("peers_served = %d, want %d", got, len(clients))
	}
}

// A sync message has up to 16 MiB. go-libp2p's default circuit ends after 128 KiB.
func TestCircuitCarriesLargeSync(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	src, dst := newClient(t), newClient(t)
	circuitBetween(t, r, src, dst)
	s := openEcho(t, src, dst)
	defer s.Reset()

	const size = 32 << 20
	sent := sha256.New()
	failed := make(chan error, 1)
	go func() {
		_, err := io.CopyN(io.MultiWriter(s, sent), rand.Reader, size)
		if err == nil {
			err = s.CloseWrite()
		}
		failed <- err
	}()
	received := sha256.New()
	n, err := io.Copy(received, s)
	if err != nil || n != size {
		t.Fatalf("echoed %d bytes, error %v, want %d", n, err, size)
	}
	if err := <-failed; err != nil {
		t.Fatalf("send: %v", err)
	}
	if !bytes.Equal(received.Sum(nil), sent.Sum(nil)) {
		t.Error("the echo differs from what was sent")
	}
	if got := r.counters().relayedConnections; got != 1 {
		t.Errorf("relayed_connections = %d, want 1", got)
	}
}

// Peers are told the caps that the operator set. Unlimited has its own form on the wire.
func TestCircuitLimitsAreTold(t *testing.T) {
	tests := []struct {
		args     []string
		duration time.Duration
		data     uint64
	}{
		{nil, time.Hour, 1 << 30},
		{[]string{"--circuit-duration=90s", "--circuit-bytes=512MiB"}, 90 * time.Second, 512 << 20},
		{[]string{"--circuit-duration=0", "--circuit-bytes=0"}, 0, 0},
		{[]string{"--circuit-duration=0"}, maxCircuitDuration, 1 << 30},
		{[]string{"--circuit-bytes=0"}, time.Hour, 1<<63 - 1},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			r := newTestRelay(t, defaultConfig(t, tt.args...))
			c := newClient(t)
			connect(t, c, r)
			got, err := circuitclient.Reserve(testContext(t), c, r.info)
			if err != nil {
				t.Fatal(err)
			}
			if got.LimitDuration != tt.duration || got.LimitData != tt.data {
				t.Errorf("reservation is limited to %v and %d bytes, want %v and %d", got.LimitDuration, got.LimitData, tt.duration, tt.data)
			}
		})
	}
}

// A circuit ends at the operator's cap, and not earlier. The echo of each piece is awaited
// before the next is sent: what is in flight at the end is lost, because the sender's
// muxer fails and drops what it has not delivered.
func TestCircuitEndsAtItsLimit(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t, "--circuit-bytes=1MiB"))
	src, dst := newClient(t), newClient(t)
	circuitBetween(t, r, src, dst)
	s := openEcho(t, src, dst)
	defer s.Reset()
	s.SetDeadline(time.Now().Add(testTimeout))
	n, piece, back := 0, make([]byte, 16<<10), make([]byte, 16<<10)
	var err error
	for n < 2<<20 {
		if _, err = s.Write(piece); err != nil {
			break
		}
		if _, err = io.ReadFull(s, back); err != nil {
			break
		}
		n += len(piece)
	}
	// Handshakes over the circuit and the headers of its frames count too.
	if n >= 1<<20 || n < 1<<20*15/16 {
		t.Errorf("%d bytes came back (error %v), want 1 MiB less a piece and what handshakes take", n, err)
	}
}

// A Rust client refuses a reservation without an address.
func TestReservationAlwaysHasAddress(t *testing.T) {
	for _, args := range [][]string{nil, {"--announce=203.0.113.7"}, {"--announce=relay.example.org", "--announce=/ip6/2001:db8::7/udp/443/quic-v1"}} {
		r := newTestRelay(t, defaultConfig(t, args...))
		c := newClient(t)
		connect(t, c, r)
		got, err := circuitclient.Reserve(testContext(t), c, r.info)
		if err != nil {
			t.Fatalf("%v: reserve: %v", args, err)
		}
		if len(got.Addrs) == 0 {
			t.Errorf("%v: reservation has no address", args)
		}
		for _, s := range args {
			want, _ := parseAnnounce(strings.TrimPrefix(s, "--announce="), atoi(t, listenPort(r.relay)))
			withID := ma.StringCast(want.String() + "/p2p/" + r.peerID())
			if len(got.Addrs) != len(args) || !slices.ContainsFunc(got.Addrs, withID.Equal) {
				t.Errorf("reservation = %v, want the %d announced addresses, with %v among them", got.Addrs, len(args), withID)
			}
			if listed := r.listedAddrs(); !slices.Contains(listed[:len(args)], want.String()) || !strings.HasPrefix(listed[len(args)], "/ip4/0.0.0.0/udp/") {
				t.Errorf("the identity endpoint lists %v, want the announced addresses, then the sockets", listed)
			}
			if told := c.Peerstore().Addrs(r.info.ID); !slices.ContainsFunc(told, want.Equal) {
				t.Errorf("identify told %v, want %v among them", told, want)
			}
		}
	}
}

// On a container host with dozens of interfaces, a reservation still fits into the 4096
// bytes that clients read, and public addresses come first.
func TestAdvertisedAddrsAreBounded(t *testing.T) {
	var many []ma.Multiaddr
	for i := range 100 {
		many = append(many, ma.StringCast(fmt.Sprintf("/ip4/172.17.%d.1/udp/4001/quic-v1", i)))
	}
	loop := ma.StringCast("/ip4/127.0.0.1/udp/4001/quic-v1")
	local := ma.StringCast("/ip6/fe80::1/udp/4001/quic-v1")
	public := ma.StringCast("/ip4/8.8.8.8/udp/4001/quic-v1")

	got := bestAddrs(append(append([]ma.Multiaddr{loop, local}, many...), public))
	if len(got) != maxOfferedAddrs || !got[0].Equal(public) || slices.ContainsFunc(got, loop.Equal) || slices.ContainsFunc(got, local.Equal) {
		t.Errorf("bestAddrs = %v, want %d with the public one first and neither loopback nor link-local", got, maxOfferedAddrs)
	}
	if got := bestAddrs([]ma.Multiaddr{loop}); len(got) != 1 || !got[0].Equal(loop) {
		t.Errorf("bestAddrs = %v, want loopback where there is nothing else", got)
	}
}

// After an update the relay has the same ID and port, and clients go on as before.
func TestClientsGoOnAfterRestart(t *testing.T) {
	key := newTestKey(t)
	cfg := defaultConfig(t)
	r := newTestRelayWithin(t, newLimits(0, 256), cfg, key)
	a, b := newClient(t), newClient(t)
	serveKad(t, a)
	serveKad(t, b)
	connect(t, a, r)
	connect(t, b, r)
	waitFound(t, a, r, b.ID())

	port := listenPort(r.relay)
	if err := r.close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	eventually(t, "the clients notice that the relay is gone", func() bool {
		return a.Network().Connectedness(r.info.ID) != network.Connected && b.Network().Connectedness(r.info.ID) != network.Connected
	})
	cfg.port = atoi(t, port)
	again := newTestRelayWithin(t, newLimits(0, 256), cfg, key)
	if again.info.ID != r.info.ID {
		t.Fatalf("peer ID is %v after the restart, was %v", again.info.ID, r.info.ID)
	}
	connect(t, a, again)
	connect(t, b, again)
	waitFound(t, a, again, b.ID())
	waitFound(t, b, again, a.ID())
	circuitBetween(t, again, newClient(t), b)
}

// The sockets use the keys that libp2p.New would derive. A release that used libp2p.New
// could still reset the connections of the process before it, and the other way round.
func TestSocketKeysAreThoseOfLibp2p(t *testing.T) {
	key, err := crypto.UnmarshalEd25519PrivateKey(newTestKey(t))
	if err != nil {
		t.Fatal(err)
	}
	reset, token, err := quicKeys(key)
	if err != nil {
		t.Fatal(err)
	}
	if want, err := libp2pconfig.PrivKeyToStatelessResetKey(key); err != nil || reset != want {
		t.Errorf("stateless reset key = %x (%v), want %x", reset, err, want)
	}
	if want, err := libp2pconfig.PrivKeyToTokenGeneratorKey(key); err != nil || token != want {
		t.Errorf("token key = %x (%v), want %x", token, err, want)
	}
}

func atoi(t testing.TB, s string) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(s, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// Clients recognise a relay by these names, and need these protocols.
func TestIdentifySaysWhoWeAre(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c := newClient(t)
	connect(t, c, r)
	for key, want := range map[string]string{"ProtocolVersion": "/privstack/relay/1.0.0", "AgentVersion": "privstack-relay/0.1.0"} {
		if got, err := c.Peerstore().Get(r.info.ID, key); err != nil || got != want {
			t.Errorf("identify %s = %v (%v), want %s", key, got, err, want)
		}
	}
	got, err := c.Peerstore().GetProtocols(r.info.ID)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	want := []string{
		"/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/kad/1.0.0", "/ipfs/ping/1.0.0",
		"/libp2p/circuit/relay/0.2.0/hop",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("protocols = %v, want %v and no other", got, want)
	}
}

// identifyOf returns r's identify message, and the client that received it.
func identifyOf(t *testing.T, r testRelay) (*identifypb.Identify, *lightClient) {
	t.Helper()
	ctx := testContext(t)
	c, err := newCrowd(t, 1).newcomer(ctx, r.info)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.open(ctx, identify.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer s.CancelRead(0)
	said := new(identifypb.Identify)
	if err := protodelim.UnmarshalFrom(&byteReader{Reader: s}, said); err != nil {
		t.Fatal(err)
	}
	return said, c
}

// A client learns from identify at which address the relay sees it, and the relay's own
// addresses. These are signed, so that it can pass them on to others.
func TestIdentifySaysWhoIsWhereAndSignsIt(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t, "--announce=relay.example.org", "--announce=203.0.113.7"))
	said, c := identifyOf(t, r)
	want := make([]string, 0, len(r.reach.announce))
	for _, a := range r.reach.announce {
		want = append(want, a.String())
	}
	slices.Sort(want)

	var listen []string
	for _, b := range said.ListenAddrs {
		listen = append(listen, ma.Cast(b).String())
	}
	slices.Sort(listen)
	if !slices.Equal(listen, want) {
		t.Errorf("listen addresses = %v, want %v", listen, want)
	}
	if got, want := ma.Cast(said.GetObservedAddr()).String(), fmt.Sprintf("/ip4/127.0.0.1/udp/%d/quic-v1", c.LocalAddr().(*net.UDPAddr).Port); got != want {
		t.Errorf("observed address = %v, want %v", got, want)
	}
	if key, err := crypto.UnmarshalPublicKey(said.GetPublicKey()); err != nil || !r.info.ID.MatchesPublicKey(key) {
		t.Errorf("public key = %x (%v), want that of %v", said.GetPublicKey(), err, r.info.ID)
	}

	envelope, rec, err := record.ConsumeEnvelope(said.GetSignedPeerRecord(), peer.PeerRecordEnvelopeDomain)
	if err != nil {
		t.Fatalf("signed peer record: %v", err)
	}
	signed := strs(rec.(*peer.PeerRecord).Addrs)
	slices.Sort(signed)
	if id := rec.(*peer.PeerRecord).PeerID; id != r.info.ID || !id.MatchesPublicKey(envelope.PublicKey) || !slices.Equal(signed, want) {
		t.Errorf("signed peer record of %v names %v, want %v with %v", id, signed, r.info.ID, want)
	}
}

// When the machine's addresses change, connected clients are told.
func TestClientsAreToldOfNewAddresses(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c := newClient(t)
	connect(t, c, r)
	old := listenPort(r.relay)
	// Here another port, on all interfaces, takes the part of another address.
	if err := r.host.Network().Listen(ma.StringCast("/ip4/0.0.0.0/udp/0/quic-v1")); err != nil {
		t.Fatal(err)
	}
	addrs := r.host.Network().ListenAddresses()
	port, _ := addrs[slices.IndexFunc(addrs, func(a ma.Multiaddr) bool {
		p, _ := a.ValueForProtocol(ma.P_UDP)
		return p != old
	})].ValueForProtocol(ma.P_UDP)
	eventually(t, "the client knows the new port", func() bool {
		return slices.ContainsFunc(c.Peerstore().Addrs(r.info.ID), func(a ma.Multiaddr) bool {
			got, _ := a.ValueForProtocol(ma.P_UDP)
			return got == port
		})
	})
}

// Where clients say that they see the relay is told to nobody else: four of them in
// four networks could otherwise send everybody to an address of their choice.
func TestInventedObservedAddressIsToldToNobody(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs all of 127.0.0.0/8")
	}
	r := newTestRelay(t, defaultConfig(t))
	invented := ma.StringCast("/ip4/8.8.8.8/udp/4001/quic-v1")
	claims, err := r.host.EventBus().Subscribe(new(event.EvtPeerIdentificationCompleted))
	if err != nil {
		t.Fatal(err)
	}
	defer claims.Close()
	for i := range 8 {
		from := net.IPv4(127, 0, 0, byte(2+i))
		c := newClient(t, libp2p.NoListenAddrs, libp2p.QUICReuse(quicreuse.NewConnManager,
			quicreuse.OverrideListenUDP(func(network string, _ *net.UDPAddr) (net.PacketConn, error) {
				return net.ListenUDP(network, &net.UDPAddr{IP: from})
			})))
		c.SetStreamHandler(identify.ID, func(s network.Stream) {
			defer s.Close()
			protodelim.MarshalTo(s, &identifypb.Identify{ObservedAddr: invented.Bytes()})
		})
		connect(t, c, r)
		select {
		case e := <-claims.Out():
			if said := e.(event.EvtPeerIdentificationCompleted).ObservedAddr; !said.Equal(invented) {
				t.Fatalf("the relay has read %v, want the invented address", said)
			}
		case <-testContext(t).Done():
			t.Fatal("the relay has not read what the client says")
		}
	}
	// The host computes its addresses anew when it listens on one more port.
	if err := r.host.Network().Listen(ma.StringCast("/ip4/127.0.0.1/udp/0/quic-v1")); err != nil {
		t.Fatal(err)
	}
	c := newClient(t)
	connect(t, c, r)
	got, err := circuitclient.Reserve(testContext(t), c, r.info)
	if err != nil {
		t.Fatal(err)
	}
	said, _ := identifyOf(t, r)
	for _, addr := range said.ListenAddrs {
		got.Addrs = append(got.Addrs, ma.Cast(addr))
	}
	for _, addr := range append(got.Addrs, r.host.Addrs()...) {
		if ipOf(addr) == ipOf(invented) {
			t.Errorf("the relay tells %v", addr)
		}
	}
}

// The relay listens on QUIC v1, on IPv4 and IPv6, and on nothing else: every open port is
// one more to protect.
func TestListensOnQUICAlone(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	port := listenPort(r.relay)
	got := r.listedAddrs()
	want := []string{"/ip4/0.0.0.0/udp/" + port + "/quic-v1"}
	if len(got) == 2 { // a machine without IPv6 passes, too
		want = append(want, "/ip6/::/udp/"+port+"/quic-v1")
	}
	if !slices.Equal(got, want) {
		t.Errorf("listens on %v, want %v", got, want)
	}
	if len(got) < 2 {
		t.Skip("no IPv6 on this machine")
	}
	c := newClient(t, libp2p.ListenAddrStrings("/ip6/::1/udp/0/quic-v1"))
	v6 := ma.StringCast("/ip6/::1/udp/" + port + "/quic-v1")
	if err := c.Connect(testContext(t), peer.AddrInfo{ID: r.info.ID, Addrs: []ma.Multiaddr{v6}}); err != nil {
		t.Errorf("connect over IPv6: %v", err)
	}
}

// In other DHTs, strangers who make up peer IDs close to a group's key can hide its record
// (GO-2024-3218, see .ci/run). This relay keeps every record and answers with it.
func TestStrangersCloseToAKeyHideNothing(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	strangers := newCrowd(t, maxNamed)
	for range maxNamed {
		who := newLightIdentity(t)
		for !kb.Closer(who.id, r.info.ID, string(groupKey)) {
			who = newLightIdentity(t)
		}
		if _, err := strangers.dial(testContext(t), who, r.info); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the stranger is identified", func() bool { return r.knows(who.id) })
	}
	a, b := newClient(t), newClient(t)
	connect(t, a, r)
	connect(t, b, r)
	if err := put(t, a, r, rustRecord(groupKey, "value", a.ID(), 60)); err != nil {
		t.Fatal(err)
	}
	resp := ask(t, b, r, kadpb.NewMessage(kadpb.Message_GET_VALUE, groupKey, 0))
	if string(resp.GetRecord().GetValue()) != "value" || len(resp.CloserPeers) == 0 || peer.ID(resp.CloserPeers[0].Id) != a.ID() {
		t.Errorf("answer = %v, want the record, and its publisher named before any stranger", resp)
	}
	// The report is about provider records, which do not exist here.
	if resp, err := tryAsk(testContext(t), b, r, kadpb.NewMessage(kadpb.Message_GET_PROVIDERS, groupKey, 0)); err == nil {
		t.Errorf("GET_PROVIDERS is answered: %v", resp)
	}
}

// Clients report any address they like. A relay that dialled them would scan ports for
// anyone.
func TestRelayDialsNobody(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	victim := newClient(t)
	r.host.Peerstore().AddAddrs(victim.ID(), victim.Addrs(), peerstore.PermanentAddrTTL)
	err := r.host.Connect(testContext(t), peer.AddrInfo{ID: victim.ID(), Addrs: victim.Addrs()})
	if err == nil || len(victim.Network().Conns()) > 0 {
		t.Errorf("Connect = %v, with %d connections at the victim, want an error and none", err, len(victim.Network().Conns()))
	}
}

// While the relay drains, open circuits go on and no new ones begin.
func TestDrainRefusesNewAndFinishesOpen(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	src, dst := newClient(t), newClient(t)
	circuitBetween(t, r, src, dst)
	s := openEcho(t, src, dst)

	left := make(chan int)
	go func() { left <- r.drain(context.Background(), testTimeout) }()
	eventually(t, "new reservations are refused", func() bool {
		_, err := circuitclient.Reserve(testContext(t), src, r.info)
		return err != nil
	})
	if _, err := s.Write([]byte("still here")); err != nil {
		t.Fatalf("write on the open circuit: %v", err)
	}
	got := make([]byte, len("still here"))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != "still here" {
		t.Fatalf("the open circuit echoed %q, %v", got, err)
	}
	if err := s.Conn().Close(); err != nil {
		t.Fatal(err)
	}
	if n := <-left; n != 0 {
		t.Errorf("drain left %d circuits, want 0, because the only one was closed", n)
	}
}

// An office, a dormitory or a mobile carrier has one IPv4 address. With the libraries'
// defaults, 8 of 20 clients behind one address got in.
func TestFortyClientsBehindOneAddress(t *testing.T) {
	lim := newLimits(0, 256)
	lim.testOnlyLimitLoopback = true // so that 127.0.0.1 is treated like any other address
	r := newTestRelayWithin(t, lim, defaultConfig(t), newTestKey(t))
	clients := make([]host.Host, 40)
	joined := make(chan error)
	for i := range clients {
		clients[i] = newClient(t)
		go func() {
			err := clients[i].Connect(testContext(t), r.info)
			if err == nil {
				_, err = circuitclient.Reserve(testContext(t), clients[i], r.info)
			}
			joined <- err
		}()
	}
	for range clients {
		if err := <-joined; err != nil {
			t.Errorf("join and reserve: %v", err)
		}
	}
}

// At a limit newcomers are refused, and clients that are connected are served as before.
func TestNewcomerIsRefusedAtTheLimit(t *testing.T) {
	tests := []struct {
		name string
		lim  limits
		want int
	}{
		{"all networks", limits{clients: 5, perNetwork: 256}, 5},
		{"one network", limits{clients: 100, perNetwork: 3, testOnlyLimitLoopback: true}, 3},
		{"loopback is exempt", limits{clients: 100, perNetwork: 3}, 12},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newTestRelayWithin(t, tt.lim, defaultConfig(t), newTestKey(t))
			in := admits(t, r, 12)
			if len(in) != tt.want {
				t.Errorf("%d clients got in, want %d", len(in), tt.want)
			}
			for _, c := range in {
				ask(t, c, r, kadpb.NewMessage(kadpb.Message_PING, nil, 0))
				if _, err := circuitclient.Reserve(testContext(t), c, r.info); err != nil {
					t.Errorf("reserve at the limit: %v", err)
				}
			}
		})
	}
}

// A client that is told of IPv6 tries it, so it is listed only where there is any.
func TestIPv6IsListedOnlyWhereThereIsSome(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	r.reach.close() // so that nobody looks at the real interfaces meanwhile
	for _, tt := range []struct {
		own  string
		want bool
	}{{"/ip4/127.0.0.1 /ip6/::1", true}, {"/ip4/127.0.0.1 /ip4/203.0.113.7", false}, {"/ip4/127.0.0.1 /ip6/2001:db8::7", true}} {
		var own []ma.Multiaddr
		for s := range strings.FieldsSeq(tt.own) {
			own = append(own, ma.StringCast(s))
		}
		r.reach.own.Store(&own)
		listed := r.listedAddrs()
		bound := strings.Contains(strings.Join(r.socketAddrs(), " "), "/ip6/::/")
		if got := slices.ContainsFunc(listed, func(s string) bool { return strings.HasPrefix(s, "/ip6/::/") }); got != (tt.want && bound) {
			t.Errorf("with the addresses %s, %q are listed, want IPv6 among them: %v", tt.own, listed, tt.want)
		}
	}
}
