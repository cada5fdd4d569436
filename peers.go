package main

// What happens to a client while it is connected: which addresses others are
// told, whether it has a place in the DHT's routing table, and that it is
// counted once.
//
// All of it is said by live connections, so nothing has to expire: who has left
// has no connection, and no address.

import (
	"cmp"
	"hash/maphash"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"

	kb "github.com/libp2p/go-libp2p-kbucket"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// peers follows the connected clients of one host. Make it with newPeers, give
// its addrBook to the host, then call follow.
type peers struct {
	log    *slog.Logger
	served *uniqueCounter

	// relays are the other relays that the operator named, with the addresses
	// that he gave them.
	relays map[peer.ID][]ma.Multiaddr

	// Set by follow, before the host listens.
	network network.Network
	table   *kb.RoutingTable

	sub  event.Subscription
	done chan struct{} // closed when loop has ended

	mu sync.Mutex
	// identified holds what connected peers said in identify. An entry goes
	// with the peer's last connection.
	identified map[peer.ID]identified
}

// identified is what a client said of itself.
type identified struct {
	listen  []ma.Multiaddr // usable ones only, at most maxAddrsPerPeer
	kadPeer bool           // answers DHT requests
}

func newPeers(log *slog.Logger) *peers {
	return &peers{log: log, served: newUniqueCounter(), identified: make(map[peer.ID]identified)}
}

// follow keeps p and the routing table up to date with h's connections until
// p.close.
func (p *peers) follow(h host.Host, table *kb.RoutingTable) error {
	p.network, p.table = h.Network(), table
	var err error
	p.sub, err = h.EventBus().Subscribe([]any{
		new(event.EvtPeerIdentificationCompleted),
		new(event.EvtPeerConnectednessChanged),
	}, eventbus.BufSize(1024), eventbus.Name("peers"))
	if err != nil {
		return err
	}
	h.Network().Notify(&network.NotifyBundle{ConnectedF: func(_ network.Network, c network.Conn) {
		if p.served.add(string(c.RemotePeer())) {
			p.log.Debug("new peer", "peer", c.RemotePeer(), "remote_addr", c.RemoteMultiaddr(), "peers_served", p.served.count())
		}
	}})
	p.done = make(chan struct{})
	go p.loop() // close waits for it
	return nil
}

// close stops following. It may be called without follow.
func (p *peers) close() {
	if p.sub == nil {
		return
	}
	p.sub.Close()
	<-p.done
}

func (p *peers) loop() {
	defer close(p.done)
	for e := range p.sub.Out() {
		switch e := e.(type) {
		case event.EvtPeerIdentificationCompleted:
			// Also after each identify push, with the new addresses.
			p.learn(e.Peer, identified{
				listen:  usableAddrs(e.Peer, e.ListenAddrs, e.Conn.RemoteMultiaddr()),
				kadPeer: slices.Contains(e.Protocols, kadProtocol),
			})
			p.admit(e.Peer)
		case event.EvtPeerConnectednessChanged:
			if e.Connectedness == network.NotConnected {
				p.forget(e.Peer)
			}
		}
	}
}

func (p *peers) connected(id peer.ID) bool {
	return p.network.Connectedness(id) == network.Connected
}

func (p *peers) learn(id peer.ID, said identified) {
	p.mu.Lock()
	p.identified[id] = said
	p.mu.Unlock()
	if !p.connected(id) {
		// It left while this was written. The event that says so comes after it
		// is true: if it has been handled already, nobody else would forget.
		p.forget(id)
	}
}

// forget drops what was learned of a peer that has no connection any more.
func (p *peers) forget(id peer.ID) {
	if p.connected(id) { // and is back already
		return
	}
	p.mu.Lock()
	delete(p.identified, id)
	p.mu.Unlock()
	p.table.RemovePeer(id)
}

// admit gives a connected client that serves kad a place in the routing table,
// if its bucket has one. It is called when a client is identified and again with
// each DHT request of its own, so that those who found the bucket full get the
// place of one who leaves.
//
// This replaces kad-dht's admission, which asks each newcomer a FIND_NODE and,
// once the table has 20, refuses those who answer it empty: every fresh client.
func (p *peers) admit(id peer.ID) {
	p.mu.Lock()
	kadPeer := p.identified[id].kadPeer
	p.mu.Unlock()
	if !kadPeer || !p.table.UsefulNewPeer(id) {
		return
	}
	// Not replaceable: only by leaving does a peer lose its place.
	if added, _ := p.table.TryAddPeer(id, true, false); added && !p.connected(id) {
		p.table.RemovePeer(id) // as in learn
	}
}

// addrs are the addresses told of a connected peer to whom asks for it: those it
// was observed under, then what it says it listens on, within the bounds of an
// answer. There are none for anybody else.
func (p *peers) addrs(id peer.ID) []ma.Multiaddr {
	conns := p.network.ConnsToPeer(id)
	if len(conns) == 0 {
		return nil
	}
	p.mu.Lock()
	listen := p.identified[id].listen
	p.mu.Unlock()
	return within(conns, listen)
}

// told are the addresses of a connected peer told to one who did not ask for it:
// those it was observed under and, to one who was observed under the same IP
// address, so in the same home, those in its LAN. What else a peer says could be
// anybody's, who would be dialled by all that the peer is named to.
func (p *peers) told(id, asker peer.ID) []ma.Multiaddr {
	conns := p.network.ConnsToPeer(id)
	if len(conns) == 0 {
		return nil
	}
	if named := p.relays[id]; named != nil {
		return within(conns, named)
	}
	p.mu.Lock()
	listen := p.identified[id].listen
	p.mu.Unlock()
	sameHome := slices.ContainsFunc(p.network.ConnsToPeer(asker), func(a network.Conn) bool {
		ip := a.RemoteMultiaddr()[0]
		return slices.ContainsFunc(conns, func(c network.Conn) bool { return ip.Equal(&c.RemoteMultiaddr()[0]) })
	})
	return within(conns, slices.DeleteFunc(slices.Clone(listen), func(a ma.Multiaddr) bool {
		return !sameHome || !manet.IsPrivateAddr(a)
	}))
}

// within puts the addresses of conns, the newest first, and listen together, as
// many as an answer has room for.
func within(conns []network.Conn, listen []ma.Multiaddr) []ma.Multiaddr {
	addrs := make([]ma.Multiaddr, 0, maxAddrsPerPeer)
	size := 0
	add := func(a ma.Multiaddr) {
		const framing = 3 // field tag and length of a protobuf entry
		if len(addrs) == maxAddrsPerPeer || size+len(a.Bytes())+framing > maxAddrBytesPerPeer || slices.ContainsFunc(addrs, a.Equal) {
			return
		}
		addrs = append(addrs, a)
		size += len(a.Bytes()) + framing
	}
	// The newest connection is the likeliest to be alive. connsPerPeer observed
	// addresses, of 23 bytes at most, always fit.
	for _, c := range slices.Backward(conns) {
		add(c.RemoteMultiaddr())
	}
	for _, a := range listen {
		add(a)
	}
	return addrs
}

// usableAddrs picks what id's mates may be told of the listen addresses it
// reported over a connection from remote: a circuit through a relay first, then
// public addresses, then private ones, which mates in the same home use. Others
// are dropped: loopback (unless it came over loopback), unspecified, too long,
// and those that name another peer.
func usableAddrs(id peer.ID, reported []ma.Multiaddr, remote ma.Multiaddr) []ma.Multiaddr {
	rank := func(a ma.Multiaddr) int {
		_, relayErr := a.ValueForProtocol(ma.P_CIRCUIT)
		switch {
		case relayErr == nil:
			return 0
		case manet.IsPublicAddr(a):
			return 1
		}
		return 2
	}
	var usable []ma.Multiaddr
	for _, a := range reported {
		// A component takes two bytes on the wire and many times as much here.
		if len(a) == 0 || len(a) > maxAddrComponents || len(a.Bytes()) > maxAddrBytesPerPeer {
			continue
		}
		if _, last := ma.SplitLast(a); last != nil && last.Protocol().Code == ma.P_P2P {
			if a, _ = peer.SplitAddr(a); len(a) == 0 || last.Value() != id.String() {
				continue
			}
		}
		if !manet.IsThinWaist(a) && !isDNS(a) || manet.IsIPUnspecified(a) || manet.IsIPLoopback(a) && !manet.IsIPLoopback(remote) {
			continue
		}
		usable = append(usable, a)
	}
	slices.SortStableFunc(usable, func(a, b ma.Multiaddr) int { return cmp.Compare(rank(a), rank(b)) })
	return slices.Clone(usable[:min(len(usable), maxAddrsPerPeer)]) // not the array with all of them
}

func isDNS(a ma.Multiaddr) bool {
	switch a[0].Protocol().Code {
	case ma.P_DNS, ma.P_DNS4, ma.P_DNS6, ma.P_DNSADDR:
		return true
	}
	return false
}

// addrBook is the host's peerstore with one book replaced: the addresses of
// clients are what peers.addrs says, and cannot be written. The relay dials none,
// so only the DHT's answers read them; and what one client says of another never
// gets near them. Other relays have the addresses that the operator gave them.
//
// go-libp2p's own book would leave out exactly what crosses a NAT: identify does
// not store a connection's remote address, and drops private ones of peers that
// come over a public one.
type addrBook struct {
	peerstore.Peerstore
	peerstore.CertifiedAddrBook // the same store; basichost keeps our own record there
	self                        peer.ID
	peers                       *peers
}

func (b addrBook) Addrs(id peer.ID) []ma.Multiaddr {
	if id == b.self {
		return b.Peerstore.Addrs(id)
	}
	if named := b.peers.relays[id]; named != nil {
		return slices.Clone(named) // in which the swarm resolves and sorts
	}
	return b.peers.addrs(id)
}

func (b addrBook) PeerInfo(id peer.ID) peer.AddrInfo {
	return peer.AddrInfo{ID: id, Addrs: b.Addrs(id)}
}

func (b addrBook) AddAddr(id peer.ID, addr ma.Multiaddr, ttl time.Duration) {
	b.AddAddrs(id, []ma.Multiaddr{addr}, ttl)
}

func (b addrBook) AddAddrs(id peer.ID, addrs []ma.Multiaddr, ttl time.Duration) {
	if id == b.self {
		b.Peerstore.AddAddrs(id, addrs, ttl)
	}
}

func (b addrBook) SetAddr(id peer.ID, addr ma.Multiaddr, ttl time.Duration) {
	b.SetAddrs(id, []ma.Multiaddr{addr}, ttl)
}

func (b addrBook) SetAddrs(id peer.ID, addrs []ma.Multiaddr, ttl time.Duration) {
	if id == b.self {
		b.Peerstore.SetAddrs(id, addrs, ttl)
	}
}

// uniqueCounter counts distinct strings in 1 MiB, however many come: linear
// counting (Whang, Vander-Zanden and Taylor 1990). Each sets the bit that its
// hash names, and the share of bits still clear tells how many there were. The
// standard error is 0.25 of one at 1 000, 25 at 100 000 (0.025 %) and stays
// below 0.1 % up to thirty million. The hash is seeded, so that nobody can
// choose IDs that share a bit.
type uniqueCounter struct {
	seed maphash.Seed

	mu   sync.Mutex
	bits []uint64
	set  int // bits set
}

// uniqueBits is a power of two, for the index.
const uniqueBits = 1 << 23

func newUniqueCounter() *uniqueCounter {
	return &uniqueCounter{seed: maphash.MakeSeed(), bits: make([]uint64, uniqueBits/64)}
}

// add reports whether s, as far as can be told, is new.
func (c *uniqueCounter) add(s string) bool {
	i := maphash.String(c.seed, s) % uniqueBits
	word, bit := &c.bits[i/64], uint64(1)<<(i%64)
	c.mu.Lock()
	defer c.mu.Unlock()
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	c.set++
	return true
}

func (c *uniqueCounter) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear := max(uniqueBits-c.set, 1)
	return int(math.Round(-uniqueBits * math.Log(float64(clear)/uniqueBits)))
}
