package main

// Tests of devices that come back.

import (
	"testing"
)

// A phone on a train loses its network again and again without a goodbye, and each
// time comes back as the same device. Its dead connections must not shut it out, and
// nobody else's connections may be closed.
func TestNewestConnectionOfADeviceWins(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	ctx := testContext(t)
	c := newCrowd(t, 4*connsPerPeer)
	other, err := c.dial(ctx, newLightIdentity(t), r.info)
	if err != nil {
		t.Fatal(err)
	}
	who := newLightIdentity(t)
	var conns []*lightClient
	for i := range 3 * connsPerPeer {
		conn, err := c.dial(ctx, who, r.info)
		if err != nil {
			t.Fatalf("connection %d of one device: %v", i+1, err)
		}
		// The relay serves it, so the swarm knows it.
		if err := conn.reserve(ctx); err != nil {
			t.Fatalf("connection %d of one device: reserve: %v", i+1, err)
		}
		conns = append(conns, conn)
	}
	for i, conn := range conns {
		if i < len(conns)-connsPerPeer {
			select {
			case <-conn.Context().Done():
			case <-ctx.Done():
				t.Fatalf("connection %d of %d is still open, want the oldest closed", i+1, len(conns))
			}
			continue
		}
		if err := conn.reserve(ctx); err != nil {
			t.Errorf("connection %d of %d is not served: %v", i+1, len(conns), err)
		}
	}
	if err := other.reserve(ctx); err != nil {
		t.Errorf("another device lost its connection: %v", err)
	}
	if n := len(r.host.Network().ConnsToPeer(who.id)); n != connsPerPeer {
		t.Errorf("%d connections of one device, want %d", n, connsPerPeer)
	}
	eventually(t, "closed connections no longer count", func() bool {
		return r.counters().connections == connsPerPeer+1
	})
	if n := r.tally.refused[refusedConnection].Load(); n != 0 {
		t.Errorf("%d connections of one client are counted as refused, want 0", n)
	}
}
