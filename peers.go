package main

// The clients that are connected: which of their addresses we tell others, at which of
// our addresses they reach this relay, and how many there have been.
//
// All of it comes from live connections, so nothing has to expire: a client that has
// left has no connection, and so no address.

import (
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/proto"
	"github.com/libp2p/go-libp2p/p2p/protocol/holepunch"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// identifyTimeout is how long an answer waits for a client's identify: longer than two
// slow round trips. A client gives a request 10 s.
const identifyTimeout = 2 * time.Second

// peers follows the connected clients of one host. Make it with newPeers, give
// its addrBook to the host, then call follow, and close at the end.
type peers struct {
	log    *slog.Logger
	served *uniqueCounter

	// left is called with each peer that has left. It may have come back since.
	left func(peer.ID)

	// network is set by follow, before the host listens.
	network network.Network

	sub  event.Subscription
	done chan struct{} // closed when loop has ended

	mu sync.Mutex
	// identified holds what connected peers said in identify. An entry goes
	// with the peer's last connection.
	identified map[peer.ID]identified

	// reserved are the connected peers that have asked for a reservation, so that
	// circuits to them may be possible.
	reserved map[peer.ID]struct{}

	// awaited has a channel for each connection whose identify somebody waits for. learn
	// closes it.
	awaited map[network.Conn]chan struct{}
}

// identified is what a client says about itself.
type identified struct {
	listen  []ma.Multiaddr // usable ones only, at most maxAddrsPerPeer
	punches bool           // makes a direct connection by itself where it has a circuit
	circuit bool           // takes circuits
	from    netip.Addr     // where the client was when it said so

	// reachedAt holds the address at which the client reaches this relay over each of its
	// connections. That is the client's view, from outside any NAT of ours. nil: the
	// client did not say it.
	reachedAt map[network.Conn]ma.Multiaddr
}

func newPeers(log *slog.Logger) *peers {
	return &peers{log: log, served: newUniqueCounter(), identified: make(map[peer.ID]identified),
		reserved: make(map[peer.ID]struct{}), awaited: make(map[network.Conn]chan struct{})}
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
	h.Network().Notify(&network.NotifyBundle{
		ConnectedF: func(_ network.Network, c network.Conn) {
			if p.served.add(string(c.RemotePeer())) {
				p.log.Debug("new peer", "peer", c.RemotePeer(), "remote_addr", c.RemoteMultiaddr(), "peers_served", p.served.count())
			}
		},
		DisconnectedF: func(_ network.Network, c network.Conn) { p.closed(c) },
	})
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
				from:    ipOf(e.Conn.RemoteMultiaddr()),
			}, reachedAddr(e.ObservedAddr, e.Conn.RemoteMultiaddr()))
		case event.EvtPeerConnectednessChanged:
			if e.Connectedness == network.NotConnected {
				p.forget(e.Peer)
			}
		}
	}
}

// connected reports whether id has a connection here.
func (p *peers) connected(id peer.ID) bool {
	return p.network.Connectedness(id) == network.Connected
}

// learn keeps what the peer of c said in identify, while it is connected. at is where
// it reaches the relay over c, or nil if it did not say so.
func (p *peers) learn(c network.Conn, said identified, at ma.Multiaddr) {
	id := c.RemotePeer()
	p.mu.Lock()
	if said.reachedAt = p.identified[id].reachedAt; said.reachedAt == nil {
		said.reachedAt = make(map[network.Conn]ma.Multiaddr)
	}
	if at != nil || said.reachedAt[c] == nil {
		said.reachedAt[c] = at
	}
	p.identified[id] = said
	if done := p.awaited[c]; done != nil {
		close(done)
		delete(p.awaited, c)
	}
	p.mu.Unlock()
	if c.IsClosed() { // maybe before it was noted
		p.closed(c)
	}
	if !p.connected(id) {
		// It left meanwhile. If loop has handled the event that says so before
		// this, nobody else would forget it.
		p.forget(id)
	}
}

// closed forgets a connection that has ended. quic-go's part of it still holds what the
// client has sent and nobody has read, which no longer counts as the client's memory.
func (p *peers) closed(c network.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.identified[c.RemotePeer()].reachedAt, c)
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

// reachedAt returns the address at which the client of c says that it reaches this
// relay, or nil.
func (p *peers) reachedAt(c network.Conn) ma.Multiaddr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.identified[c.RemotePeer()].reachedAt[c]
}

