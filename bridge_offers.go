package main

// Offers decide whom a client may dial over the bridge: which of its mates an answer
// names with the relay's own address, and which mate the client's next Initial is
// for. The Initial cannot tell us: to the client it is the first packet of a
// connection with the mate, and it carries no name. So we offer each client one mate
// at a time.

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

const (
	// offerTime limits how long after an answer we take the client's dial to be for
	// the mate that the answer named. Clients dial at once.
	offerTime = 5 * time.Second

	// notDialled limits how long we wait for a dial after an offer. A client that does
	// not dial has another connection with the mate, or is already dialling it at
	// addresses that do not answer, which takes a client of rust-libp2p 5 s. So its
	// other mates come first for a while: the first time for shortRest, the second
	// time for longRest, which is more than two of the clients' ticks of 30 s, and from
	// then on for twice as long each time, up to eight times longRest.
	notDialled = 2 * time.Second
	shortRest  = 8 * time.Second
	longRest   = 70 * time.Second

	// metTime limits how long ago both sides of a flow may have sent something if we
	// are to count them as connected. The clients send every 5 s.
	metTime = 12 * time.Second
)

// mate is a device of the asker's group, as an answer names it.
type mate struct {
	id peer.ID

	// bridge is the address of ours at which the asker may dial the mate; nil: none.
	bridge ma.Multiaddr
}

// choose returns which of ids, the asker's mates, to name to the client that asks over
// conn. At most one of them gets the bridge's address.
func (b *bridge) choose(conn network.Conn, ids []peer.ID) (named []mate) {
	if len(ids) == 0 {
		return nil
	}
	asker, from := conn.RemotePeer(), connectionOf(conn)
	self := b.peers.reachedAt(conn)
	var here whereabouts
	possible := self != nil && from != nil && !b.isRelay(asker)
	if possible {
		here, possible = from.where()
	}
	var candidates []candidate
	for _, id := range ids {
		// Two clients that punch holes would stop doing so once a bridge connected
		// them, because they would take it for a direct connection.
		if !possible || b.isRelay(id) || b.peers.punch(asker, id) {
			named = append(named, mate{id: id})
			continue
		}
		for _, conn := range b.connections(id) {
			if at, ok := conn.where(); ok {
				candidates = append(candidates, newCandidate(id, conn, at.addr.Addr(), here.addr.Addr()))
				break
			}
		}
	}
	if len(candidates) == 0 {
		return named
	}
	next, others := b.offer(asker, from, candidates, b.clock())
	if next != "" {
		named = append([]mate{{next, self}}, named...)
	}
	for _, id := range others {
		named = append(named, mate{id: id})
	}
	return named
}

// candidate is a mate that the asker may dial over the bridge.
type candidate struct {
	id   peer.ID
	conn connection
	near bool // in the asker's network, so most likely in the same home
	far  bool // of the other IP version, so most likely not directly connected
}

// newCandidate describes the mate id, which is at there, for an asker that is at here.
func newCandidate(id peer.ID, conn connection, there, here netip.Addr) candidate {
	return candidate{id, conn, networkOf(there) == networkOf(here), there.Is4() != here.Is4()}
}

// offer picks the mate that the asker may dial next, and notes that it was told. It
// returns that mate as next, or "" if there is none. others are the mates to name
// without the bridge: the asker has most likely met them, or they are near it, or it has
// too many offers. The answer leaves out the unmet mates whose turn comes later.
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
	var unmet []*offer
	for _, m := range mates {
		var o *offer
		if !e.met(m.id, now) {
			o = e.client.offerTo(m.id)
		}
		if o == nil {
			others = append(others, m.id)
			continue
		}
		o.conn, o.near, o.far, o.known = m.conn, m.near, m.far, now
		unmet = append(unmet, o)
	}
	if len(unmet) == 0 {
		return "", others
	}
	best := e.next(unmet, now)
	for _, o := range unmet {
		if o != best && (o.near || o.restsUntil > now && !o.far) {
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

// next returns the offer whose turn it is at e. There is at least one.
func (e *end) next(unmet []*offer, now clock) *offer {
	anyFar := slices.ContainsFunc(unmet, func(o *offer) bool { return o.far })
	for _, o := range unmet {
		if o.untaken(now) {
			o.restsUntil = max(o.restsUntil, o.named+o.rest(anyFar))
		}
	}
	// The client may be dialling the mate that it was told to dial just now.
	justNow := func(o *offer) bool { return o.open(e, now) && now-o.named < notDialled }
	if i := slices.IndexFunc(unmet, justNow); i >= 0 {
		return unmet[i]
	}
	return slices.MinFunc(unmet, func(a, b *offer) int { return cmp.Compare(a.turn(), b.turn()) })
}

// turn orders the offers: the one with the lowest turn comes first, which is the one that
// was told or rested longest ago. A device that was killed and came back is near its old
// self, which still looks connected for some seconds, so near mates come last.
func (o *offer) turn() clock {
	if o.near {
		return max(o.named+longRest, o.restsUntil)
	}
	return max(o.named, o.restsUntil)
}

// rest returns how long other mates come first after an offer that the client did not
// take. If anyFar, the client has unmet mates of the other IP version. It most likely has
// no other connection with those: it did not take the offer because it was dialling
// elsewhere. So they rest for a short time, and the mates of its own version longer.
func (o *offer) rest(anyFar bool) clock {
	before := o.missed // how often it happened before; once more, for a longer rest, if anyFar
	if anyFar {
		before++
	}
	if o.far || before == 0 {
		return shortRest
	}
	return longRest << min(before-1, 3)
}

// open reports whether the client was told to dial the mate a moment ago, at e, and has
// not yet done so.
func (o *offer) open(e *end, now clock) bool {
	return o.named != 0 && o.asker == e && now-o.named < offerTime && o.dialled < o.named
}

// untaken reports whether the client did not dial the mate when it was last told to.
func (o *offer) untaken(now clock) bool {
	return o.named > o.dialled && now-o.named > notDialled
}

// metDirectly notes that the two clients of l seem to be connected without the bridge,
// so that both are offered their other mates first.
func (l *leg) metDirectly(now clock) {
	for _, own := range []*leg{l, l.other} {
		if o := own.end.client.offerTo(own.other.end.client.id); o != nil {
			o.conn, o.known, o.restsUntil = own.other.end.conn, now, now+longRest
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
// takes the mate that the client was told to dial here, or else the likeliest of those
// that the client has not met but may have heard of from another mate. If that is
// wrong, the dial fails, as it would at the relay itself.
func (e *end) meant(now clock) *offer {
	var told, unmet *offer
	for _, o := range e.client.offers {
		if o.open(e, now) && (told == nil || o.named > told.named) {
			told = o
		}
		if o.restsUntil <= now && now-o.known < groupAge && !e.met(o.mate, now) && !e.client.dialling(o.mate, now) && o.likelier(unmet) {
			unmet = o
		}
	}
	if told == nil {
		return unmet
	}
	// A client that did not take an offer before is most likely connected with that mate.
	if told.missed > 0 && !told.far && unmet != nil && unmet.far {
		return unmet
	}
	return told
}

// likelier reports whether an Initial is more likely for the mate of o than for that of
// other, which may be nil: mates of the client's own IP version may be connected with it
// directly. Of two of one version, the one dialled longer ago is likelier.
func (o *offer) likelier(other *offer) bool {
	if other == nil || o.far != other.far {
		return other == nil || o.far
	}
	return o.dialled < other.dialled
}
