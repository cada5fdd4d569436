package main

// What happens to a client while it is connected: which addresses others are
// told, at which of our addresses it reaches this relay, and that it is counted
// once.
//
// All of it is said by live connections, so nothing has to expire: who has left
// has no connection, and no address.

import (
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// identifyTimeout is how long an answer may wait until a client has said where it
// reaches this relay: more than two long round trips. A client gives a request 10 s.
const identifyTimeout = 2 * time.Second

// peers follows the connected clients of one host. Make it with newPeers, give
// its addrBook to the host, then call follow.
type peers struct {
	log    *slog.Logger
	served *uniqueCounter

	// relays are the other relays that the operator named, with the addresses
	// that he gave them.
	relays map[peer.ID][]ma.Multiaddr

	// left is told who has left. It may be told of one who is back.
	left func(peer.ID)

	// network is set by follow, before the host listens.
	network network.Network

	sub  event.Subscription
	done chan struct{} // closed when loop has ended

	mu sync.Mutex
	// identified holds what connected peers said in identify. An entry goes
	// with the peer's last connection.
	identified map[peer.ID]identified
	// reserved are the connected ones that wait for circuits.
	reserved map[peer.ID]struct{}
	// awaited are closed when the client of that connection has been identified.
	awaited map[string]chan struct{}
}

// identified is what a client said of itself.
type identified struct {
	listen  []ma.Multiaddr // usable ones only, at most maxAddrsPerPeer
	punches bool           // punches holes, once it has a circuit
	circuit bool           // takes circuits

	// reachedAt is the address of this relay to which each of its connections goes,
	// by the connection's ID: as the client sees it, and through a NAT on our side.
	// nil is not said.
	reachedAt map[string]ma.Multiaddr
}

func newPeers(log *slog.Logger) *peers {
	return &peers{log: log, served: newUniqueCounter(), identified: make(map[peer.ID]identified),
		reserved: make(map[peer.ID]struct{}), awaited: make(map[string]chan struct{})}
}

// follow keeps p up to date with h's connections until p.close.
func (p *peers) follow(h host.Host) error {
	p.network = h.Network()
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
			p.learn(e.Conn, identified{
				listen:  usableAddrs(e.Peer, e.ListenAddrs, e.Conn.RemoteMultiaddr()),
				punches: slices.Contains(e.Protocols, holepunch.Protocol),
				circuit: slices.Contains(e.Protocols, proto.ProtoIDv2Stop),
			}, reachedAddr(e.ObservedAddr, e.Conn.RemoteMultiaddr()))
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

// learn keeps what a client said of itself over c, and at which address it reached
// the relay; nil is not said.
func (p *peers) learn(c network.Conn, said identified, at ma.Multiaddr) {
	id := c.RemotePeer()
	open := p.network.ConnsToPeer(id)
	said.reachedAt = make(map[string]ma.Multiaddr)
	p.mu.Lock()
	for _, o := range open {
		if was, ok := p.identified[id].reachedAt[o.ID()]; ok {
			said.reachedAt[o.ID()] = was
		}
	}
	if at != nil || said.reachedAt[c.ID()] == nil {
		said.reachedAt[c.ID()] = at
	}
	p.identified[id] = said
	if done := p.awaited[c.ID()]; done != nil {
		close(done)
		delete(p.awaited, c.ID())
	}
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
	delete(p.reserved, id)
	p.mu.Unlock()
	p.left(id)
}

// reachedAt is the address at which the client of c says that it reaches this
// relay, or nil. A client that has just come is waited for: its first question may be
// here before what it says of itself.
func (p *peers) reachedAt(c network.Conn) ma.Multiaddr {
	id := c.RemotePeer()
	p.mu.Lock()
	at, ok := p.identified[id].reachedAt[c.ID()]
	done := p.awaited[c.ID()]
	if !ok && done == nil {
		done = make(chan struct{})
		p.awaited[c.ID()] = done
	}
	p.mu.Unlock()
	if ok {
		return at
	}
	select {
	case <-done:
	case <-time.After(identifyTimeout):
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.awaited[c.ID()] == done { // nobody else needs it: whoever comes later makes another
		delete(p.awaited, c.ID())
	}
	return p.identified[id].reachedAt[c.ID()]
}

// reserve notes that a connected peer waits for circuits here.
func (p *peers) reserve(id peer.ID) {
	p.mu.Lock()
	p.reserved[id] = struct{}{}
	p.mu.Unlock()
	if !p.connected(id) { // as in learn
		p.forget(id)
	}
}

// punch reports whether the asker and its mate can make a direct connection by
// themselves: both say that they punch holes, or there can be a circuit from one to
// the other. rust-libp2p's clients do not tell a relay that they punch.
func (p *peers) punch(asker, mate peer.ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	a, m := p.identified[asker], p.identified[mate]
	_, reserved := p.reserved[mate]
	return a.punches && m.punches || a.circuit && reserved
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
