package main

// What happens when a device comes back before its old connections have timed out:
// we accept the newest connection, and close the oldest.

import (
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// newestFirst wraps a resource manager so that a peer with connsPerPeer connections
// may open one more, and loses its oldest. go-libp2p by itself refuses the newest.
// So a device that lost its network five times within 30 s without a goodbye would
// be shut out until its dead connections timed out. Only the holder of a peer's key
// can close its connections this way.
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

// newestScope learns whose connection it is once the handshake has proven it.
type newestScope struct {
	network.ConnManagementScope
	manager newestFirst
}

func (s newestScope) SetPeer(id peer.ID) error {
	s.manager.makeRoom(id)
	return s.ConnManagementScope.SetPeer(id)
}

// makeRoom closes the oldest connections of id until it may open one more. The swarm
// does not know connections that were accepted a moment ago. If they use up the
// limit, go-libp2p refuses the newest.
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
			c.Close() // it no longer counts when Close returns
		}
	}
}
