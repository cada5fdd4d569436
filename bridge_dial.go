package main

// Handshakes over the bridge, and packets with an ID that no header has shown: all
// the decisions that need both locks.

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

const (
	// minHold delays each Initial, together with half of both round trips to the
	// relay, so that a direct dial made at the same moment comes first. Without the
	// delay, the bridge beat the direct path on a busy machine. maxHold keeps the
	// delay below the time to the first retransmission of an Initial: 200 ms in
	// quic-go (DefaultInitialRTT), 1 s in quinn. So another packet that comes during
	// the delay means that the client has given up.
	minHold = 100 * time.Millisecond
	maxHold = 190 * time.Millisecond

	// firstFlight limits how long the datagrams of a first flight may take to arrive.
	// quic-go's first flight has two datagrams, sent at once.
	firstFlight = 20 * time.Millisecond

	// busyHold limits how much longer we hold an Initial while its callee is in
	// another handshake. We check every busyCheck. Until the callee has switched to
	// another connection ID in the first handshake, nobody could tell to which of the
	// two the new ID belongs.
	busyHold  = 2 * time.Second
	busyCheck = 20 * time.Millisecond

	// busyTime limits how long we take a callee to be busy with a handshake that it
	// has not answered: one long round trip.
	busyTime = 500 * time.Millisecond

	// reorderTime bounds how late a packet may arrive after packets that were sent
	// later. settledTime sets how long we watch an unknown ID before we decide
	// which flow it belongs to.
	reorderTime = 20 * time.Millisecond
	settledTime = 100 * time.Millisecond

	// switchPackets counts the packets with one ID after which quic-go may switch to
	// another: PacketsPerConnectionID / 2 is 5000, less the packets lost on the way
	// here.
	switchPackets = 4000
)

// decide says where a datagram from e goes. The caller holds both locks.
func (e *end) decide(d []byte, now clock) hop {
	if !isLong(d) {
		if l, _ := e.find(d); l != nil {
			return l.afterHandshake(true)
		}
		return e.guess(d, now)
	}
	dest, source, ok := longIDs(d)
	if !ok || e.side.bridge.isOurs(dest) && len(dest) == relayIDLength {
		return hop{verdict: toRelay}
	}
	l := e.side.legs[e.key(dest)]
	if l == nil {
		// The mate may have issued another ID under encryption, so look for e's own
		// ID, which stays the same.
		for _, f := range e.flows {
			if to := f.legTo(e); to.end.side.legs[to.end.key(source)] == to {
				l = to.other
				l.learn(dest, true)
				break
			}
		}
	}
	if l != nil {
		return l.handshake(d, dest, source, now)
	}
	if isInitial(d, dest) {
		return e.begin(d, dest, source, now)
	}
	return hop{verdict: toRelay}
}

// handshake says where a packet with a long header goes that came by l.
func (l *leg) handshake(d, dest, source []byte, now clock) hop {
	f := l.flow
	allowed := f.answered && !f.over
	for i, dial := range f.dials {
		if dial.leg == l && dial.id == l.other.end.key(source) {
			allowed = !f.over && dial.mayGo(d, now)
			break
		}
		if dial.leg == l.other && dial.id == l.end.key(dest) && !dial.holding {
			f.dials = slices.Delete(f.dials, i, i+1)
			f.answer()
			allowed = !f.over
			break
		}
	}
	if !allowed {
		return hop{verdict: toNobody}
	}
	f.lastLong = now
	l.other.learn(source, true)
	return hop{verdict: toMate, legs: [2]*leg{l}, known: true}
}

// mayGo reports whether a packet of d, which has not been answered, may go on.
func (d *dial) mayGo(packet []byte, now clock) bool {
	switch waited := now - d.began; {
	case !d.holding && d.sent < unansweredDatagrams:
		d.sent++
		return true
	case !d.holding:
		d.leg.flow.bridge.tally.refuse(refusedBridgeUnanswered)
	case waited < firstFlight:
		if len(d.held) < heldDatagrams {
			d.held = append(d.held, slices.Clone(packet))
		}
	case waited < d.hold:
		// This is too soon for a retransmission: the caller has another connection
		// with the mate and closes this one. If it repeats the Initial later, it has
		// not given up after all.
		d.gaveUp, d.held = true, nil
		if d.told {
			d.leg.metDirectly(now)
		}
	}
	return false
}

