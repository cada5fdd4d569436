package main

// A device that comes back before its old connections have timed out: its newest
// connection gets in, and its oldest gives way.

import (
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// newestFirst is a resource manager under which a peer that has connsPerPeer
// connections may open one more, at the cost of its oldest. By itself go-libp2p
// refuses the newest, so a device that lost its network without a goodbye five times
// within 30 s would be shut out until the dead connections have timed out. Only who
// holds the peer's key can close its connections in this way.
type newestFirst struct {
	network.ResourceManager

	// conns returns the connections of a peer, the oldest first.
	conns func(peer.ID) []network.Conn
}

func (m newestFirst) OpenConnection(dir network.Direction, usefd bool, endpoint ma.Multiaddr) (network.ConnManagementScope, error) {
	scope, err := m.ResourceManager.OpenConnection(dir, usefd, endpoint)
	if err != nil || dir != network.DirInbound {
		return scope, err
	}
	return newestScope{scope, m}, nil
}

// newestScope learns whose connection it is when the handshake has proven it.
type newestScope struct {
	network.ConnManagementScope
	manager newestFirst
}

func (s newestScope) SetPeer(id peer.ID) error {
	s.manager.makeRoom(id)
	return s.ConnManagementScope.SetPeer(id)
}

// makeRoom closes the oldest connections of id until it may open one more. The swarm
// does not know those that were accepted a moment ago. If they fill the place, go-libp2p
// refuses the newest.
func (m newestFirst) makeRoom(id peer.ID) {
	for _, c := range m.conns(id) {
		var open int
		m.ViewPeer(id, func(s network.PeerScope) error {
			open = s.Stat().NumConnsInbound
			return nil
		})
		if open < connsPerPeer {
			return
		}
		if c.Stat().Direction == network.DirInbound {
			c.Close() // it is counted no longer when this returns
		}
	}
}
