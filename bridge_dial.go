package main

// Handshakes over the bridge, and whose packets they are that no header has shown: all
// that needs both locks, and so some thought.

import (
	"cmp"
	"slices"
)

// decide says where a datagram from e goes. It is called with both locks held.
func (b *bridge) decide(e *end, d []byte, now clock) hop {
	if !isLong(d) {
		if l, _ := b.find(e, d); l != nil {
			return b.afterHandshake(l, true)
		}
		return b.guess(e, d, now)
	}
	dest, source, ok := longIDs(d)
	if !ok || b.isOurs(dest) && len(dest) == relayIDLength {
		return hop{verdict: toRelay}
	}
	l := e.side.legs[b.key(e, dest)]
	if l == nil {
		// It may have been given another one under encryption. Its own it keeps.
		for _, f := range e.flows {
			if to := f.legTo(e); to.end.side.legs[b.key(to.end, source)] == to {
				l = to.other
				b.learn(l, dest, true)
				break
			}
		}
	}
	if l != nil {
		return b.handshake(l, d, dest, source, now)
	}
	if isInitial(d, dest) {
		return b.begin(e, d, dest, source, now)
	}
	return hop{verdict: toRelay}
}

// handshake says where a packet with a long header goes that came by l.
func (b *bridge) handshake(l *leg, d, dest, source []byte, now clock) hop {
	f := l.flow
	allowed := f.answered && !f.over
	for i, dial := range f.dials {
		if dial.leg == l && dial.id == b.key(l.other.end, source) {
			allowed = !f.over && b.mayGo(dial, d, now)
			break
		}
		if dial.leg == l.other && dial.id == b.key(l.end, dest) && !dial.holding {
			f.dials = slices.Delete(f.dials, i, i+1)
			b.answer(f)
			allowed = !f.over
			break
		}
	}
	if !allowed {
		return hop{verdict: toNobody}
	}
	f.lastLong = now
	b.learn(l.other, source, true)
	return hop{verdict: toMate, legs: [2]*leg{l}, known: true}
}

// mayGo reports whether a packet of a dial that has not been answered may go on.
func (b *bridge) mayGo(dial *dial, d []byte, now clock) bool {
	switch waited := now - dial.began; {
	case !dial.holding && dial.sent < unansweredDatagrams:
		dial.sent++
		return true
	case !dial.holding:
		b.tally.refuse(refusedBridgeUnanswered)
	case waited < firstFlight:
		if len(dial.held) < heldDatagrams {
			dial.held = append(dial.held, slices.Clone(d))
		}
	case waited < dial.hold:
		// Too soon to be a repetition. It has another connection with the mate, and
		// ends this one. If it comes again nonetheless, it did not give up.
		dial.gaveUp, dial.held = true, nil
	}
	return false
}

// answer notes that a dial of f has been answered.
func (b *bridge) answer(f *flow) {
	f.answered = true
	for i := range f.legs {
		l := &f.legs[i]
		l.switched = false
		l.credit.Store(flowCredit)
	}
}

// afterHandshake says where a packet with a short header goes that came by l.
func (b *bridge) afterHandshake(l *leg, known bool) hop {
	f := l.flow
	if f.over || !f.answered {
		return hop{verdict: toNobody}
	}
	if l.short = true; l.other.short && !f.established {
		f.established = true
		b.tally.bridges.Add(1)
		n := b.tally.bridged.Add(1)
		b.debug("bridge established", "source_peer", f.legs[0].end.client.id, "destination_peer", f.legs[1].end.client.id, "bridges_since_start", n)
	}
	return hop{verdict: toMate, legs: [2]*leg{l}, known: known}
}

// guess says where a packet goes with an ID that no header has shown: its mate
// issued it encrypted. quinn takes another one once, as server, as soon as it has
// one. quic-go does so too, as client and server, and again after thousands of
// packets. What is learned once is known from then on.
func (b *bridge) guess(e *end, d []byte, now clock) hop {
	if b.isOurs(d[1:]) {
		return hop{verdict: toRelay}
	}
	var legs, due []*leg
	for _, f := range e.flows {
		if f.over || !f.answered {
			continue
		}
		l := f.legOf(e)
		legs = append(legs, l)
		if !l.switched && now-f.lastLong < switchTime && l.known-f.lastLong < stayTime || l.packets >= switchPackets {
			due = append(due, l)
		}
	}
	if len(legs) > 1 {
		legs = due
	}
	if e.guesses++; len(legs) == 0 || len(due) > 1 && e.guesses > guessesPerSecond {
		b.tally.refuse(refusedBridgePacket)
		return hop{verdict: toNobody}
	}
	u := e.doubt(now).unknownID(b.key(e, d[1:1+minID]), now)
	u.seen++
	if len(legs) > 1 {
		legs = u.likely(legs, now)
	}
	// A stateless reset begins with random bytes, too (RFC 9000, 10.3), and those do
	// not come again.
	if l := legs[0]; u.seen > 1 && (len(legs) == 1 || now-u.since > settledTime) {
		n := int(l.idLength)
		if n == 0 || len(d) <= n {
			n = minID
		}
		b.learn(l, d[1:1+n], true)
		l.switched, l.packets, u.key = true, 0, 0
		legs = legs[:1]
	}
	way := b.afterHandshake(legs[0], false)
	if len(legs) > 1 {
		way.legs[1] = legs[1] // the wrong one can't read it, and drops it
	}
	return way
}

