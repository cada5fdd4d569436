package main

// Whom answers name: whether devices meet in a network of any size, and whether
// anybody can bend that.

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"slices"
	"testing"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/transport/quicreuse"
	ma "github.com/multiformats/go-multiaddr"
	quicgo "github.com/quic-go/quic-go"
)

// joinCrowd connects clients to r and waits until all have been identified.
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

func (c *crowd) join(t testing.TB, r testRelay, who lightIdentity) *lightClient {
	t.Helper()
	client, err := c.dial(testContext(t), who, r.info)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// knows reports whether id is connected and has been identified.
func (r testRelay) knows(id peer.ID) bool {
	r.peers.mu.Lock()
	defer r.peers.mu.Unlock()
	_, ok := r.peers.identified[id]
	return ok
}

// mustAsk asks the relay and returns whom the answer names.
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
		t.Errorf("%v: the asker is named", req.Type)
	}
	return named
}

// seenAt is where the relay sees it.
func (c *lightClient) seenAt() ma.Multiaddr {
	addr, err := quicreuse.ToQuicMultiaddr(c.LocalAddr(), quicgo.Version1)
	if err != nil {
		panic(err) // of a connection's own address
	}
	return addr
}

func findMessage(key []byte) *kadpb.Message { return kadpb.NewMessage(kadpb.Message_FIND_NODE, key, 0) }
func getMessage(key []byte) *kadpb.Message  { return kadpb.NewMessage(kadpb.Message_GET_VALUE, key, 0) }

func putMessage(key []byte, publisher peer.ID) *kadpb.Message {
	m := kadpb.NewMessage(kadpb.Message_PUT_VALUE, key, 0)
	m.Record = rustRecord(key, "{}", publisher, 60)
	return m
}

func newGroupKey() []byte {
	hash := make([]byte, 32)
	rand.Read(hash)
	return append([]byte("/privstack/syncgroup/"), hash...)
}

// The user's moment in a network of strangers: who finds a record is told at once
// where its mates are, which no other answer tells. A device whose own record is the
// last one is told, too.
func TestMatesAreNamedAmongStrangers(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := joinCrowd(t, r, 100)
	for i := range 20 {
		first, second, seeker, key := clients[5*i], clients[5*i+1], clients[5*i+2], newGroupKey()
		first.mustAsk(t, putMessage(key, first.id))
		if got := seeker.mustAsk(t, getMessage(key))[first.id]; len(got) == 0 || !got[0].Equal(first.seenAt()) {
			t.Errorf("the mate is named with %v, want %v first", got, first.seenAt())
		}
		second.mustAsk(t, putMessage(key, second.id))
		for asker, mate := range map[*lightClient]*lightClient{first: second, second: first} {
			if got := asker.mustAsk(t, getMessage(key)); len(got) != 1 || len(got[mate.id]) == 0 || !got[mate.id][0].Equal(mate.seenAt()) {
				t.Errorf("named are %v, want the mate alone, with %v first", got, mate.seenAt())
			}
		}
	}
}

// Who asks is told the newest first: one that was killed and is back under another
// ID is dialled before what it was.
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
		t.Errorf("named are %v, want %v", got, want)
	}
}

// Whoever is asked for by its ID comes first, in a network of any size, whether
// strangers can dial it or not.
func TestTargetIsNamedFirst(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	clients := joinCrowd(t, r, 100)
	for _, target := range clients {
		resp, err := clients[0].ask(testContext(t), findMessage([]byte(target.id)))
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.CloserPeers) == 0 || peer.ID(resp.CloserPeers[0].Id) != target.id {
			t.Fatalf("%d are named, and the one asked for is not the first", len(resp.CloserPeers))
		}
		if got := resp.CloserPeers[0].Addresses(); !got[0].Equal(target.seenAt()) || len(got) != 2 {
			t.Errorf("it is named with %v, want where it is seen, and its LAN", got)
		}
	}
}

// A client must not spend its queries on strangers, not fill its table with them
// until it asks the relay no more, and not tell them where it is.
func TestNoStrangersAreNamed(t *testing.T) {
	for _, size := range []int{2, maxNamed, 100} {
		r := newTestRelay(t, defaultConfig(t))
		clients, key := joinCrowd(t, r, size), newGroupKey()
		clients[1].mustAsk(t, putMessage(key, clients[1].id))
		for _, req := range []*kadpb.Message{findMessage([]byte(newTestPeerID(t))), getMessage(newGroupKey()), findMessage(newGroupKey()), findMessage(key)} {
			if named := clients[0].mustAsk(t, req); len(named) > 0 {
				t.Errorf("of %d, %v: %d are named, want none", size, req.Type, len(named))
			}
		}
	}
}

// A record may say that anybody published it, and a client that it listens
// anywhere: nobody can thereby make others dial a third party.
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
				t.Errorf("%v: the liar is named with %v, want where it is seen alone", req.Type, got)
			}
		}
	}

	// A record in another's name points at nobody.
	for _, absent := range []peer.ID{newTestPeerID(t), "", "no peer ID", r.info.ID} {
		key := newGroupKey()
		bad.mustAsk(t, putMessage(key, absent))
		if got, ok := seeker.mustAsk(t, getMessage(key))[absent]; ok {
			t.Errorf("publisher %q is named with %v, and is not here", absent, got)
		}
	}
	// And not at a bystander either: it did not put it.
	key := newGroupKey()
	bad.mustAsk(t, putMessage(key, bystander.id))
	if got := seeker.mustAsk(t, getMessage(key)); len(got) != 1 || len(got[bad.id]) == 0 {
		t.Errorf("named are %v, want who put the record alone", got)
	}
}

// However many clients say so, who has left is named to nobody.
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

// What an answer costs, beside kad-dht's own.
func BenchmarkAnswer(b *testing.B) {
	r := newTestRelay(b, defaultConfig(b))
	clients := joinCrowd(b, r, 1000)
	key := newGroupKey()
	clients[0].mustAsk(b, putMessage(key, clients[0].id))
	for _, plain := range []bool{false, true} {
		r.answers.plain = plain
		b.Run(fmt.Sprintf("plain=%v", plain), func(b *testing.B) {
			for b.Loop() {
				if _, err := clients[1].ask(testContext(b), getMessage(key)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
