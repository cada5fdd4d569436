package main

// A fair share of the open streams for every peer, and of the memory that they
// take, where go-libp2p's resource manager knows only how many one may have and
// how many all.

import (
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// fairStreams is a resource manager under which nobody's open streams keep
// others from opening any: once more are open than can be beside everybody's
// share, a peer that has its share opens no more. Those of one address alone could
// hold them all.
type fairStreams struct {
	network.ResourceManager
	unshared int // see limits
}

func (f fairStreams) OpenStream(id peer.ID, dir network.Direction) (network.StreamManagementScope, error) {
	open := 0
	count := func(stat network.ScopeStat) error {
		open = stat.NumStreamsInbound + stat.NumStreamsOutbound
		return nil
	}
	f.ViewSystem(func(s network.ResourceScope) error { return count(s.Stat()) })
	if open > f.unshared {
		f.ViewPeer(id, func(s network.PeerScope) error { return count(s.Stat()) })
		if open >= streamShare {
			return nil, network.ErrResourceLimitExceeded
		}
	}
	scope, err := f.ResourceManager.OpenStream(id, dir)
	if err != nil {
		return nil, err
	}
	if err := scope.ReserveMemory(streamMemory, network.ReservationPriorityAlways); err != nil {
		scope.Done()
		return nil, err
	}
	return scope, nil
}
