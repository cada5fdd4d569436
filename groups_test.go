package main

// What is remembered about groups, and how much.

import (
	"fmt"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// Both the size of a group and the number of groups of one client have a limit.
func TestGroupsAreBounded(t *testing.T) {
	var g groups
	now := time.Now()
	for i := range 100 {
		g.put("key", peer.ID(fmt.Sprint(i)), now.Add(time.Duration(i)))
	}
	mates := g.mates("key", "99", now)
	if len(mates) != groupMembers-1 || mates[0] != "98" {
		t.Errorf("mates = %v, want the last %d, the last one first", mates, groupMembers-1)
	}
	if got := g.mates("key", "", now.Add(groupAge+time.Second)); got != nil {
		t.Errorf("mates = %v, want none after groupAge", got)
	}
	for i := range 100 {
		g.put(fmt.Sprint("key", i), "one", now)
	}
	if n := len(g.keys["one"]); n != groupsPerClient {
		t.Errorf("one peer is in %d groups, want %d", n, groupsPerClient)
	}
	for i := range 100 {
		g.leave(peer.ID(fmt.Sprint(i)))
	}
	g.leave("one")
	if len(g.members) != 0 || len(g.keys) != 0 {
		t.Errorf("left: %v, %v", g.members, g.keys)
	}
}
