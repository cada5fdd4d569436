package main

// The bridge: that clients meet over it who could not otherwise, and that nobody
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

// bridgeClient is a device that speaks QUIC and identify alone, connected to r, with
// a record of the group.
func bridgeClient(t testing.TB, r testRelay, key []byte, opts ...libp2p.Option) host.Host {
	t.Helper()
	h := newClient(t, opts...)
	joinGroup(t, h, r, key)
	return h
}

func joinGroup(t testing.TB, h host.Host, r testRelay, key []byte) {
	t.Helper()
	connect(t, h, r)
	eventually(t, "it is identified", func() bool {
		conns := r.host.Network().ConnsToPeer(h.ID())
		return len(conns) == 1 && r.peers.reachedAt(conns[0]) != nil
	})
	if err := put(t, h, r, rustRecord(key, "{}", h.ID(), 60)); err != nil {
		t.Fatal(err)
	}
}

// bridgeTo asks for the record and returns under which address of the relay mate may
// be dialled, or nil.
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

// bridged connects a with b over the bridge alone.
func bridged(t testing.TB, r testRelay, key []byte, a, b host.Host) network.Conn {
	t.Helper()
	at := bridgeTo(t, a, r, key, b.ID())
	if at == nil {
		t.Fatal("the mate is not named with the bridge's address")
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

// syncBetween sends so many random bytes each way at once, and compares them.
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
		return fmt.Errorf("what arrived is not what was sent")
	}
	return nil
}

// The reason for all of it: two devices that have no other way to each other sync,
// both ways, with large messages, whoever dialled.
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
				t.Errorf("counters = %+v, want one bridge, and what it carried", c)
			}
		})
	}
}

// A group of several: all pairs meet, one after another, and stay connected.
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
				t.Fatal("no mate is named with the bridge's address")
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

// A device with IPv6 alone meets one with IPv4 alone.
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

// Nobody is sent anything over the bridge but by members of its own group, and these
// only where they need it.
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
	waitFound(t, stranger, r, victim.ID()) // which tells where it is, and opens nothing
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
		t.Errorf("%v has dialled the victim", c.RemoteMultiaddr())
	default:
	}

	// Two that punch holes are left to do so.
	punching := func() host.Host {
		h := newClient(t)
		h.SetStreamHandler(holepunch.Protocol, func(s network.Stream) { s.Reset() })
		joinGroup(t, h, r, key)
		return h
	}
	first, second := punching(), punching()
	if at := bridgeTo(t, first, r, key, second.ID()); at != nil {
		t.Errorf("two that punch holes are told of the bridge, %v", at)
	}
	if at := bridgeTo(t, first, r, key, victim.ID()); at == nil {
		t.Error("one that punches holes is not told of the bridge to one that does not")
	}
	if r.bridge.flows != 0 {
		t.Errorf("%d flows, want none", r.bridge.flows)
	}
}

// Who does not say where it reaches the relay is told of no bridge, and who has not
// said it yet is waited for.
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
		t.Errorf("the mate is named with %v, want where it is, and not the bridge's address", got)
	}
	for range 20 {
		who := newLightIdentity(t)
		who.sees = ma.StringCast("/ip4/203.0.113.7/udp/14001/quic-v1") // through a port that is forwarded
		asker := newCrowdOn(t, 1).join(t, r, who)                      // and asks before it can have been identified
		if got := asker.mustAsk(t, getMessage(key))[other.id]; len(got) < 2 || !got[len(got)-1].Equal(who.sees) {
			t.Fatalf("the mate is named with %v, want the bridge's address last", got)
		}
	}
}

// What a client says of where it reaches the relay is told to itself alone, and only
// if it can be dialled.
func TestReachedAddr(t *testing.T) {
	id := newTestPeerID(t)
	for said, want := range map[string]bool{
		"/ip4/203.0.113.7/udp/4001/quic-v1":                                     true,
		"/ip6/2001:db8::7/udp/4001/quic-v1":                                     true,
		"/ip4/192.168.1.7/udp/14001/quic-v1/p2p/" + id.String():                 true,
		"/ip6/64:ff9b::203.0.113.7/udp/4001/quic-v1":                            true, // through NAT64
		"/ip4/127.0.0.1/udp/4001/quic-v1":                                       false,
		"/ip4/0.0.0.0/udp/4001/quic-v1":                                         false,
		"/ip4/224.0.0.1/udp/4001/quic-v1":                                       false,
		"/ip4/203.0.113.7/udp/0/quic-v1":                                        false,
		"/ip4/203.0.113.7/tcp/4001":                                             false,
		"/ip4/203.0.113.7/udp/4001":                                             false,
		"/dns4/relay.example/udp/4001/quic-v1":                                  false,
		"/ip4/203.0.113.7/udp/4001/quic-v1/p2p/" + id.String() + "/p2p-circuit": false,
	} {
		got := reachedAddr(ma.StringCast(said), ma.StringCast("/ip4/198.51.100.1/udp/9/quic-v1"))
		if (got != nil) != want || want && len(got) != 3 {
			t.Errorf("reachedAddr(%s) = %v, want one: %v", said, got, want)
		}
	}
	if got := reachedAddr(nil, nil); got != nil {
		t.Errorf("reachedAddr(nil) = %v", got)
	}
	if got := reachedAddr(ma.StringCast("/ip4/127.0.0.1/udp/4001/quic-v1"), ma.StringCast("/ip4/127.0.0.1/udp/9/quic-v1")); got == nil {
		t.Error("loopback is not told over loopback")
	}
}

