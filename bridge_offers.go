package main

// Offers decide whom a client may dial over the bridge: which of its mates an answer
// names with the relay's own address, and which mate the client's next Initial is
// for. The Initial cannot tell us: to the client it is the first packet of a
// connection with the mate, and it carries no name. So we offer each client one mate
// at a time.

import (
	"slices"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// mate describes a device of the asker's group, to name in an answer.
type mate struct {
	id peer.ID

	// bridge names the address of ours at which the asker may dial the mate; nil: none.
	bridge ma.Multiaddr
}

// choose returns the mates to name to the client that asks over conn: those that
// need no bridge, and at most one that does, with the bridge's address. An Initial
// does not say whom it is for, so if a client were told to dial several mates here,
// nobody could tell its Initials apart.
func (b *bridge) choose(conn network.Conn, ids []peer.ID) (named []mate) {
	asker := conn.RemotePeer()
	if len(ids) == 0 {
		return nil
	}
	self := b.peers.reachedAt(conn)
	from := connectionOf(conn)
	var here whereabouts
	possible := self != nil && from != nil && !b.isRelay(asker)
	if possible {
		here, possible = from.where()
	}
	var bridged []candidate
	for _, id := range ids {
		// Two clients that punch holes would stop doing so once a bridge connected
		// them, because they would take it for a direct connection.
		if !possible || b.isRelay(id) || b.peers.punch(asker, id) {
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

// candidate describes a mate that the asker may dial over the bridge.
type candidate struct {
	id   peer.ID
	conn connection
	near bool // in the asker's network, so most likely in the same home
}

// offer picks the mate that the asker may dial next, and notes that it was told. It
// returns that mate as next, or "" if there is none. others are the mates that need
// no bridge: the asker has met them, has another connection with them, or is near
// them. A device that was killed and came back is near its old self, which still
// looks connected for some seconds.
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
		turn := o.named // the longer ago, the sooner its turn
		if o.direct || o.near {
			turn += afterRest
		}
		// The client may be dialling the mate that it was told just now.
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

// offerTo returns the client's offer of that mate, and makes it if there is none. It
// returns nil if the client has too many.
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
// bridge. Flows at the client's other addresses count only if a packet came there
// after e appeared: a client that was killed and came back under the same ID has
// forgotten its older connections.
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

// with reports whether is returns true for one of the client's flows with that mate
// and the client's own end of it.
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

// meant returns the offer of the mate that an Initial from e is for, or nil. It
// takes the mate that the client was told to dial here, or else one that the client
// has not met but may have heard of from another mate. Of several such mates it
// takes the one dialled longest ago. If that is wrong, the dial fails, as it would
// at the relay itself.
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
