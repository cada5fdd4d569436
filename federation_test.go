package main

// More than one relay: whether their clients meet, and whether they still do when one
// relay is gone.

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
)

func (r testRelay) bootstrapFlag() string {
	return fmt.Sprintf("--bootstrap=%s/p2p/%s", r.info.Addrs[0], r.info.ID)
}

// newRing starts n relays. Each names the next, and the last names the first.
func newRing(t testing.TB, n int) []testRelay {
	t.Helper()
	first := newTestKey(t)
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	ring := make([]testRelay, n)
	next := fmt.Sprintf("--bootstrap=/ip4/127.0.0.1/udp/%d/quic-v1/p2p/%s", port, peerIDOf(t, first))
	for i := n - 1; i > 0; i-- {
		ring[i] = newTestRelay(t, defaultConfig(t, next))
		next = ring[i].bootstrapFlag()
	}
	cfg := defaultConfig(t, next)
	cfg.port = port
	ring[0] = newTestRelayWithin(t, newLimits(0, 256), cfg, first)
	for i, r := range ring {
		r.waitConnected(t, ring[(i+1)%n].info.ID)
	}
	return ring
}

func (r testRelay) waitConnected(t testing.TB, id peer.ID) {
	t.Helper()
	eventually(t, "the other relay is connected", func() bool {
		return r.federation.get(id) != nil && r.host.Network().Connectedness(id) == network.Connected
	})
}

// walker is a client that also asks the peers that answers name, as the deployed
// clients do.
type walker struct {
	lightIdentity
	crowd *crowd
	home  peer.AddrInfo // the relay that it knows

	mu    sync.Mutex
	conns map[peer.ID]*lightClient
}

// walk sends req to the walker's relay and to every relay that an answer names, and
// returns the answers.
func (w *walker) walk(ctx context.Context, req *kadpb.Message, relays []testRelay) (answers []*kadpb.Message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	next, seen := []peer.AddrInfo{w.home}, map[peer.ID]bool{}
	for ; len(next) > 0; next = next[1:] {
		info := next[0]
		// Other clients share their sockets, so they cannot be dialled.
		if seen[info.ID] || !slices.ContainsFunc(relays, func(r testRelay) bool { return r.info.ID == info.ID }) {
			continue
		}
		seen[info.ID] = true
		c := w.conns[info.ID]
		if c == nil || c.Context().Err() != nil {
			var err error
			if c, err = w.crowd.dial(ctx, w.lightIdentity, info); err != nil {
				continue
			}
			w.conns[info.ID] = c
		}
		resp, err := c.ask(ctx, req)
		if err != nil {
			continue
		}
		answers = append(answers, resp)
		for _, p := range resp.CloserPeers {
			next = append(next, kadpb.PBPeerToPeerInfo(p))
		}
	}
	return answers
}

// publish stores a record wherever a walk to the key arrives.
func (w *walker) publish(ctx context.Context, key []byte, relays []testRelay) {
	w.walk(ctx, findMessage(key), relays)
	put := putMessage(key, w.id)
	for _, c := range w.conns {
		c.ask(ctx, put)
	}
}

// finds reports whether a walk finds mate's record, and an address at which a relay
// sees mate.
func (w *walker) finds(ctx context.Context, key []byte, mate *walker, relays []testRelay) bool {
	answers := w.walk(ctx, getMessage(key), relays)
	record := slices.ContainsFunc(answers, func(m *kadpb.Message) bool {
		extras, err := readExtras(m.GetRecord())
		return err == nil && extras.publisher == mate.id
	})
	return record && slices.ContainsFunc(answers, func(m *kadpb.Message) bool {
		return slices.ContainsFunc(m.CloserPeers, func(p *kadpb.Message_Peer) bool {
			return peer.ID(p.Id) == mate.id && slices.ContainsFunc(relays, func(r testRelay) bool {
				return slices.ContainsFunc(r.host.Network().ConnsToPeer(mate.id), func(c network.Conn) bool {
					return slices.ContainsFunc(p.Addresses(), c.RemoteMultiaddr().Equal)
				})
			})
		})
	})
}