// A mate that does not answer costs a few datagrams, and so does one that nobody
// speaks for: packets under its address, but not from it.
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
	from := pair[0] // and the other listens on nothing
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
	eventually(t, "it is sent on", func() bool { return r.counters().bridgedBytes > 0 })
	eventually(t, "no more is", func() bool {
		send()
		return r.counters().refused[refusedBridgeUnanswered] > 100
	})
	r.bridge.sweep(r.bridge.clock() + unansweredTime)
	r.bridge.lock()
	if r.bridge.flows != 0 {
		t.Error("the dial is not let go")
	}
	r.bridge.unlock()
	if sent := r.counters().bridgedBytes; sent > unansweredDatagrams*maxDatagram {
		t.Errorf("%d bytes went to a mate that never answered", sent)
	}
	// From other addresses nothing comes of it.
	forger := newCrowdOn(t, 1).transport()
	from.mustAsk(t, getMessage(key))
	before := r.counters().bridgedBytes
	for range 100 {
		if _, err := forger.WriteTo(first, at); err != nil {
			t.Fatal(err)
		}
	}
	for _, who := range pair {
		who.mustAsk(t, kadpb.NewMessage(kadpb.Message_PING, nil, 0)) // both are served on
	}
	if sent := r.counters().bridgedBytes; sent != before {
		t.Errorf("%d bytes went to a mate that a forged address asked for", sent-before)
	}
}

// What a client carried ends with it, and the relay is as it was.
func TestBridgeEndsWithItsClients(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	key := newGroupKey()
	a, b := bridgeClient(t, r, key), bridgeClient(t, r, key)
	bridged(t, r, key, a, b)
	if n := r.counters().bridges; n != 1 {
		t.Fatalf("%d bridges, want 1", n)
	}
	b.Close()
	later := r.bridge.clock()
	eventually(t, "the bridge is closed", func() bool {
		later += flowAbsent
		r.bridge.sweep(later)
		return r.counters().bridges == 0
	})
	a.Close()
	eventually(t, "nothing is left", func() bool {
		later += groupAge
		r.bridge.sweep(later)
		r.bridge.lock()
		defer r.bridge.unlock()
		return len(r.bridge.clients) == 0 && r.bridge.flows == 0
	})
	eventually(t, "no group is left", func() bool {
		r.groups.mu.Lock()
		defer r.groups.mu.Unlock()
		return len(r.groups.members) == 0 && len(r.groups.keys) == 0
	})
}

// A group is bounded, and so is in how many one can be.
func TestGroupsAreBounded(t *testing.T) {
	var g groups
	now := time.Now()
	for i := range 100 {
		g.put("key", peer.ID(fmt.Sprint(i)), now.Add(time.Duration(i)))
	}
	mates := g.mates("key", "99", now)
	if len(mates) != groupMembers-1 || mates[0] != "98" {
		t.Errorf("mates = %v, want the last %d, the last one first", mates, groupMembers-1)
	}
	if got := g.mates("key", "", now.Add(groupAge+time.Second)); got != nil {
		t.Errorf("mates = %v, who have not put it lately", got)
	}
	for i := range 100 {
		g.put(fmt.Sprint("key", i), "one", now)
	}
	if n := len(g.keys["one"]); n != groupsPerClient {
		t.Errorf("one is in %d groups, want %d", n, groupsPerClient)
	}
	for i := range 100 {
		g.leave(peer.ID(fmt.Sprint(i)))
	}
	g.leave("one")
	if len(g.members) != 0 || len(g.keys) != 0 {
		t.Errorf("left: %v, %v", g.members, g.keys)
	}
}
