package main

// Who is connected, and what others are told about them.

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/proto"
)

// A client that serves no DHT, or is still being identified, can be found too.
func TestAnyConnectedPeerIsFoundByItsID(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	seeker, plain := newClient(t), newClient(t)
	connect(t, seeker, r)
	connect(t, plain, r)
	addrs := waitFound(t, seeker, r, plain.ID())
	if want := observed(t, plain, r); !addrs[0].Equal(want) {
		t.Errorf("answer = %v, want the observed address %v first", addrs, want)
	}
}

// Two devices in one home reach each other only by their LAN addresses, which
// go-libp2p's identify drops. And nobody can make answers too long.
func TestReportedAddrsAreHandedOutWithinBounds(t *testing.T) {
	tests := []struct {
		name     string
		reported int
	}{{"none", 0}, {"a few", 3}, {"hundreds", 300}}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := newTestRelay(t, defaultConfig(t))
			reported := make([]ma.Multiaddr, tt.reported)
			for i := range reported {
				reported[i] = ma.StringCast(fmt.Sprintf("/ip4/192.168.%d.%d/udp/4001/quic-v1", i/250, i%250+1))
			}
			seeker := newClient(t)
			c := newClient(t, libp2p.AddrsFactory(func([]ma.Multiaddr) []ma.Multiaddr { return reported }))
			connect(t, seeker, r)
			connect(t, c, r)
			want := min(tt.reported+1, maxAddrsPerPeer)
			var addrs []ma.Multiaddr
			eventually(t, fmt.Sprintf("%d addresses are named", want), func() bool {
				addrs, _ = findNode(t, seeker, r, c.ID())
				return len(addrs) >= want
			})
			if len(addrs) != want || !addrs[0].Equal(observed(t, c, r)) {
				t.Errorf("answer = %v, want %d with the observed one first", addrs, want)
			}
		})
	}
}

// A device that stays, and whose other connections end, leaves nothing of those behind: each
// would hold all that it had not read yet.
func TestClosedConnectionsAreForgotten(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c, who := newCrowd(t, 3), newLightIdentity(t)
	known := func(want int) func() bool {
		return func() bool {
			r.peers.mu.Lock()
			defer r.peers.mu.Unlock()
			return len(r.peers.identified[who.id].reachedAt) == want
		}
	}
	var conns []*lightClient
	for range 3 {
		conn, err := c.dial(testContext(t), who, r.info)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	eventually(t, "the relay knows three connections", known(3))
	for _, conn := range conns[1:] {
		conn.CloseWithError(0, "")
	}
	eventually(t, "the relay knows one connection", known(1))
}

// Whoever says that he speaks a thousand protocols takes no more memory than others:
// of what identify tells, the relay keeps what it uses.
func TestIdentifyLeavesNoStringsBehind(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	c := newClient(t, libp2p.UserAgent(strings.Repeat("agent", 400)), libp2p.ProtocolVersion(strings.Repeat("version", 100)))
	serveKad(t, c)
	for i := range 20 { // more do not fit into one message with the rest
		c.SetStreamHandler(protocol.ID(fmt.Sprint("/", i, strings.Repeat("/long", 20))), func(s network.Stream) { s.Reset() })
	}
	connect(t, c, r)
	eventually(t, "the client is identified", func() bool {
		said, err := r.host.Peerstore().GetProtocols(c.ID())
		return err == nil && slices.Contains(said, kadProtocol)
	})
	said, _ := r.host.Peerstore().GetProtocols(c.ID())
	for _, p := range said {
		if !slices.Contains(usedProtocols, p) {
			t.Errorf("kept %q, want nothing but %v", p, usedProtocols)
		}
	}
	for _, key := range []string{"AgentVersion", "ProtocolVersion"} {
		if got, err := r.host.Peerstore().Get(c.ID(), key); err == nil {
			t.Errorf("kept %s of %d bytes, want none", key, len(fmt.Sprint(got)))
		}
	}
}

// What a client says about other peers, in its answers or in its requests, is hearsay.
// The relay must not repeat it.
func TestNobodyCanNameAnAddressForAnother(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	liar, seeker, victim := newClient(t), newClient(t), newClient(t)
	serveKad(t, victim)
	connect(t, seeker, r)
	connect(t, victim, r)
	honest := waitFound(t, seeker, r, victim.ID())

	evil := ma.StringCast("/ip4/203.0.113.66/udp/6666/quic-v1")
	absent := newTestPeerID(t)
	lies := []*kadpb.Message_Peer{
		{Id: []byte(victim.ID()), Addrs: [][]byte{evil.Bytes()}},
		{Id: []byte(absent), Addrs: [][]byte{evil.Bytes()}},
	}
	// The liar answers every DHT request with lies, and sends them in its own requests.
	liar.SetStreamHandler(kadProtocol, func(s network.Stream) {
		defer s.Close()
		answer, _ := proto.Marshal(&kadpb.Message{Type: kadpb.Message_FIND_NODE, CloserPeers: lies})
		s.Write(append([]byte{byte(len(answer))}, answer...))
	})
	connect(t, liar, r)
	waitFound(t, seeker, r, liar.ID())
	for typ := range kadpb.Message_MessageType_name {
		req := &kadpb.Message{Type: kadpb.Message_MessageType(typ), Key: []byte(victim.ID()), CloserPeers: lies, ProviderPeers: lies}
		tryAsk(testContext(t), liar, r, req) // some of these are refused
	}

	addrs, _ := findNode(t, seeker, r, victim.ID())
	if !slices.EqualFunc(addrs, honest, ma.Multiaddr.Equal) {
		t.Errorf("the victim's addresses are now %v, were %v", addrs, honest)
	}
	if addrs, found := findNode(t, seeker, r, absent); found {
		t.Errorf("a peer that has never been here is named with %v", addrs)
	}
}

// A device that was switched off must not make its mates dial for ten seconds.
func TestLeaverIsNotNamed(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	seeker, leaver := newClient(t), newClient(t)
	serveKad(t, leaver)
	connect(t, seeker, r)
	connect(t, leaver, r)
	waitFound(t, seeker, r, leaver.ID())

	leaver.Close()
	eventually(t, "the leaver is no longer named", func() bool {
		_, found := findNode(t, seeker, r, leaver.ID())
		return !found
	})
	eventually(t, "what the leaver reported is forgotten", func() bool {
		r.peers.mu.Lock()
		defer r.peers.mu.Unlock()
		_, kept := r.peers.identified[leaver.ID()]
		return !kept
	})
}