// likely leaves of legs those to which u may belong, the likeliest first, and two
// at most.
func (u *unknownID) likely(legs []*leg, now clock) []*leg {
	still := slices.DeleteFunc(slices.Clone(legs), func(l *leg) bool {
		// It goes on using an ID that is known.
		return l.known > u.since+reorderTime
	})
	if len(still) == 0 {
		u.since, still = now, legs
	}
	slices.SortStableFunc(still, func(a, b *leg) int {
		return cmp.Compare(max(b.flow.lastLong, b.known), max(a.flow.lastLong, a.known))
	})
	return still[:min(len(still), 2)]
}

// unknownID finds what is known of an unknown ID, and forgets the oldest if it is new.
func (s *doubts) unknownID(key uint64, now clock) *unknownID {
	oldest := &s.unknown[0]
	for i := range s.unknown {
		u := &s.unknown[i]
		if u.key == key {
			return u
		}
		if u.since < oldest.since {
			oldest = u
		}
	}
	*oldest = unknownID{key: key, since: now}
	return oldest
}

// begin says where an Initial goes that begins a connection.
func (b *bridge) begin(e *end, d, dest, source []byte, now clock) hop {
	p, here := e.here()
	if !here {
		return hop{verdict: toRelay} // where it wants to be again
	}
	o := b.meant(e, now)
	if o == nil {
		return b.stray(e, source, now)
	}
	o.dialled, o.direct = now, false
	at, ok := o.conn.where()
	if !ok || at.addr == e.addr() {
		return hop{verdict: toNobody}
	}
	callee := b.end(o.mate, o.conn, now)
	if callee == nil {
		return hop{verdict: toNobody}
	}
	f := b.flowBetween(e, callee)
	switch {
	case b.closed:
		b.tally.refuse(refusedStopping)
		return hop{verdict: toNobody}
	case b.holding >= b.limits.holding(),
		f == nil && (b.flows >= b.limits.flows() || len(e.flows) >= flowsPerClient || len(callee.flows) >= flowsPerClient),
		f != nil && len(f.dials) >= dialsPerFlow:
		b.tally.refuse(refusedBridge)
		return hop{verdict: toNobody}
	}
	if f == nil {
		f = b.newFlow(e, callee, now)
	}
	l := f.legOf(e)
	dial := &dial{
		leg: l, id: b.key(callee, source), began: now, holding: true, held: [][]byte{slices.Clone(d)},
		hold: min(minHold+(p.rtt+at.rtt)/2, maxHold),
	}
	f.dials = append(f.dials, dial)
	b.holding++
	b.learn(l, dest, false)
	b.learn(l.other, source, true)
	b.debug("bridge dialled", "source_peer", e.client.id, "destination_peer", callee.client.id, "rtt", p.rtt+at.rtt)
	b.after(dial.hold, func() { b.release(f, dial) })
	return hop{verdict: toNobody}
}

// stray drops an Initial for which there is no mate, once: if the client wants this
// relay, it comes again.
func (b *bridge) stray(e *end, source []byte, now clock) hop {
	id := b.key(e, source)
	strays := &e.doubt(now).strays
	oldest := &strays[0]
	for i := range strays {
		s := &strays[i]
		if s.id == id {
			return hop{verdict: toRelay}
		}
		if s.at < oldest.at {
			oldest = s
		}
	}
	*oldest = stray{id, now}
	b.tally.refuse(refusedBridgeStray)
	return hop{verdict: toNobody}
}

// flowBetween is the one of two ends, or nil.
func (b *bridge) flowBetween(a, c *end) *flow {
	for _, f := range a.flows {
		if f.legTo(a).end != c {
			continue
		}
		if f.over { // it begins anew
			b.removeFlow(f, "dialled again")
			return nil
		}
		return f
	}
	return nil
}

func (b *bridge) newFlow(caller, callee *end, now clock) *flow {
	f := &flow{began: now}
	for i, e := range []*end{caller, callee} {
		l := &f.legs[i]
		l.flow, l.end, l.other, l.heard = f, e, &f.legs[1-i], now
		l.credit.Store(unansweredDatagrams * maxDatagram)
		e.flows = append(e.flows, f)
	}
	b.flows++
	return f
}

// release sends what was held of a dial.
func (b *bridge) release(f *flow, d *dial) {
	b.lock()
	now := b.clock()
	if !d.holding { // it has gone meanwhile
		b.unlock()
		return
	}
	if !d.gaveUp && b.busy(d.leg.other.end, f, now) && now-d.began < busyHold {
		b.unlock()
		b.after(busyCheck, func() { b.release(f, d) })
		return
	}
	held, to := d.held, d.leg.other.end.target
	if f.over {
		held = nil
	}
	b.letGo(d)
	d.sent = len(held)
	if len(held) > 0 {
		f.lastLong = now
		d.leg.other.called, d.leg.other.switched = now, false
	}
	b.unlock()
	for _, p := range held {
		to.send([][]byte{p}, len(p), 0)
		b.tally.bridgedBytes.Add(int64(len(p)))
	}
}

// busy reports whether e is being called by others than f, and has not switched yet
// to the ID that it will use with them.
func (b *bridge) busy(e *end, f *flow, now clock) bool {
	return slices.ContainsFunc(e.flows, func(g *flow) bool {
		l := g.legOf(e)
		return g != f && !g.over && l.called != 0 && !l.switched &&
			(now-l.called < busyTime || g.answered && now-l.called < busyHold)
	})
}
