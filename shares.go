package main

// Fair shares: each client has streams and memory of its own, however many streams
// others open and however much memory they take.
//
// All other memory that comes and goes is shared, first come first served: see
// sharedMemory. The relay sets both aside, so neither takes from the other.

import (
	"sync"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// fairStreams wraps a resource manager so that nobody can open so many streams that
// others cannot open any. go-libp2p's own manager limits only the streams of one
// peer and those of all peers together, and the peers of one address could take all
// of them. Once more than unshared streams are open, a peer that has used up its
// share opens no more.
//
// Streams that others open to a peer never count against those that it opens itself.
type fairStreams struct {
	network.ResourceManager
	unshared int // streams beyond everybody's shares: see limits
	tally    *tally

	mu   sync.Mutex
	used map[peer.ID]*[2]int // bytes of shareMemory in use, by direction; an entry goes with its last byte
}

func newFairStreams(inner network.ResourceManager, unshared int, t *tally) *fairStreams {
	return &fairStreams{ResourceManager: inner, unshared: unshared, tally: t, used: make(map[peer.ID]*[2]int)}
}

// shareOf returns what each peer can count on in that direction: the number of
// streams, and the bytes for them and their messages.
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

// sharedScope keeps a stream's account. It takes memory from its peer's share while
// that lasts, and then from the memory that all share.
type sharedScope struct {
	network.StreamManagementScope
	shares *fairStreams
	id     peer.ID
	dir    network.Direction

	mu            sync.Mutex
	share, shared int // bytes booked
	done          bool
}

// ReserveMemory books n bytes.
func (s *sharedScope) ReserveMemory(n int, priority uint8) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done || n <= 0 {
		return s.StreamManagementScope.ReserveMemory(n, priority) // which returns the error
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

// ReleaseMemory first puts back what came out of the memory that all share.
func (s *sharedScope) ReleaseMemory(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return // Done has given everything back
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