// awaitIdentify waits until the client of c has identified itself, at most
// identifyTimeout. Its first question can arrive before that.
func (p *peers) awaitIdentify(c network.Conn) {
	p.mu.Lock()
	_, ok := p.identified[c.RemotePeer()].reachedAt[c]
	done := p.awaited[c]
	if !ok && done == nil {
		done = make(chan struct{})
		p.awaited[c] = done
	}
	p.mu.Unlock()
	if ok {
		return
	}
	select {
	case <-done:
	case <-time.After(identifyTimeout):
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.awaited[c] == done { // a later caller makes its own
		delete(p.awaited, c)
	}
}

// reserve notes that a connected peer has asked for a reservation.
func (p *peers) reserve(id peer.ID) {
	p.mu.Lock()
	p.reserved[id] = struct{}{}
	p.mu.Unlock()
	if !p.connected(id) { // as in learn
		p.forget(id)
	}
}

// punch reports whether asker and mate can make a direct connection by themselves:
// both say that they punch holes, or there can be a circuit from one to the other.
// (rust-libp2p's clients do not tell a relay that they punch.)
func (p *peers) punch(asker, mate peer.ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	a, m := p.identified[asker], p.identified[mate]
	_, reserved := p.reserved[mate]
	return a.punches && m.punches || a.circuit && reserved
}

// addrs returns the addresses we give someone who asks for a peer by its ID: where
// it was observed, then where it says that it listens. There are none of a peer
// that is not connected.
func (p *peers) addrs(id peer.ID) []ma.Multiaddr {
	at := p.observed(id)
	if len(at) == 0 {
		return nil
	}
	return fitAddrs(at, p.listening(id, at))
}

// unasked returns the addresses of a connected peer that we give asker, who did not
// ask for it: where it was observed and, if asker seems to be in the same home, its
// private addresses. Anything else that a peer says might belong to a third party,
// whom everyone told of this peer would then dial.
func (p *peers) unasked(id, asker peer.ID) []ma.Multiaddr {
	at := p.observed(id)
	if len(at) == 0 || !sameHome(at, p.observed(asker)) {
		return at
	}
	return fitAddrs(at, slices.DeleteFunc(p.listening(id, at), func(a ma.Multiaddr) bool { return !manet.IsPrivateAddr(a) }))
}

// observed returns where a peer's connections come from, the newest first: it is
// the likeliest to be alive.
func (p *peers) observed(id peer.ID) []ma.Multiaddr {
	var at []ma.Multiaddr
	for _, c := range slices.Backward(p.network.ConnsToPeer(id)) {
		at = append(at, c.RemoteMultiaddr())
	}
	return fitAddrs(at)
}

// listening returns the usable listen addresses that a peer has reported. at is where
// it is observed now. If it has left the address from which it reported, listening
// leaves out the listen addresses there.
func (p *peers) listening(id peer.ID, at []ma.Multiaddr) []ma.Multiaddr {
	p.mu.Lock()
	said := p.identified[id]
	p.mu.Unlock()
	listen := slices.Clone(said.listen)
	if slices.ContainsFunc(at, func(a ma.Multiaddr) bool { return ipOf(a) == said.from }) {
		return listen
	}
	return slices.DeleteFunc(listen, func(a ma.Multiaddr) bool { return ipOf(a) == said.from })
}

// sameHome reports whether one of the addresses in a is likely to be in the same
// home as one in b.
func sameHome(a, b []ma.Multiaddr) bool {
	return slices.ContainsFunc(a, func(x ma.Multiaddr) bool {
		return slices.ContainsFunc(b, func(y ma.Multiaddr) bool { return sameLAN(ipOf(x), ipOf(y)) })
	})
}

// addrBook is the host's peerstore with its address book replaced. The addresses of a
// client are what peers.addrs returns, and nobody can write them, so what one client says
// of another never gets in. Only the DHT's answers read them, because the relay does not
// dial clients. The addresses of other relays are those that the operator wrote.
//
// go-libp2p's own book would leave out exactly the addresses that cross a NAT:
// identify does not store a connection's remote address, and drops the private
// addresses of peers that come over a public one.
type addrBook struct {
	addrStore
	self   peer.ID
	peers  *peers
	relays func(peer.ID) []ma.Multiaddr // those of another relay, to keep
}

func (b addrBook) Addrs(id peer.ID) []ma.Multiaddr {
	if id == b.self {
		return b.addrStore.Addrs(id)
	}
	if addrs := b.relays(id); len(addrs) > 0 {
		return addrs
	}
	return b.peers.addrs(id)
}

// usedProtocols are the protocols that the relay, or a library under it, asks a peer for.
// We drop all others that a client says it speaks: 900 long names took 163 KiB.
var usedProtocols = []protocol.ID{kadProtocol, proto.ProtoIDv2Stop, identify.IDPush, holepunch.Protocol}

// SetProtocols keeps only usedProtocols of what a peer says in identify.
func (b addrBook) SetProtocols(id peer.ID, said ...protocol.ID) error {
	if id == b.self {
		return b.addrStore.SetProtocols(id, said...)
	}
	return b.addrStore.SetProtocols(id, onlyUsed(said)...)
}

func (b addrBook) AddProtocols(id peer.ID, said ...protocol.ID) error {
	if id == b.self {
		return b.addrStore.AddProtocols(id, said...)
	}
	return b.addrStore.AddProtocols(id, onlyUsed(said)...)
}

// onlyUsed returns those of usedProtocols that are in said. It returns our own strings,
// because a client's would keep the whole message in memory.
func onlyUsed(said []protocol.ID) (used []protocol.ID) {
	for _, p := range usedProtocols {
		if slices.Contains(said, p) {
			used = append(used, p)
		}
	}
	return used
}

// Put keeps nothing. identify puts here which agent and version a peer says it is: texts
// of any length, which nobody reads.
func (addrBook) Put(peer.ID, string, any) error { return nil }

func (b addrBook) PeerInfo(id peer.ID) peer.AddrInfo {
	return peer.AddrInfo{ID: id, Addrs: b.Addrs(id)}
}

func (b addrBook) AddAddr(id peer.ID, addr ma.Multiaddr, ttl time.Duration) {
	b.AddAddrs(id, []ma.Multiaddr{addr}, ttl)
}

func (b addrBook) AddAddrs(id peer.ID, addrs []ma.Multiaddr, ttl time.Duration) {
	if id == b.self {
		b.addrStore.AddAddrs(id, addrs, ttl)
	}
}

func (b addrBook) SetAddr(id peer.ID, addr ma.Multiaddr, ttl time.Duration) {
	b.SetAddrs(id, []ma.Multiaddr{addr}, ttl)
}

func (b addrBook) SetAddrs(id peer.ID, addrs []ma.Multiaddr, ttl time.Duration) {
	if id == b.self {
		b.addrStore.SetAddrs(id, addrs, ttl)
	}
}
