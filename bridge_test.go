package main

// The bridge: that clients meet over it who could not otherwise, and that nobody
// can make it do anything else.

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"
	"testing"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// bridgeClient is a device that speaks QUIC and identify alone, connected to r, with
// a record of the group.
func bridgeClient(t testing.TB, r testRelay, key []byte) host.Host {
	t.Helper()
	h := newClient(t)
	connect(t, h, r)
	eventually(t, "it is identified", func() bool {
		conns := r.host.Network().ConnsToPeer(h.ID())
		return len(conns) == 1 && r.peers.reachedAt(conns[0]) != nil
	})
	if err := put(t, h, r, rustRecord(key, "{}", h.ID(), 60)); err != nil {
		t.Fatal(err)
	}
	return h
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
