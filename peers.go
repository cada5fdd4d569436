package main

// The clients that are connected: which addresses others are told of them, which
// have a place in the DHT's routing table, and how many there were.
//
// Everything here is known from live connections, so nothing has to expire: a
// client that has left has no connection, and so no address.

import (
	"log/slog"
	"slices"
	"sync"
	"time"

	kb "github.com/libp2p/go-libp2p-kbucket"
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

// peers follows the connected clients of one host. Make it with newPeers, give
// its addrBook to the host, then call follow, and close at the end.
type peers struct {
	log    *slog.Logger
	served *uniqueCounter

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

// identified is what a client says of itself.
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

// connected reports whether id has a connection here.
func (p *peers) connected(id peer.ID) bool {
	return p.network.Connectedness(id) == network.Connected
}

// learn keeps what id said in identify, while it is connected.
func (p *peers) learn(id peer.ID, said identified) {
	p.mu.Lock()
	p.identified[id] = said
	p.mu.Unlock()
	if !p.connected(id) {
		// It left meanwhile. If loop has handled the event that says so before
		// this, nobody else would forget it.
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

// admit gives a connected client that serves kad a place in the routing table, if
// its bucket has one. It is called when a client is identified and again with each
// of its DHT requests, so that a client that found its bucket full takes the place
// of one that leaves.
//
// This replaces kad-dht's own admission, which asks each newcomer a FIND_NODE and,
// once the table has 20, refuses a newcomer with an empty answer: every fresh client.
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

// addrs returns the addresses we give someone who asks for a peer by its ID: where
// it was observed, then where it says that it listens. There are none of a peer
// that is not connected.
func (p *peers) addrs(id peer.ID) []ma.Multiaddr {
	at := p.observed(id)
	if len(at) == 0 {
		return nil
	}
	return fitAddrs(at, p.listening(id))
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
	return fitAddrs(at, slices.DeleteFunc(slices.Clone(p.listening(id)), func(a ma.Multiaddr) bool { return !manet.IsPrivateAddr(a) }))
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

// listening returns the usable listen addresses that a peer has reported.
func (p *peers) listening(id peer.ID) []ma.Multiaddr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.identified[id].listen
}

// sameHome reports whether one of the addresses in a is likely to be in the same
// home as one in b.
func sameHome(a, b []ma.Multiaddr) bool {
	return slices.ContainsFunc(a, func(x ma.Multiaddr) bool {
		return slices.ContainsFunc(b, func(y ma.Multiaddr) bool { return sameLAN(ipOf(x), ipOf(y)) })
	})
}

// addrBook is the host's peerstore with its address book replaced: the addresses of
// clients are what peers.addrs returns, and cannot be written. The relay does not
// dial clients, so only the DHT's answers read them; and what one client says of
// another never gets near them. Other relays have the addresses that the operator
// gave them.
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

// usedProtocols are what the relay or a library under it asks a peer for. What else a
// client says that it speaks is dropped: 900 long names took 163 KiB.
var usedProtocols = []protocol.ID{kadProtocol, proto.ProtoIDv2Stop, identify.IDPush, holepunch.Protocol}

// SetProtocols keeps, of what a peer says in identify, the protocols that are used.
func (b addrBook) SetProtocols(id peer.ID, said ...protocol.ID) error {
	if id == b.self {
		return b.addrStore.SetProtocols(id, said...)
	}
	return b.addrStore.SetProtocols(id, known(said)...)
}

func (b addrBook) AddProtocols(id peer.ID, said ...protocol.ID) error {
	if id == b.self {
		return b.addrStore.AddProtocols(id, said...)
	}
	return b.addrStore.AddProtocols(id, known(said)...)
}

// known returns those of usedProtocols that are in said. It returns strings of ours,
// because each of the others would keep what it came in.
func known(said []protocol.ID) (used []protocol.ID) {
	for _, p := range usedProtocols {
		if slices.Contains(said, p) {
			used = append(used, p)
		}
	}
	return used
}

// Put keeps that a peer is a relay like this one, which answers.elsewhere asks for, and
// nothing else of what identify stores: agents and other versions are of any length.
func (b addrBook) Put(id peer.ID, key string, value any) error {
	if key == "ProtocolVersion" && value == protocolVersion {
		return b.addrStore.Put(id, key, protocolVersion)
	}
	return nil
}

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