// answer notes that the callee has answered a dial of f.
func (f *flow) answer() {
	f.answered = true
	for i := range f.legs {
		l := &f.legs[i]
		l.switched = false
		l.credit.Store(flowCredit)
	}
}

// afterHandshake says where a packet with a short header goes that came by l.
func (l *leg) afterHandshake(known bool) hop {
	f, b := l.flow, l.flow.bridge
	if f.over || !f.answered {
		return hop{verdict: toNobody}
	}
	l.short = true
	if l.other.short && !f.established {
		f.established = true
		b.tally.bridges.Add(1)
		n := b.tally.bridged.Add(1)
		b.debug("bridge established", "source_peer", f.legs[0].end.client.id, "destination_peer", f.legs[1].end.client.id, "bridges_since_start", n)
	}
	return hop{verdict: toMate, legs: [2]*leg{l}, known: known}
}

// guess says where a packet goes whose ID no header has shown, because the mate
// issued it under encryption. quinn switches to such an ID once, as server, as soon
// as it has one. quic-go does so as client and as server, and again after thousands
// of packets. Once guess has learned an ID, find knows it.
func (e *end) guess(d []byte, now clock) hop {
	b := e.side.bridge
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
	e.guesses++
	if len(legs) == 0 || len(due) > 1 && e.guesses > guessesPerSecond {
		b.tally.refuse(refusedBridgePacket)
		return hop{verdict: toNobody}
	}
	u := e.doubt(now).recall(e.key(d[1:1+minID]), now)
	u.seen++
	if len(legs) > 1 {
		legs = u.likely(legs, now)
	}
	// A stateless reset also begins with random bytes (RFC 9000, 10.3), but those
	// never come twice.
	if l := legs[0]; u.seen > 1 && (len(legs) == 1 || now-u.since > settledTime) {
		n := int(l.idLength)
		if n == 0 || len(d) <= n {
			n = minID
		}
		l.learn(d[1:1+n], true)
		l.switched, l.packets, u.key = true, 0, 0
		legs = legs[:1]
	}
	way := legs[0].afterHandshake(false)
	if len(legs) > 1 {
		way.legs[1] = legs[1] // the wrong mate can't decrypt it, and drops it
	}
	return way
}

