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
				bridged = append(bridged, candidate{id, conns[0], networkOf(at.addr.Addr()) == networkOf(here.addr.Addr()), at.addr.Addr().Is4() != here.addr.Addr().Is4()})
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
	far  bool // of the other IP version, so most likely not directly connected
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
	farUnmet := slices.ContainsFunc(mates, func(m candidate) bool { return m.far && !e.met(m.id, now) })
	for _, m := range mates {
		if e.met(m.id, now) {
			others = append(others, m.id)
			continue
		}
		o := c.offerTo(m.id)
		if o == nil {
			continue
		}
		if o.untaken(now) {
			o.rests = max(o.rests, o.named+m.rest(o.missed, farUnmet))
		}
		o.conn, o.known, o.near, o.far = m.conn, now, m.near, m.far
		unmet = append(unmet, o)
		turn := max(o.named, o.rests) // the longer ago, the sooner its turn
		if o.near {
			turn = max(turn, o.named+longRest)
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
		if o != best && (o.near || o.rests > now && !o.far) {
			others = append(others, o.mate)
		}
	}
	if best.untaken(now) {
		best.missed++
	} else if best.dialled > best.named {
		best.missed = 0
	}
	best.named, best.asker = now, e
	b.debug("bridge offered", "source_peer", asker, "destination_peer", best.mate)
	return best.mate, others
}

// rest returns how long other mates come first after an offer of m that the client did
// not take, as it did not take that many before. A mate of the other IP version has
// most likely no other connection with the client: that dial was under way elsewhere.
// So while such mates are unmet, those of the same version rest longer.
func (m candidate) rest(missed int, farUnmet bool) clock {
	switch {
	case m.far || missed == 0 && !farUnmet:
		return shortRest
	case !farUnmet:
		missed--
	}
	return longRest << min(missed, 3)
}

// untaken reports whether the client did not dial the mate when it was last told to.
func (o *offer) untaken(now clock) bool {
	return o.named > o.dialled && now-o.named > notDialled
}

// metDirectly notes that two clients seem to be connected without the bridge, so that
// both are offered their other mates first.
func (b *bridge) metDirectly(l *leg, now clock) {
	for _, l := range []*leg{l, l.other} {
		if o := l.end.client.offerTo(l.other.end.client.id); o != nil {
			o.conn, o.known, o.rests = l.other.end.conn, now, now+longRest
		}
	}
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
// takes the one dialled longest ago, but first those of the other IP version, because
// those of the same one may be connected directly. If that is wrong, the dial fails,
// as it would at the relay itself.
func (b *bridge) meant(e *end, now clock) *offer {
	var told, unmet *offer
	for _, o := range e.client.offers {
		if o.open(e, now) && (told == nil || o.named > told.named) {
			told = o
		}
		likelier := unmet == nil || o.far && !unmet.far || o.far == unmet.far && o.dialled < unmet.dialled
		if likelier && o.rests <= now && now-o.known < groupAge && !e.met(o.mate, now) && !e.client.dialling(o.mate, now) {
			unmet = o
		}
	}
	if told == nil || told.missed > 0 && !told.far && unmet != nil && unmet.far {
		return unmet
	}
	return told
}
