package main

// Whom answers name: whether devices meet in a network of any size, and whether
// anyone can prevent it.

import (
	"testing"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// The user's moment in a network of strangers: a device that finds a record learns at
// once where its publisher is. No other answer tells it.
func TestPublisherIsNamedAmongStrangers(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := joinCrowd(t, r, 100)
	for i := range 20 {
		publisher, seeker, key := clients[5*i], clients[5*i+1], newGroupKey()
		publisher.mustAsk(t, putMessage(key, publisher.id))
		if got := seeker.mustAsk(t, getMessage(key))[publisher.id]; len(got) == 0 || !got[0].Equal(publisher.seenAt()) {
			t.Errorf("the publisher is named with %v, want %v first", got, publisher.seenAt())
		}
		publisher.mustAsk(t, getMessage(key)) // which must not name the publisher to itself
	}
}

// A peer that is asked for by its ID is named first, in a network of any size and
// whether strangers can dial it or not.
func TestTargetIsNamedFirst(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := joinCrowd(t, r, 100)
	for _, target := range clients {
		resp, err := clients[0].ask(testContext(t), findMessage([]byte(target.id)))
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.CloserPeers) == 0 || peer.ID(resp.CloserPeers[0].Id) != target.id {
			t.Fatalf("%d peers are named, and the one asked for is not the first", len(resp.CloserPeers))
		}
		if got := resp.CloserPeers[0].Addresses(); !got[0].Equal(target.seenAt()) || len(got) != 2 {
			t.Errorf("it is named with %v, want the address at which it is seen, and its LAN address", got)
		}
	}
}

// One household, or a few: everyone is named, so that two devices whose dials have to
// cross learn of each other.
func TestSmallNetworkNamesEverybody(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := joinCrowd(t, r, maxNamed)
	asker, key := clients[0], newGroupKey()
	for _, req := range []*kadpb.Message{findMessage([]byte(newTestPeerID(t))), getMessage(key)} {
		if named := asker.mustAsk(t, req); len(named) != maxNamed-1 {
			t.Errorf("%v: %d peers are named, want all %d others", req.Type, len(named), maxNamed-1)
		}
	}
	// The walk before a PUT would wait for every peer that is named.
	if named := asker.mustAsk(t, findMessage(key)); len(named) > 0 {
		t.Errorf("before a PUT %d peers are named, want none", len(named))
	}
}

// In a large network a client must not spend its queries on strangers, nor fill its
// routing table with them until it stops asking the relay.
func TestLargeNetworkNamesNoStrangers(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := joinCrowd(t, r, 100)
	for _, req := range []*kadpb.Message{findMessage([]byte(newTestPeerID(t))), getMessage(newGroupKey()), findMessage(newGroupKey())} {
		if named := clients[0].mustAsk(t, req); len(named) > 0 {
			t.Errorf("%v: %d peers are named, want none", req.Type, len(named))
		}
	}
}

// A record can claim any publisher, and a client can claim any address. Neither makes
// others dial a third party.
func TestNobodyIsPointedAtAThirdParty(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	crowd := newCrowd(t, 3)
	victim := ma.StringCast("/ip4/203.0.113.66/udp/6666/quic-v1")
	liar := newLightIdentity(t)
	liar.listen = []ma.Multiaddr{victim, ma.StringCast("/dns4/victim.example/udp/6666/quic-v1")}
	bad, bystander, seeker := crowd.join(t, r, liar), crowd.join(t, r, newLightIdentity(t)), crowd.join(t, r, newLightIdentity(t))
	eventually(t, "all are identified", func() bool { return r.knows(bad.id) && r.knows(bystander.id) && r.knows(seeker.id) })

	own := newGroupKey()
	bad.mustAsk(t, putMessage(own, bad.id))
	for _, req := range []*kadpb.Message{getMessage(own), findMessage(own), findMessage([]byte(newTestPeerID(t)))} {
		for _, got := range seeker.mustAsk(t, req)[bad.id] {
			if !got.Equal(bad.seenAt()) {
				t.Errorf("%v: the liar is named with %v, want only the address at which it is seen", req.Type, got)
			}
		}
	}

	// A record in another peer's name points at that peer's address, if it is here.
	for _, absent := range []peer.ID{newTestPeerID(t), "", "no peer ID", r.info.ID} {
		key := newGroupKey()
		bad.mustAsk(t, putMessage(key, absent))
		if got, ok := seeker.mustAsk(t, getMessage(key))[absent]; ok {
			t.Errorf("publisher %q is named with %v, but is not connected", absent, got)
		}
	}
	key := newGroupKey()
	bad.mustAsk(t, putMessage(key, bystander.id))
	if got := seeker.mustAsk(t, getMessage(key))[bystander.id]; len(got) == 0 || !got[0].Equal(bystander.seenAt()) {
		t.Errorf("the bystander is named with %v, want the address at which it is seen", got)
	}
}

// A client that has left is named to nobody, however many were here.
func TestLeaversAreNamedToNobody(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := joinCrowd(t, r, 60)
	key := newGroupKey()
	clients[1].mustAsk(t, putMessage(key, clients[1].id))
	for _, c := range clients[1:] {
		c.CloseWithError(0, "")
	}
	eventually(t, "nobody is named", func() bool {
		return len(clients[0].mustAsk(t, getMessage(key))) == 0 && len(clients[0].mustAsk(t, findMessage([]byte(newTestPeerID(t))))) == 0
	})
}

// What an answer costs.
func BenchmarkAnswer(b *testing.B) {
	r := newTestRelay(b, defaultConfig(b))
	clients := joinCrowd(b, r, 1000)
	key := newGroupKey()
	clients[0].mustAsk(b, putMessage(key, clients[0].id))
	for b.Loop() {
		if _, err := clients[1].ask(testContext(b), getMessage(key)); err != nil {
			b.Fatal(err)
		}
	}
}
