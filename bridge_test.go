package main

// Tests of the bridge: it connects clients that could not meet otherwise, and nobody
// can make it do anything else.

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// bridgeClient returns a device that speaks only QUIC and identify. It is connected
// to r, and has put a record of the group.
func bridgeClient(t testing.TB, r testRelay, key []byte, opts ...libp2p.Option) host.Host {
	t.Helper()
	h := newClient(t, opts...)
	joinGroup(t, h, r, key)
	return h
}

func joinGroup(t testing.TB, h host.Host, r testRelay, key []byte) {
	t.Helper()
	connect(t, h, r)
	eventually(t, "the relay has identified the client", func() bool {
		conns := r.host.Network().ConnsToPeer(h.ID())
		return len(conns) == 1 && r.peers.reachedAt(conns[0]) != nil
	})
	if err := put(t, h, r, rustRecord(key, "{}", h.ID(), 60)); err != nil {
		t.Fatal(err)
	}
}

// bridgeTo asks for the record, and returns the address of the relay at which h may
// dial mate, or nil.
func bridgeTo(t testing.TB, h host.Host, r testRelay, key []byte, mate peer.ID) ma.Multiaddr {
	t.Helper()
	resp := ask(t, h, r, kadpb.NewMessage(kadpb.Message_GET_VALUE, key, 0))
	for _, p := range resp.CloserPeers {
		if peer.ID(p.Id) == mate {
			addrs := p.Addresses()
			if last := addrs[len(addrs)-1]; last.Equal(r.info.Addrs[0]) {
				return last
			}
		}
	}
	return nil
}

// bridged connects a to b over nothing but the bridge.
func bridged(t testing.TB, r testRelay, key []byte, a, b host.Host) network.Conn {
	t.Helper()
	at := bridgeTo(t, a, r, key, b.ID())
	if at == nil {
		t.Fatal("the answer does not name the mate with the bridge's address")
	}
	if err := a.Connect(testContext(t), peer.AddrInfo{ID: b.ID(), Addrs: []ma.Multiaddr{at}}); err != nil {
		t.Fatal(err)
	}
	conn := a.Network().ConnsToPeer(b.ID())[0]
	if !conn.RemoteMultiaddr().Equal(at) {
		t.Fatalf("connected over %v, want the bridge", conn.RemoteMultiaddr())
	}
	return conn
}

// syncBetween sends size random bytes each way at once, and compares them.
func syncBetween(ctx context.Context, a, b host.Host, size int) error {
	const protocol = "/test/sync"
	exchange := func(s network.Stream) (sent, got [sha256.Size]byte, err error) {
		payload := make([]byte, size)
		rand.Read(payload)
		wrote := make(chan error, 1)
		go func() {
			_, err := s.Write(payload)
			wrote <- err
		}()
		back := make([]byte, size)
		if _, err = io.ReadFull(s, back); err == nil {
			err = <-wrote
		}
		return sha256.Sum256(payload), sha256.Sum256(back), err
	}
	type outcome struct {
		sent, got [sha256.Size]byte
		err       error
	}
	far := make(chan outcome, 1)
	b.SetStreamHandler(protocol, func(s network.Stream) {
		if d, ok := ctx.Deadline(); ok {
			s.SetDeadline(d)
		}
		var o outcome
		if _, o.err = io.ReadFull(s, make([]byte, 1)); o.err == nil {
			o.sent, o.got, o.err = exchange(s)
		}
		far <- o
	})
	s, err := a.NewStream(ctx, b.ID(), protocol)
	if err != nil {
		return err
	}
	defer s.Reset()
	if d, ok := ctx.Deadline(); ok {
		s.SetDeadline(d)
	}
	if _, err := s.Write([]byte{0}); err != nil {
		return err
	}
	sent, got, err := exchange(s)
	if err != nil {
		return err
	}
	o := <-far
	switch {
	case o.err != nil:
		return o.err
	case o.got != sent || o.sent != got:
		return fmt.Errorf("received bytes differ from the bytes sent")
	}
	return nil
}

// The reason for the bridge: two devices that have no other way to each other sync
// large messages, both ways, whoever dialled.
func TestBridgeCarriesSync(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain=%v", plain), func(t *testing.T) {
			cfg := defaultConfig(t)
			cfg.testOnlyPlainSockets = plain
			r := newTestRelay(t, cfg)
			key := newGroupKey()
			a, b := bridgeClient(t, r, key), bridgeClient(t, r, key)
			bridged(t, r, key, a, b)
			for _, pair := range [][2]host.Host{{a, b}, {b, a}} {
				if err := syncBetween(testContext(t), pair[0], pair[1], 16<<20); err != nil {
					t.Fatal(err)
				}
			}
			if c := r.counters(); c.bridges != 1 || c.bridged != 1 || c.relayedConnections != 1 || c.bridgedBytes < 64<<20 || c.relayedBytes != c.bridgedBytes {
				t.Errorf("counters = %+v, want one bridge and the bytes that it carried", c)
			}
		})
	}
}

