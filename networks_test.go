package main

// Clients whose address changes while they are connected.

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	identifypb "github.com/libp2p/go-libp2p/p2p/protocol/identify/pb"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"google.golang.org/protobuf/encoding/protodelim"
)

// movingNAT is the NAT of one client. It has one outside address at a time.
type movingNAT struct {
	t       testing.TB
	inside  *net.UDPConn
	relay   *net.UDPAddr
	client  atomic.Pointer[net.UDPAddr]
	outside atomic.Pointer[net.UDPConn]
	running sync.WaitGroup
}

// newMovingNAT returns a NAT before r with the outside address ip, and how a client
// behind it reaches r. It needs a system on which all of 127.0.0.0/8 is loopback.
func newMovingNAT(t testing.TB, r testRelay, ip string) (*movingNAT, testRelay) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("127.0.0.2 is a loopback address on Linux alone")
	}
	relay, err := manet.ToNetAddr(r.info.Addrs[0].Decapsulate(ma.StringCast("/quic-v1")))
	if err != nil {
		t.Fatal(err)
	}
	n := &movingNAT{t: t, relay: relay.(*net.UDPAddr)}
	if n.inside, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	n.move(ip)
	n.running.Go(func() {
		packet := make([]byte, 2048)
		for {
			size, from, err := n.inside.ReadFromUDP(packet)
			if err != nil {
				return
			}
			n.client.Store(from)
			n.outside.Load().WriteTo(packet[:size], n.relay)
		}
	})
	t.Cleanup(func() {
		n.inside.Close()
		n.outside.Load().Close()
		n.running.Wait()
	})
	behind := ma.StringCast("/ip4/127.0.0.1/udp/" + portOf(n.inside) + "/quic-v1")
	return n, testRelay{r.relay, peer.AddrInfo{ID: r.info.ID, Addrs: []ma.Multiaddr{behind}}}
}

func portOf(conn *net.UDPConn) string {
	_, port, _ := net.SplitHostPort(conn.LocalAddr().String())
	return port
}

// move gives the NAT the outside address ip, with another port, and takes its last one.
func (n *movingNAT) move(ip string) {
	n.t.Helper()
	outside, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(ip)})
	if err != nil {
		n.t.Fatal(err)
	}
	if last := n.outside.Swap(outside); last != nil {
		last.Close()
	}
	n.running.Go(func() {
		packet := make([]byte, 2048)
		for {
			size, err := outside.Read(packet)
			if err != nil {
				return
			}
			if client := n.client.Load(); client != nil {
				n.inside.WriteTo(packet[:size], client)
			}
		}
	})
}

// addr is the outside address, as the relay observes it.
func (n *movingNAT) addr() ma.Multiaddr {
	outside := n.outside.Load().LocalAddr().(*net.UDPAddr)
	return ma.StringCast("/ip4/" + outside.IP.String() + "/udp/" + portOf(n.outside.Load()) + "/quic-v1")
}

// toldAddr returns at which address the relay says in identify that it sees h.
func toldAddr(ctx context.Context, h host.Host, r testRelay) (ma.Multiaddr, error) {
	s, err := h.NewStream(ctx, r.info.ID, identify.ID)
	if err != nil {
		return nil, err
	}
	defer s.Reset()
	var said identifypb.Identify
	if err := protodelim.UnmarshalFrom(&byteReader{Reader: s}, &said); err != nil {
		return nil, err
	}
	return ma.NewMultiaddrBytes(said.ObservedAddr)
}

// A home whose address has changed is met at the new one: nobody is told an address
// that it has left, which now is nobody's, or somebody else's.
func TestClientIsFollowedWhereItGoes(t *testing.T) {
	r := newTestRelay(t, defaultConfig(t))
	nat, behind := newMovingNAT(t, r, "127.0.0.2")
	left := ma.StringCast("/ip4/127.0.0.2/udp/4242/quic-v1") // as a router's port mapping may be
	lan := ma.StringCast("/ip4/192.168.1.7/udp/4242/quic-v1")
	mover := newClient(t, libp2p.AddrsFactory(func([]ma.Multiaddr) []ma.Multiaddr { return []ma.Multiaddr{left, lan} }))
	seeker := newClient(t)
	connect(t, seeker, r)
	connect(t, mover, behind)
	conn := r.host.Network().ConnsToPeer(mover.ID())[0]
	eventually(t, "the relay knows what the client says", func() bool { return r.peers.reachedAt(conn) != nil })
	if addrs, want := waitFound(t, seeker, r, mover.ID()), []ma.Multiaddr{nat.addr(), left, lan}; !slices.EqualFunc(addrs, want, ma.Multiaddr.Equal) {
		t.Fatalf("at first others are told %v, want %v", addrs, want)
	}

	nat.move("127.0.0.3")
	var told ma.Multiaddr
	eventually(t, "the client is told its new address", func() bool {
		var err error
		if told, err = toldAddr(testContext(t), mover, behind); err != nil {
			t.Fatal(err)
		}
		return told.Equal(nat.addr())
	})
	if addrs, want := waitFound(t, seeker, r, mover.ID()), []ma.Multiaddr{nat.addr(), lan}; !slices.EqualFunc(addrs, want, ma.Multiaddr.Equal) {
		t.Errorf("then others are told %v, want %v", addrs, want)
	}
	if got, want := holderOf(conn).network, netip.MustParsePrefix("127.0.0.3/32"); got != want {
		t.Errorf("its records are counted in %v, want %v", got, want)
	}
	if n := len(r.host.Network().ConnsToPeer(mover.ID())); n != 1 || conn.IsClosed() {
		t.Errorf("%d connections, the first one closed: %v", n, conn.IsClosed())
	}
}

