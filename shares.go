package main

// Fair shares: however many streams others open and however much memory they take,
// each client has streams and memory of its own.
//
// All other memory that comes and goes is shared, first come first served: see
// sharedMemory. The relay promises both, so neither takes from the other.

import (
	"sync"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// fairStreams is a resource manager under which nobody can open so many streams
// that others cannot open any. go-libp2p's own knows only how many streams one peer
// may have and how many all peers together, and the peers of one address could take
// all of those. Once more are open than there are beside everybody's share, a peer
// that has its share opens no more.
//
// What others open to a peer never counts against what it opens itself.
type fairStreams struct {
	network.ResourceManager
	unshared int // streams beside everybody's share: see limits
	tally    *tally

	mu   sync.Mutex
	used map[peer.ID]*[2]int // bytes of shareMemory in use, by direction; an entry goes with the last byte
}

func newFairStreams(inner network.ResourceManager, unshared int, t *tally) *fairStreams {
	return &fairStreams{ResourceManager: inner, unshared: unshared, tally: t, used: make(map[peer.ID]*[2]int)}
}

// shareOf returns what each peer can count on in that direction: how many streams, and
// how many bytes for them and their messages.
func shareOf(dir network.Direction) (streams, bytes int) {
	if dir == network.DirInbound {
		return streamShare, streamShare * streamMemory
	}
	return streamShareTo, streamShareTo*streamMemory + identifyMemory
}

func (f *fairStreams) OpenStream(id peer.ID, dir network.Direction) (network.StreamManagementScope, error) {
	open := 0
	share, _ := shareOf(dir)
	f.ViewSystem(func(s network.ResourceScope) error {
		open = s.Stat().NumStreamsInbound + s.Stat().NumStreamsOutbound
		return nil
	})
	if open > f.unshared {
		f.ViewPeer(id, func(s network.PeerScope) error {
			open = s.Stat().NumStreamsInbound
			if dir == network.DirOutbound {
				open = s.Stat().NumStreamsOutbound
			}
			return nil
		})
		if open >= share {
			f.tally.refuse(refusedStream)
			return nil, network.ErrResourceLimitExceeded
		}
	}
	inner, err := f.ResourceManager.OpenStream(id, dir)
	if err != nil {
		return nil, err
	}
	scope := &sharedScope{StreamManagementScope: inner, shares: f, id: id, dir: dir}
	if err := scope.ReserveMemory(streamMemory, network.ReservationPriorityHigh); err != nil {
		scope.Done()
		return nil, err
	}
	return scope, nil
}

// take takes up to n bytes of what a peer's share has left, and returns how many.
func (f *fairStreams) take(id peer.ID, dir network.Direction, n int) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	used := f.used[id]
	if used == nil { // n is above 0
		used = new([2]int)
		f.used[id] = used
	}
	_, most := shareOf(dir)
	n = min(n, most-used[dir-network.DirInbound])
	used[dir-network.DirInbound] += n
	return n
}

// give puts back what take took.
func (f *fairStreams) give(id peer.ID, dir network.Direction, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if used := f.used[id]; used != nil {
		used[dir-network.DirInbound] -= n
		if *used == [2]int{} {
			delete(f.used, id)
		}
	}
}

// sharedScope is a stream's account. It takes memory from its peer's share while that
// lasts, and then from what all share.
type sharedScope struct {
	network.StreamManagementScope
	shares *fairStreams
	id     peer.ID
	dir    network.Direction

	mu            sync.Mutex
	share, shared int // bytes that are booked
	done          bool
}

// ReserveMemory books n bytes.
func (s *sharedScope) ReserveMemory(n int, priority uint8) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done || n <= 0 {
		return s.StreamManagementScope.ReserveMemory(n, priority) // which knows what is wrong
	}
	share := s.shares.take(s.id, s.dir, n)
	if rest := n - share; rest > 0 {
		if err := s.StreamManagementScope.ReserveMemory(rest, priority); err != nil {
			s.shares.give(s.id, s.dir, share)
			return err
		}
		s.shared += rest
	}
	s.share += share
	return nil
}

// ReleaseMemory puts back first what came out of the memory that all share.
func (s *sharedScope) ReleaseMemory(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return // and all is given back
	}
	rest := min(n, s.shared)
	if rest > 0 {
		s.StreamManagementScope.ReleaseMemory(rest)
	}
	share := min(n-rest, s.share)
	s.shares.give(s.id, s.dir, share)
	s.shared -= rest
	s.share -= share
}

func (s *sharedScope) Done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.done {
		s.done = true
		s.shares.give(s.id, s.dir, s.share)
	}
	s.StreamManagementScope.Done()
}