// All pairs in a group of several meet, one after another, and stay connected.
func TestBridgeJoinsAGroup(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	key := newGroupKey()
	var group []host.Host
	for range 5 {
		group = append(group, bridgeClient(t, r, key))
	}
	for i, a := range group {
		for range group[i+1:] {
			resp := ask(t, a, r, kadpb.NewMessage(kadpb.Message_GET_VALUE, key, 0))
			at := slices.IndexFunc(resp.CloserPeers, func(p *kadpb.Message_Peer) bool {
				addrs := p.Addresses()
				return addrs[len(addrs)-1].Equal(r.info.Addrs[0])
			})
			if at < 0 {
				t.Fatal("the answer names no mate with the bridge's address")
			}
			if err := a.Connect(testContext(t), peer.AddrInfo{ID: peer.ID(resp.CloserPeers[at].Id), Addrs: r.info.Addrs}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i, a := range group {
		for _, b := range group[i+1:] {
			if err := syncBetween(testContext(t), a, b, 1<<20); err != nil {
				t.Errorf("%v", err)
			}
		}
	}
}

// A device that has only IPv6 meets one that has only IPv4.
func TestBridgeBetweenIPv4AndIPv6(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	six := r
	six.info.Addrs = []ma.Multiaddr{ma.StringCast("/ip6/::1/udp/" + listenPort(r.relay) + "/quic-v1")}
	listen := libp2p.ListenAddrStrings("/ip6/::1/udp/0/quic-v1")
	if probe, err := net.ListenPacket("udp6", "[::1]:0"); err != nil {
		t.Skip(err)
	} else {
		probe.Close()
	}
	key := newGroupKey()
	a, b := bridgeClient(t, r, key), bridgeClient(t, six, key, listen)
	bridged(t, r, key, a, b)
	if err := syncBetween(testContext(t), a, b, 4<<20); err != nil {
		t.Fatal(err)
	}
	c := bridgeClient(t, r, key)
	bridged(t, six, key, b, c)
	if err := syncBetween(testContext(t), c, b, 4<<20); err != nil {
		t.Fatal(err)
	}
}

// Only members of a device's own group can send to it over the bridge, and only if
// they need the bridge.
func TestBridgeIsForMatesAlone(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	key := newGroupKey()
	victim := bridgeClient(t, r, key)
	dialled := make(chan network.Conn, 16)
	victim.Network().Notify(&network.NotifyBundle{ConnectedF: func(_ network.Network, c network.Conn) {
		if c.RemotePeer() != r.info.ID {
			dialled <- c
		}
	}})
	reach := func(h host.Host) error {
		ctx, cancel := context.WithTimeout(testContext(t), 2*time.Second)
		defer cancel()
		return h.Connect(ctx, peer.AddrInfo{ID: victim.ID(), Addrs: r.info.Addrs})
	}
	stranger := bridgeClient(t, r, newGroupKey())
	waitFound(t, stranger, r, victim.ID()) // this tells the stranger where the victim is, but opens nothing
	for _, req := range []*kadpb.Message{
		kadpb.NewMessage(kadpb.Message_GET_VALUE, newGroupKey(), 0),
		kadpb.NewMessage(kadpb.Message_FIND_NODE, key, 0),
		kadpb.NewMessage(kadpb.Message_FIND_NODE, []byte(victim.ID()), 0),
	} {
		ask(t, stranger, r, req)
		if err := reach(stranger); err == nil {
			t.Errorf("after %v a stranger reached the victim", req.Type)
		}
	}
	select {
	case c := <-dialled:
		t.Errorf("%v dialled the victim", c.RemoteMultiaddr())
	default:
	}

	// The bridge leaves two devices that punch holes alone.
	punching := func() host.Host {
		h := newClient(t)
		h.SetStreamHandler(holepunch.Protocol, func(s network.Stream) { s.Reset() })
		joinGroup(t, h, r, key)
		return h
	}
	first, second := punching(), punching()
	if at := bridgeTo(t, first, r, key, second.ID()); at != nil {
		t.Errorf("two clients that punch holes got the bridge's address %v", at)
	}
	if at := bridgeTo(t, first, r, key, victim.ID()); at == nil {
		t.Error("a client that punches holes did not get the bridge's address for one that does not")
	}
	if r.bridge.flows != 0 {
		t.Errorf("%d flows, want none", r.bridge.flows)
	}
}

// We offer no bridge to a client that does not say where it reaches the relay. We
// wait for a client that has not said it yet.
func TestBridgeIsToldToThoseWhoSayHowTheyReachIt(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	key, c := newGroupKey(), newCrowdOn(t, 2)
	mute, mate := c.join(t, r, newLightIdentity(t)), newLightIdentity(t)
	mate.sees = r.info.Addrs[0]
	other := c.join(t, r, mate)
	for _, who := range []*lightClient{mute, other} {
		who.mustAsk(t, putMessage(key, who.id))
	}
	if got := mute.mustAsk(t, getMessage(key))[other.id]; len(got) == 0 || slices.ContainsFunc(got, r.info.Addrs[0].Equal) {
		t.Errorf("the answer names the mate with %v, want its own address and not the bridge's", got)
	}
	for range 20 {
		who := newLightIdentity(t)
		who.sees = ma.StringCast("/ip4/203.0.113.7/udp/14001/quic-v1") // through a forwarded port
		asker := newCrowdOn(t, 1).join(t, r, who)                      // and asks before the relay can have identified it
		if got := asker.mustAsk(t, getMessage(key))[other.id]; len(got) < 2 || !got[len(got)-1].Equal(who.sees) {
			t.Fatalf("the answer names the mate with %v, want the bridge's address last", got)
		}
	}
}

// A mate that does not answer costs a few datagrams. So does a forged dial: packets
// that show a client's address but do not come from it.
func TestBridgeToOneThatNeverAnswers(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	key := newGroupKey()
	c := newCrowdOn(t, 2)
	var pair [2]*lightClient
	for i := range pair {
		who := newLightIdentity(t)
		who.sees = r.info.Addrs[0]
		pair[i] = c.join(t, r, who)
		pair[i].mustAsk(t, putMessage(key, who.id))
	}
	from := pair[0] // the other one listens on nothing
	from.mustAsk(t, getMessage(key))
	at, err := manet.ToNetAddr(r.info.Addrs[0].Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		t.Fatal(err)
	}
	first := longPacket(initial, "firstdest", "12345678")
	send := func() {
		if _, err := from.transport.WriteTo(first, at); err != nil {
			t.Fatal(err)
		}
	}
	send()
	eventually(t, "the Initial is forwarded", func() bool { return r.counters().bridgedBytes > 0 })
	eventually(t, "no more Initials are forwarded", func() bool {
		send()
		return r.counters().refused[refusedBridgeUnanswered] > 100
	})
	r.bridge.sweep(r.bridge.clock() + unansweredTime)
	r.bridge.lock()
	if r.bridge.flows != 0 {
		t.Error("the flow of an unanswered dial is still there")
	}
	r.bridge.unlock()
	if sent := r.counters().bridgedBytes; sent > unansweredDatagrams*maxDatagram {
		t.Errorf("%d bytes went to a mate that never answered", sent)
	}
	// Packets from other addresses have no effect.
	forger := newCrowdOn(t, 1).transport()
	from.mustAsk(t, getMessage(key))
	before := r.counters().bridgedBytes
	for range 100 {
		if _, err := forger.WriteTo(first, at); err != nil {
			t.Fatal(err)
		}
	}
	for _, who := range pair {
		who.mustAsk(t, kadpb.NewMessage(kadpb.Message_PING, nil, 0)) // the relay still serves both
	}
	if sent := r.counters().bridgedBytes; sent != before {
		t.Errorf("%d bytes went to a mate after a forged dial", sent-before)
	}
}

// When its clients leave, the bridge between them closes and leaves nothing behind.
func TestBridgeEndsWithItsClients(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	key := newGroupKey()
	a, b := bridgeClient(t, r, key), bridgeClient(t, r, key)
	bridged(t, r, key, a, b)
	// The clients may be connected before the last packet of the handshake is here.
	eventually(t, "a bridge is counted", func() bool { return r.counters().bridges == 1 })
	b.Close()
	later := r.bridge.clock()
	eventually(t, "the bridge is closed", func() bool {
		later += flowAbsent
		r.bridge.sweep(later)
		return r.counters().bridges == 0
	})
	a.Close()
	r.holdsNothing(t)
}
