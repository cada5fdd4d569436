package main

// Groups record which devices belong together. All devices of one user put the same
// record, under a key that nobody else can guess. We know who put it from the
// connection that it came on, not from what the record says about its publisher.

import (
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// groups remembers who has put each record lately. The zero value is ready to use.
type groups struct {
	mu      sync.Mutex
	members map[string][]member  // by key, in the order in which they last put it
	keys    map[peer.ID][]string // the keys that each peer has put, in the same order
}

type member struct {
	id  peer.ID
	put time.Time
}

// put remembers that id has put the record with that key.
func (g *groups) put(key string, id peer.ID, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.members == nil {
		g.members, g.keys = make(map[string][]member), make(map[peer.ID][]string)
	}
	g.remove(key, id)
	if keys := g.keys[id]; len(keys) == groupsPerClient {
		g.remove(keys[0], id)
	}
	if others := g.members[key]; len(others) == groupMembers {
		g.remove(key, others[0].id)
	}
	g.members[key] = append(g.members[key], member{id, now})
	g.keys[id] = append(g.keys[id], key)
}

// leave forgets a peer that has left.
func (g *groups) leave(id peer.ID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.keys[id]) > 0 {
		g.remove(g.keys[id][0], id)
	}
}

// mates returns the other peers that have put the record with that key lately, the
// newest first. These are the mates of id.
func (g *groups) mates(key string, id peer.ID, now time.Time) (mates []peer.ID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range slices.Backward(g.members[key]) {
		if m.id != id && now.Sub(m.put) < groupAge {
			mates = append(mates, m.id)
		}
	}
	return mates
}

// allMates returns the mates of id in all of its groups, those of the newest group
// first.
func (g *groups) allMates(id peer.ID, now time.Time) (mates []peer.ID) {
	g.mu.Lock()
	keys := slices.Clone(g.keys[id])
	g.mu.Unlock()
	for _, key := range slices.Backward(keys) {
		mates = append(mates, g.mates(key, id, now)...)
	}
	return mates
}

// remove forgets that id has put key. The caller holds g.mu.
func (g *groups) remove(key string, id peer.ID) {
	g.members[key] = slices.DeleteFunc(g.members[key], func(m member) bool { return m.id == id })
	if len(g.members[key]) == 0 {
		delete(g.members, key)
	}
	g.keys[id] = slices.DeleteFunc(g.keys[id], func(k string) bool { return k == key })
	if len(g.keys[id]) == 0 {
		delete(g.keys, id)
	}
}
