package main

// Whom a client may dial over the bridge: which of its mates an answer names with the
// relay's own address, and for which of them an Initial is that comes then. A client
// cannot say so: to its mate it is the first packet of a connection, and no name is in
// it. So each is offered one mate at a time.

import (
	"slices"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// mate is one to name in an answer.
type mate struct {
	id peer.ID

	// bridge is the address of ours at which the asker may dial it; nil: none.
	bridge ma.Multiaddr
}

// choose says whom of its mates to name to who asks over conn: those that it has
// met, and one that it has not, with the bridge's address. A client cannot say for
// whom an Initial is. If it was told to dial several mates here, nobody could tell.
func (b *bridge) choose(conn network.Conn, ids []peer.ID) (named []mate) {
	asker := conn.RemotePeer()
	if len(ids) == 0 {
		return nil
	}
	self := b.peers.reachedAt(conn)
	from := connectionOf(conn)
	var here whereabouts
	possible := self != nil && from != nil && b.relays[asker] == nil
	if possible {
		here, possible = from.where()
	}
	var bridged []candidate
	for _, id := range ids {
		// Two that punch holes would never do so over a bridge, which they take to be
		// a direct connection.
		if !possible || b.relays[id] != nil || b.peers.punch(asker, id) {
			named = append(named, mate{id: id})
		} else if conns := b.connections(id); len(conns) > 0 {
			if at, ok := conns[0].where(); ok {
				bridged = append(bridged, candidate{id, conns[0], networkOf(at.addr.Addr()) == networkOf(here.addr.Addr())})
			}
		}
	}
	if len(bridged) == 0 {
		return named
	}
	next, others := b.offer(asker, from, bridged, b.clock())
	if next != "" {
		named = append([]mate{{next, self}}, named...)
	}
	for _, id := range others {
		named = append(named, mate{id: id})
	}
	return named
}

// candidate is a mate that may be dialled over the bridge.
type candidate struct {
	id   peer.ID
	conn connection
	near bool // in the asker's network, so most likely at home with it
}

// offer notes that the asker may dial the first of mates that it has not met. next
// is that one, or "", and others are those that need no bridge: met, or near. One
// that was killed and is back is near what it was, which seems to be here for some
// seconds yet.
func (b *bridge) offer(asker peer.ID, from connection, mates []candidate, now clock) (next peer.ID, others []peer.ID) {
	b.lock()
	defer b.unlock()
	e := b.end(asker, from, now)
	if e == nil || b.closed {
		for _, m := range mates {
			others = append(others, m.id)
		}
		return "", others
	}
	c := e.client
	var best *offer
	var bestTurn clock
	dialling := false
	var unmet []*offer
	for _, m := range mates {
		if e.met(m.id, now) {
			others = append(others, m.id)
			continue
		}
		o := c.offerTo(m.id)
		if o == nil {
			continue
		}
		if o.named != 0 && now-o.named > notDialled {
			o.direct = o.dialled < o.named
		}
		o.conn, o.known, o.near = m.conn, now, m.near
		unmet = append(unmet, o)
		turn := o.named // the longer ago the sooner
		if o.direct || o.near {
			turn += afterRest
		}
		// It may be dialling the one that it was told just now.
		justNow := o.open(e, now) && now-o.named < notDialled
		if best == nil || justNow || !dialling && turn < bestTurn {
			best, bestTurn, dialling = o, turn, dialling || justNow
		}
	}
	if best == nil {
		return "", others
	}
	for _, o := range unmet {
		if o != best && (o.direct || o.near) {
			others = append(others, o.mate)
		}
	}
	best.named, best.asker = now, e
	b.debug("bridge offered", "source_peer", asker, "destination_peer", best.mate)
	return best.mate, others
}

// offerTo returns what the client was offered of that mate, or makes it. It is nil
// if there are too many.
func (c *client) offerTo(mate peer.ID) *offer {
	for _, o := range c.offers {
		if o.mate == mate {
			return o
		}
	}
	if len(c.offers) == groupMembers {
		return nil
	}
	o := &offer{mate: mate}
	c.offers = append(c.offers, o)
	return o
}

// met reports whether the client at e seems to be connected with that mate over the
// bridge. What it did at another address before it came to e it may have forgotten: a
// client that was killed and is back under its ID has.
func (e *end) met(mate peer.ID, now clock) bool {
	return e.client.with(mate, func(own *end, f *flow) bool {
		return f.established && !f.over && f.legs[0].end.absent == 0 && f.legs[1].end.absent == 0 &&
			now-f.legs[0].heard < metTime && now-f.legs[1].heard < metTime &&
			(own == e || f.legOf(own).heard > e.since)
	})
}

// dialling reports whether the client is dialling that mate over the bridge.
func (c *client) dialling(mate peer.ID, now clock) bool {
	return c.with(mate, func(_ *end, f *flow) bool {
		return slices.ContainsFunc(f.dials, func(d *dial) bool {
			return d.leg.end.client == c && !d.gaveUp && now-d.began < offerTime
		})
	})
}

// with reports whether is is true of one of the client's flows with that mate, and its
// own end of it.
func (c *client) with(mate peer.ID, is func(*end, *flow) bool) bool {
	for _, e := range c.ends {
		for _, f := range e.flows {
			if f.legTo(e).end.client.id == mate && is(e, f) {
				return true
			}
		}
	}
	return false
}

// meant is for whom an Initial from e is: the mate that its client was told to dial
// here, else one that it has not met, of whom another mate may have told. If there are
// several it is the one dialled longest ago: where that is wrong, the dial fails as it
// would here.
func (b *bridge) meant(e *end, now clock) *offer {
	var told, unmet *offer
	for _, o := range e.client.offers {
		if o.open(e, now) && (told == nil || o.named > told.named) {
			told = o
		}
		if !o.direct && (unmet == nil || o.dialled < unmet.dialled) && now-o.known < groupAge &&
			!e.met(o.mate, now) && !e.client.dialling(o.mate, now) {
			unmet = o
		}
	}
	if told == nil {
		return unmet
	}
	return told
}
