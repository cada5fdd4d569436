package main

// Who belongs together: the devices of one user, which all put one record under a
// key that nobody else can guess. Who put it is known by the connection on which
// it came, and not by what the record says of its publisher.

import (
	"bytes"
	"slices"
	"sync"
	"time"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/peer"
)

// groups remembers who put each record lately. The zero value is ready.
type groups struct {
	mu      sync.Mutex
	members map[string][]member  // by key; who put it last comes last
	keys    map[peer.ID][]string // that each has put; the one put last comes last
}

type member struct {
	id  peer.ID
	put time.Time
}

// note remembers who puts a record, if req is a request to put one.
func (g *groups) note(id peer.ID, req *kadpb.Message) {
	rec := req.GetRecord()
	if req.GetType() != kadpb.Message_PUT_VALUE || rec == nil || !bytes.Equal(req.Key, rec.Key) || (recordValidator{}).Validate(string(rec.Key), rec.Value) != nil {
		return
	}
	g.put(string(rec.Key), id, time.Now())
}

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

// leave forgets who has left.
func (g *groups) leave(id peer.ID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.keys[id]) > 0 {
		g.remove(g.keys[id][0], id)
	}
}

// mates returns who but id put the record with that key lately, who did so last
// first.
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

// remove is called with g.mu held.
func (g *groups) remove(key string, id peer.ID) {
	left := slices.DeleteFunc(g.members[key], func(m member) bool { return m.id == id })
	if g.members[key] = left; len(left) == 0 {
		delete(g.members, key)
	}
	keys := slices.DeleteFunc(g.keys[id], func(k string) bool { return k == key })
	if g.keys[id] = keys; len(keys) == 0 {
		delete(g.keys, id)
	}
}