// Users who list different relays meet, and still do when one relay is gone for good.
func TestClientsOfDifferentRelaysMeet(t *testing.T) {
	ring := newRing(t, 3)
	const clients = 300
	c := newCrowd(t, clients)
	all := make([]*walker, clients)
	keys := make([][]byte, clients/2)
	for i := range all {
		all[i] = &walker{lightIdentity: newLightIdentity(t), crowd: c, home: ring[i%3].info, conns: map[peer.ID]*lightClient{}}
	}
	ctx := testContext(t)
	var publishing sync.WaitGroup
	for i := range keys {
		keys[i] = newGroupKey()
		publishing.Go(func() { all[i].publish(ctx, keys[i], ring) })
	}
	publishing.Wait()
	// missing counts the groups whose second member does not find the first. The
	// members are clients of different relays, in every combination.
	missing := func(relays []testRelay) (n int) {
		for i, key := range keys {
			mate := all[clients-1-i] // a client of relay (2-i)%3, where the first is one of i%3
			if !mate.finds(testContext(t), key, all[i], relays) {
				n++
			}
		}
		return n
	}
	if n := missing(ring); n > 0 {
		t.Errorf("%d of %d groups do not meet", n, len(keys))
	}

	gone := ring[2]
	if err := gone.close(); err != nil {
		t.Fatal(err)
	}
	for _, w := range all {
		if w.home.ID == gone.info.ID { // these clients list a second relay
			w.home = ring[0].info
		}
	}
	if n := missing(ring[:2]); n > 0 {
		t.Errorf("one relay is gone: %d of %d groups do not meet", n, len(keys))
	}
}

// Relays find each other whichever starts first, and again after they have lost each
// other.
func TestRelaysFindOneAnotherAgain(t *testing.T) {
	key := newTestKey(t)
	cfg := defaultConfig(t)
	var err error
	if cfg.port, err = freePort(); err != nil {
		t.Fatal(err)
	}
	id := peerIDOf(t, key)
	here := newTestRelay(t, defaultConfig(t, fmt.Sprintf("--bootstrap=/ip4/127.0.0.1/udp/%d/quic-v1/p2p/%s", cfg.port, id)))
	seeker := newCrowd(t, 1).join(t, here, newLightIdentity(t))
	if named := seeker.mustAsk(t, findMessage(newGroupKey())); len(named) > 0 {
		t.Errorf("%v is named although the other relay is down", named)
	}
	for _, lost := range []bool{true, false} {
		there := newTestRelayWithin(t, newLimits(0, 256), cfg, key)
		here.waitConnected(t, there.info.ID)
		if lost {
			if err := here.host.Network().ClosePeer(there.info.ID); err != nil {
				t.Fatal(err)
			}
			here.waitConnected(t, there.info.ID)
		}
		if named := seeker.mustAsk(t, findMessage(newGroupKey())); len(named) != 1 {
			t.Errorf("%v is named, want the other relay", named)
		}
		if err := there.close(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "its absence is noticed", func() bool { return here.host.Network().Connectedness(there.info.ID) != network.Connected })
	}
}

// The relay dials what the operator wrote: a name has to be looked up each time, but
// the swarm replaces it in the list that it is given.
func TestBootstrapAddressesStayAsWritten(t *testing.T) {
	there := newTestRelay(t, defaultConfig(t))
	port := listenPort(there.relay)
	var flags []string
	for _, addr := range []string{"/dns4/localhost/udp/", "/ip4/127.0.0.1/udp/", "/dns/localhost/udp/"} {
		flags = append(flags, fmt.Sprintf("--bootstrap=%s%s/quic-v1/p2p/%s", addr, port, there.info.ID))
	}
	here := newTestRelay(t, defaultConfig(t, flags...))
	here.waitConnected(t, there.info.ID)
	for i, addr := range strs(here.federation.get(there.info.ID).addrs) {
		if got := fmt.Sprintf("--bootstrap=%s/p2p/%s", addr, there.info.ID); got != flags[i] {
			t.Errorf("the operator wrote %s, the relay keeps %s", flags[i], got)
		}
	}
}

// A relay that names others dials only those.
func TestRelayDialsOtherRelaysAlone(t *testing.T) {
	there := newTestRelay(t, defaultConfig(t))
	here := newTestRelay(t, defaultConfig(t, there.bootstrapFlag()))
	here.waitConnected(t, there.info.ID)
	victim := newClient(t)
	here.host.Peerstore().AddAddrs(victim.ID(), victim.Addrs(), peerstore.PermanentAddrTTL)
	if err := here.host.Connect(testContext(t), peer.AddrInfo{ID: victim.ID(), Addrs: victim.Addrs()}); err == nil {
		t.Error("the relay dialled a client")
	}
	own := newTestKey(t)
	flag := fmt.Sprintf("--bootstrap=/ip4/127.0.0.1/udp/1/quic-v1/p2p/%s", peerIDOf(t, own))
	if _, err := startRelay(defaultConfig(t, flag), own, nil); err == nil {
		t.Error("a relay was allowed to name itself")
	}
}

// A relay whose name has an address that does not answer is the everyday case, such
// as an IPv6 address behind a firewall. Its other address must be tried meanwhile.
func TestSilentAddressDoesNotKeepARelayAway(t *testing.T) {
	silent, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	there := newTestRelay(t, defaultConfig(t))
	here := newTestRelay(t, defaultConfig(t,
		fmt.Sprintf("--bootstrap=/ip4/127.0.0.1/udp/%d/quic-v1/p2p/%s", silent.LocalAddr().(*net.UDPAddr).Port, there.info.ID),
		there.bootstrapFlag()))
	here.waitConnected(t, there.info.ID)
}