// newMovers connects n clients to r, each from an address of its own and through a NAT that
// can move. relays is r as each client sees it.
func newMovers(t *testing.T, r testRelay, n int) (nats []*movingNAT, hosts []host.Host, relays []testRelay) {
	t.Helper()
	for i := range n {
		nat, behind := newMovingNAT(t, r, netip.AddrFrom4([4]byte{127, 0, 1, byte(i)}).String())
		h := newClient(t)
		connect(t, h, behind)
		nats, hosts, relays = append(nats, nat), append(hosts, h), append(relays, behind)
	}
	return nats, hosts, relays
}

// One address must not hold more connections than it may open.
func TestConnectionsAreCountedWhereTheyAre(t *testing.T) {
	const most, clients = 3, 5
	r := newTestRelayWithin(t, limits{clients: 100, perNetwork: most, testOnlyLimitLoopback: true}, defaultConfig(t), newTestKey(t))
	nats, hosts, relays := newMovers(t, r, clients)
	for _, nat := range nats {
		nat.move("127.0.0.2")
	}
	in := r.host.Network().Conns
	eventually(t, "as many are left as one network may have, all at their new address", func() bool {
		for i, h := range hosts {
			// Those that are closed are not to come back from here.
			if ctx := network.WithNoDial(testContext(t), "test"); h.Network().Connectedness(r.info.ID) == network.Connected {
				toldAddr(ctx, h, relays[i])
			}
		}
		return len(in()) == most && !slices.ContainsFunc(in(), func(c network.Conn) bool {
			return ipOf(c.RemoteMultiaddr()) != netip.MustParseAddr("127.0.0.2")
		})
	})

	// The places that they have left are free again, and those where they are taken.
	again := func(ip string) error {
		_, behind := newMovingNAT(t, r, ip)
		return newClient(t).Connect(testContext(t), behind.info)
	}
	for range most - 1 { // as many as may begin there within rateWindow, after the first
		if err := again("127.0.1.0"); err != nil {
			t.Errorf("a place that was left is not free: %v", err)
		}
	}
	if again("127.0.0.2") == nil {
		t.Error("one more connection than the network may have")
	}
	r.sockets.networks.mu.Lock()
	defer r.sockets.networks.mu.Unlock()
	want := map[netip.Prefix]int{netip.MustParsePrefix("127.0.0.2/32"): most, netip.MustParsePrefix("127.0.1.0/32"): most - 1}
	if got := r.sockets.networks.conns; !maps.Equal(got, want) {
		t.Errorf("connections are counted as %v, want %v", got, want)
	}
}

// Clients that move to and fro all the time, into one network, and leave while they move,
// leave no place taken.
func TestPlacesOfMovingClientsAreLeft(t *testing.T) {
	const most, clients = 3, 8
	r := newTestRelayWithin(t, limits{clients: 100, perNetwork: most, testOnlyLimitLoopback: true}, defaultConfig(t), newTestKey(t))
	nats, hosts, relays := newMovers(t, r, clients)
	for round := range 4 {
		for i, nat := range nats {
			nat.move(netip.AddrFrom4([4]byte{127, 0, 2, byte(i * (round % 2))}).String())
		}
		moved := netip.MustParsePrefix("127.0.2.0/24")
		eventually(t, "somebody is counted at a new address", func() bool {
			for i, h := range hosts {
				// Who is closed is not to come back.
				if s, err := h.NewStream(network.WithNoDial(testContext(t), "test"), relays[i].info.ID, identify.ID); err == nil {
					s.Reset()
				}
			}
			r.sockets.networks.move()
			r.sockets.networks.mu.Lock()
			defer r.sockets.networks.mu.Unlock()
			for at := range r.sockets.networks.conns {
				if moved.Contains(at.Addr()) {
					return true
				}
			}
			return false
		})
	}
	for i, h := range hosts {
		nats[i].move("127.0.2.0")
		h.Close()
	}
	r.holdsNothing(t)
}

// The requests of a client that has moved are paid for by the network where it is now:
// the one that it has left may be somebody else's.
func TestBudgetFollowsWhereClientsGo(t *testing.T) {
	r := newTestRelayWithin(t, limits{clients: 100, perNetwork: 3, testOnlyLimitLoopback: true}, defaultConfig(t), newTestKey(t))
	nat, behind := newMovingNAT(t, r, "127.0.0.2")
	h := newClient(t)
	connect(t, h, behind)
	account := piecesOf(r.host.Network().ConnsToPeer(h.ID())[0])
	if got, want := account.budget.Load().network, netip.MustParsePrefix("127.0.0.2/32"); got != want {
		t.Errorf("at first %v pays, want %v", got, want)
	}
	nat.move("127.0.0.3")
	eventually(t, "the new network pays", func() bool {
		toldAddr(testContext(t), h, behind)
		return account.budget.Load().network == netip.MustParsePrefix("127.0.0.3/32")
	})
	b := r.sockets.pieces.budgets
	users := func(network string) int {
		b.mu.Lock()
		defer b.mu.Unlock()
		if one := b.by[netip.MustParsePrefix(network)]; one != nil {
			return one.users
		}
		return 0
	}
	if left, now := users("127.0.0.2/32"), users("127.0.0.3/32"); left != 0 || now != 1 {
		t.Errorf("the budgets have %d and %d users, want 0 and 1", left, now)
	}
	h.Close()
	eventually(t, "nobody uses the budget", func() bool { return users("127.0.0.3/32") == 0 })
}