// likely returns those of legs that u may belong to, the likeliest first, at most
// two.
func (u *unknownID) likely(legs []*leg, now clock) []*leg {
	still := slices.DeleteFunc(slices.Clone(legs), func(l *leg) bool {
		// A leg that still uses a known ID has not switched.
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

// recall returns the record of an unknown ID. For a new ID it replaces the oldest
// record.
func (s *doubts) recall(key uint64, now clock) *unknownID {
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
func (e *end) begin(d, dest, source []byte, now clock) hop {
	b := e.side.bridge
	p, here := e.here()
	if !here {
		return hop{verdict: toRelay} // the client is connecting to the relay again
	}
	o := e.meant(now)
	if o == nil {
		return e.stray(source, now)
	}
	told := o.open(e, now)
	o.dialled, o.restsUntil = now, 0
	at, ok := o.conn.where()
	if !ok || at.addr == e.addr() {
		return hop{verdict: toNobody}
	}
	callee := b.end(o.mate, o.conn, now)
	if callee == nil {
		return hop{verdict: toNobody}
	}
	f, network := e.flowWith(callee), networkOf(e.addr().Addr())
	switch {
	case b.closed:
		b.tally.refuse(refusedStopping)
		return hop{verdict: toNobody}
	case f == nil && (len(e.flows) >= flowsPerClient || len(callee.flows) >= flowsPerClient),
		f != nil && len(f.dials) >= dialsPerFlow,
		!b.roomForDial(network),
		f == nil && !b.roomForFlow(network): // last, or a flow could be lost for nothing
		b.tally.refuse(refusedBridge)
		return hop{verdict: toNobody}
	}
	if f == nil {
		f = newFlow(e, callee, now)
	}
	l := f.legOf(e)
	dial := &dial{
		leg: l, network: network, id: callee.key(source), began: now, told: told, holding: true, held: [][]byte{slices.Clone(d)},
		hold: min(minHold+(p.rtt+at.rtt)/2, maxHold),
	}
	f.dials = append(f.dials, dial)
	b.holding++
	b.heldRanks.change(len(b.held[network]), len(b.held[network])+1)
	b.held[network] = append(b.held[network], dial)
	l.learn(dest, false)
	l.other.learn(source, true)
	b.debug("bridge dialled", "source_peer", e.client.id, "destination_peer", callee.client.id, "rtt", p.rtt+at.rtt)
	b.after(dial.hold, dial.release)
	return hop{verdict: toNobody}
}

// roomForDial reports whether another dial from that network can be held. If all places
// are taken, the network that has most gives up the place of its oldest dial, unless the
// one that asks would then have as many. Only a datagram is lost: the caller repeats it,
// and then it goes on at once.
func (b *bridge) roomForDial(network netip.Prefix) bool {
	if b.holding < b.limits.holding() {
		return true
	}
	most := b.heldRanks.most()
	if most <= len(b.held[network])+1 {
		return false
	}
	for _, held := range b.held {
		if len(held) == most {
			held[0].letGo()
			break
		}
	}
	return true
}

// roomForFlow reports whether that network can begin another flow. If all are taken, the
// network that has begun most loses one, unless the one that asks would then have as many.
// It loses one that nobody has answered, or else the one that began last. Finding that takes
// 0.2 ms among 20 000 flows, but a network cannot have it done more often than it can begin
// flows.
func (b *bridge) roomForFlow(network netip.Prefix) bool {
	if b.flows < b.limits.flows() {
		return true
	}
	own, most := 0, b.flowRanks.most()
	if c := b.byCaller[network]; c != nil {
		own = c.flows
	}
	if most <= own+1 {
		return false
	}
	var last *flow
	for _, sd := range b.sides {
		for _, e := range sd.ends {
			for _, f := range e.flows {
				if f.callers.flows == most && (last == nil || last.answered && !f.answered || last.answered == f.answered && f.began > last.began) {
					last = f
				}
			}
		}
	}
	last.remove("others need its place")
	return true
}

// stray drops an Initial for which the client has no mate, once: if the client wants
// the relay itself, it sends the Initial again.
func (e *end) stray(source []byte, now clock) hop {
	if e.doubt(now).again(e.key(source), now) {
		return hop{verdict: toRelay}
	}
	e.side.bridge.tally.refuse(refusedBridgeStray)
	return hop{verdict: toNobody}
}

// again reports whether the Initial with that source ID has come before, and remembers
// it. For a new one it forgets the oldest.
func (s *doubts) again(id uint64, now clock) bool {
	oldest := &s.strays[0]
	for i := range s.strays {
		one := &s.strays[i]
		if one.id == id {
			return true
		}
		if one.at < oldest.at {
			oldest = one
		}
	}
	*oldest = stray{id, now}
	return false
}

// flowWith returns the flow between e and other, or nil.
func (e *end) flowWith(other *end) *flow {
	for _, f := range e.flows {
		if f.legTo(e).end != other {
			continue
		}
		if f.over { // the client dials again, which makes a new flow
			f.remove("dialled again")
			return nil
		}
		return f
	}
	return nil
}

func newFlow(caller, callee *end, now clock) *flow {
	b, network := caller.side.bridge, networkOf(caller.addr().Addr())
	c := b.byCaller[network]
	if c == nil {
		c = &callers{network: network}
		b.byCaller[network] = c
	}
	f := &flow{bridge: b, callers: c, began: now}
	for i, e := range []*end{caller, callee} {
		l := &f.legs[i]
		l.flow, l.end, l.other, l.heard = f, e, &f.legs[1-i], now
		l.credit.Store(unansweredDatagrams * maxDatagram)
		e.flows = append(e.flows, f)
	}
	b.flows++
	b.flowRanks.change(c.flows, c.flows+1)
	c.flows++
	return f
}

// release sends the datagrams held for d. The caller holds no lock.
func (d *dial) release() {
	f, b := d.leg.flow, d.leg.flow.bridge
	b.lock()
	now := b.clock()
	if !d.holding { // the dial has ended meanwhile
		b.unlock()
		return
	}
	if !d.gaveUp && d.leg.other.end.busy(f, now) && now-d.began < busyHold {
		b.unlock()
		b.after(busyCheck, d.release)
		return
	}
	held, to := d.held, d.leg.other.end.target
	if f.over {
		held = nil
	}
	d.letGo()
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

// busy reports whether a flow other than f is calling e, and e has not switched yet
// to the ID that it will use there.
func (e *end) busy(f *flow, now clock) bool {
	return slices.ContainsFunc(e.flows, func(g *flow) bool {
		l := g.legOf(e)
		return g != f && !g.over && l.called != 0 && !l.switched &&
			(now-l.called < busyTime || g.answered && now-l.called < busyHold)
	})
}
