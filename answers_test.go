package main

// Whom answers name: whether devices meet in a network of any size, and whether
// anyone can prevent it.

import (
	"slices"
	"testing"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// The user's moment in a network of strangers: a device that finds a record learns at
// once where the other devices are. No other answer tells it. A device whose own record
// is the last one learns it, too.
func TestMatesAreNamedAmongStrangers(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := joinCrowd(t, r, 100)
	for i := range 20 {
		first, second, seeker, key := clients[5*i], clients[5*i+1], clients[5*i+2], newGroupKey()
		first.mustAsk(t, putMessage(key, first.id))
		if got := seeker.mustAsk(t, getMessage(key))[first.id]; len(got) == 0 || !got[0].Equal(first.seenAt()) {
			t.Errorf("the other device is named with %v, want %v first", got, first.seenAt())
		}
		second.mustAsk(t, putMessage(key, second.id))
		for asker, mate := range map[*lightClient]*lightClient{first: second, second: first} {
			if got := asker.mustAsk(t, getMessage(key)); len(got) != 1 || len(got[mate.id]) == 0 || !got[mate.id][0].Equal(mate.seenAt()) {
				t.Errorf("the answer names %v, want the other device alone, with %v first", got, mate.seenAt())
			}
		}
	}
}

// A device that was killed and is back under a new ID is dialled before its old ID is.
func TestNewestMateIsNamedFirst(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients, key := joinCrowd(t, r, 6), newGroupKey()
	for _, c := range clients {
		c.mustAsk(t, putMessage(key, c.id))
	}
	clients[2].mustAsk(t, putMessage(key, clients[2].id))
	resp, err := clients[0].ask(testContext(t), getMessage(key))
	if err != nil {
		t.Fatal(err)
	}
	var got []peer.ID
	for _, p := range resp.CloserPeers {
		got = append(got, peer.ID(p.Id))
	}
	if want := []peer.ID{clients[2].id, clients[5].id, clients[4].id, clients[3].id, clients[1].id}; !slices.Equal(got, want) {
		t.Errorf("the answer names %v, want %v", got, want)
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

// A client must not spend its queries on strangers, nor fill its routing table with
// them until it stops asking the relay. And a stranger must not learn where it is.
func TestNoStrangersAreNamed(t *testing.T) {
	for _, size := range []int{2, maxNamed, 100} {
		r := newTestRelay(t, defaultConfig(t))
		clients, key := joinCrowd(t, r, size), newGroupKey()
		clients[1].mustAsk(t, putMessage(key, clients[1].id))
		for _, req := range []*kadpb.Message{findMessage([]byte(newTestPeerID(t))), getMessage(newGroupKey()), findMessage(newGroupKey()), findMessage(key)} {
			if named := clients[0].mustAsk(t, req); len(named) > 0 {
				t.Errorf("among %d clients, %v: %d peers are named, want none", size, req.Type, len(named))
			}
		}
	}
}

// A client asks every relay that it has met, every 30 s. So it must be told of those
// alone that keep its group's record, however often it looks for other IDs, as rust-libp2p
// does after each peer that it meets.
func TestOnlyTheRecordsRelaysAreNamed(t *testing.T) {
	p := &party{alive: newRing(t, 5)}
	home := p.alive[0]
	client := newCrowd(t, 1).join(t, home, newLightIdentity(t))
	for range 20 {
		key := newGroupKey()
		want := slices.DeleteFunc(p.closest(key), func(id peer.ID) bool { return id == home.info.ID })
		for _, req := range []*kadpb.Message{getMessage(key), findMessage(key)} {
			named := client.mustAsk(t, req)
			if len(named) != len(want) || slices.ContainsFunc(want, func(id peer.ID) bool { return len(named[id]) == 0 }) {
				t.Errorf("%v: %v are named, want %v", req.Type, named, want)
			}
		}
		for _, other := range []string{string(newTestPeerID(t)), string(client.id), "/pk/x"} {
			named := client.mustAsk(t, findMessage([]byte(other)))
			delete(named, client.id)
			if len(named) > 0 {
				t.Errorf("FIND_NODE of %q: %v are named, want none", other, named)
			}
		}
	}
	if named := client.mustAsk(t, findMessage([]byte(p.alive[1].info.ID))); len(named) != 1 {
		t.Errorf("FIND_NODE of a relay: %v is named, want the relay", named)
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

	// A record in another peer's name points at nobody.
	for _, absent := range []peer.ID{newTestPeerID(t), "", "no peer ID", r.info.ID} {
		key := newGroupKey()
		bad.mustAsk(t, putMessage(key, absent))
		if got, ok := seeker.mustAsk(t, getMessage(key))[absent]; ok {
			t.Errorf("publisher %q is named with %v, but is not connected", absent, got)
		}
	}
	// Not even at a bystander who is here: it did not put the record.
	key := newGroupKey()
	bad.mustAsk(t, putMessage(key, bystander.id))
	if got := seeker.mustAsk(t, getMessage(key)); len(got) != 1 || len(got[bad.id]) == 0 {
		t.Errorf("the answer names %v, want the peer that put the record alone", got)
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
