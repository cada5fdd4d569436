package main

// A libp2p host that speaks QUIC and identify, put together from its parts. libp2p.New
// would be shorter, but it links every transport there is and half as many modules
// again: code that only an attacker would use.

import (
	"errors"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/transport"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
)

// hostParts are what a host is made of.
type hostParts struct {
	key       crypto.PrivKey
	transport transport.Transport
	gater     connmgr.ConnectionGater
	resources network.ResourceManager

	// addrBook puts another address book in front of the peerstore.
	addrBook func(self peer.ID, store addrStore) peerstore.Peerstore

	// advertise returns the addresses that the host tells its peers, given those that it
	// listens on.
	advertise func(listen []ma.Multiaddr) []ma.Multiaddr

	busOptions   []eventbus.Option
	swarmOptions []swarm.Option
	options      basichost.HostOpts
}

// addrStore is what pstoremem implements: a peerstore that also keeps signed records.
type addrStore interface {
	peerstore.Peerstore
	peerstore.CertifiedAddrBook
}

// quicHost is a running host. Close ends it, and the transport and resource manager that it
// was made of.
type quicHost struct{ *basichost.BasicHost }

// newQUICHost returns a host that listens on nothing yet. If it fails, it closes
// the resource manager and leaves the transport to the caller.
func newQUICHost(parts hostParts) (_ *quicHost, err error) {
	var undo []func() error
	defer func() {
		for i := len(undo) - 1; err != nil && i >= 0; i-- {
			err = errors.Join(err, undo[i]())
		}
	}()
	undo = append(undo, parts.resources.Close)
	self, err := peer.IDFromPrivateKey(parts.key)
	if err != nil {
		return nil, err
	}
	memory, err := pstoremem.NewPeerstore()
	if err != nil {
		return nil, err
	}
	undo = append(undo, memory.Close)
	// The host takes its keys from here, for identify and its signed record.
	if err := errors.Join(memory.AddPrivKey(self, parts.key), memory.AddPubKey(self, parts.key.GetPublic())); err != nil {
		return nil, err
	}

	bus := eventbus.NewBus(parts.busOptions...)
	sw, err := swarm.NewSwarm(self, parts.addrBook(self, memory), bus, append(parts.swarmOptions,
		// By itself the swarm stops dialling public addresses when fewer than 5 of its last
		// 100 dials have succeeded, and then tries one dial in 100. This relay dials only
		// relays that it has lost, so after an hour without one of them it would hardly dial
		// any.
		swarm.WithUDPBlackHoleSuccessCounter(nil),
		swarm.WithIPv6BlackHoleSuccessCounter(nil),
		swarm.WithConnectionGater(parts.gater),
		swarm.WithResourceManager(parts.resources))...)
	if err != nil {
		return nil, err
	}
	undo = append(undo, sw.Close)
	if err := sw.AddTransport(parts.transport); err != nil {
		return nil, err
	}
	// No AutoNAT: it would ask clients to dial back, and it is the operator who makes
	// the relay reachable. No relay client: nobody reaches the relay through another.
	// No observed addresses: four clients in four networks could make the relay tell
	// everybody an address that is somebody else's.
	parts.options.EventBus = bus
	parts.options.AddrsFactory = func([]ma.Multiaddr) []ma.Multiaddr { return parts.advertise(sw.ListenAddresses()) }
	h, err := basichost.NewHost(sw, &parts.options)
	if err != nil {
		return nil, err
	}
	h.Start()
	return &quicHost{h}, nil
}

// Close ends the network before the host. The host by itself waits until its peers have
// read what it tells them, so a peer that reads nothing would hold it up for seconds.
func (h *quicHost) Close() error {
	return errors.Join(h.Network().Close(), h.BasicHost.Close())
}
