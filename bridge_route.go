package main

// Routing decides where each datagram from a client goes: to quic-go, to a mate, or
// nowhere. The reader of a socket asks for every datagram, so this is the hot part.
// It takes one lock and reads the clock once for all that was read at once, and it
// compares a few bytes for a packet that follows another of its kind.

import (
	"hash/maphash"
	"net/netip"
	"slices"
	"time"
)

// take sees what was read from the side's socket, sends what is for mates, and
// leaves what is for quic-go. Only the socket's reader calls it.
func (sd *side) take(batch []arrival) {
	b := sd.bridge
	runs := sd.runs[:0]
	var now clock
	sd.mu.Lock()
	for i := range batch {
		var e *end
		if len(sd.ends) > 0 {
			e = sd.ends[batch[i].from]
		}
		if len(batch[i].data) == 0 || e == nil && !isLong(batch[i].data) {
			continue
		}
		if now == 0 {
			now = b.clock()
		}
		runs = sd.split(runs, i, &batch[i], e, now)
	}
	for i := range runs {
		if r := &runs[i]; r.leg != nil {
			sd.charge(r, batch[r.message].size, now)
		}
	}
	sd.mu.Unlock()
	for i := range runs {
		sd.send(batch, runs[i:])
	}
	for i := 0; i < len(runs); {
		i = keep(&batch[runs[i].message], runs, i)
	}
	clear(runs)
	sd.runs = runs
}

// send sends the first of runs if it goes to a mate, together with later runs to the
// same mate. A busy flow fills several messages of a batch, and the kernel accepts
// as many datagrams of one size at a time as one message holds.
func (sd *side) send(batch []arrival, runs []stretch) {
	first, to := &batch[runs[0].message], runs[0].target
	if to == nil {
		return
	}
	parts, size, total := sd.parts[:0], 0, 0
	for i := range runs {
		r := &runs[i]
		if r.target != to {
			continue
		}
		a := &batch[r.message]
		p := a.data[r.from:r.to]
		n := min(a.size, len(p)) // the size of its first datagram
		if len(parts) == 0 {
			size = n
		} else if total%size != 0 || n > size || n < size && len(p) > n || a.ecn != first.ecn ||
			total+len(p) > maxSend || total/size+(len(p)+size-1)/size > maxSegments {
			break // send the rest later, so that it overtakes nothing
		}
		parts, total = append(parts, p), total+len(p)
		r.target = nil
	}
	to.send(parts, size, first.ecn)
	clear(parts)
	sd.parts = parts
}

// keep cuts a message down to what runs leave to quic-go, beginning at index i. It
// returns the index of the next message's first run.
func keep(a *arrival, runs []stretch, i int) int {
	message, kept := runs[i].message, 0
	for ; i < len(runs) && runs[i].message == message; i++ {
		if r := &runs[i]; r.leg == nil {
			kept += copy(a.data[kept:], a.data[r.from:r.to])
		}
	}
	a.data = a.data[:kept]
	return i
}

// split appends the runs of a message from e, or none if all of it goes to quic-go.
func (sd *side) split(runs []stretch, message int, a *arrival, e *end, now clock) []stretch {
	first, diverted := len(runs), false
	add := func(l *leg, known bool, from, to int) {
		if n := len(runs) - 1; n >= first && runs[n].leg == l && runs[n].to == from {
			runs[n].to = to
			runs[n].known = runs[n].known || known
			return
		}
		runs = append(runs, stretch{message: message, from: from, to: to, leg: l, known: known})
	}
	for from := 0; from < len(a.data); from += a.size {
		to := min(from+a.size, len(a.data))
		d := a.data[from:to]
		way := sd.follow(e, d)
		if e == nil && isLong(d) {
			way.verdict = sd.greet(a.from, d, now)
		}
		if way.verdict == unsure {
			// decide needs both locks, taken in their order.
			sd.mu.Unlock()
			sd.bridge.lock()
			if e = sd.ends[a.from]; e != nil {
				way = e.decide(d, now)
			} else {
				way = hop{verdict: toRelay}
			}
			sd.bridge.unlock()
			sd.mu.Lock()
			e = sd.ends[a.from]
		}
		switch way.verdict {
		case toRelay:
			add(nil, false, from, to)
			continue
		case toMate:
			for _, l := range way.legs {
				if l != nil {
					add(l, way.known, from, to)
				}
			}
		}
		diverted = true
	}
	switch {
	case !diverted:
		return runs[:first]
	case len(runs) == first: // all of it is dropped, and this run tells keep so
		runs = append(runs, stretch{message: message})
	}
	return runs
}

// greet says where a packet with a long header goes that comes from an unknown
// address. When the relay has restarted, a client that comes back dials the relay
// and, at the same moment and at the same address, the mates that it knew. So greet
// drops the second Initial once. A second later, when the client repeats it, the
// client is connected and has asked for its mates. Without this, a dial that reached
// the relay in place of a mate was not tried again before the client's next tick.
// The caller holds the lock of sd.
func (sd *side) greet(from netip.AddrPort, d []byte, now clock) verdict {
	dest, source, ok := longIDs(d)
	if !ok {
		return toRelay
	}
	addr, id := maphash.Comparable(sd.bridge.seed, from), maphash.Bytes(sd.bridge.seed, source)
	n := &sd.newcomers[addr%uint64(len(sd.newcomers))]
	if sd.bridge.isOurs(dest) && n.addr == addr {
		n.addr = 0 // the relay has answered its first dial, so its next Initial starts afresh
	}
	if !isInitial(d, dest) || sd.bridge.isOurs(dest) {
		return toRelay
	}
	if n.addr != addr || now-n.at > newcomerTime {
		*n = newcomer{addr: addr, at: now, ids: [newcomerDials]uint64{id}, dials: 1}
		return toRelay
	}
	if n.dials == newcomerDials || slices.Contains(n.ids[:n.dials], id) {
		return toRelay
	}
	n.ids[n.dials] = id
	n.dials++
	return toNobody
}

// follow finds where a packet goes if that takes no thought, and says unsure if it
// does. The client at e may have gone. The caller holds the lock of sd.
func (sd *side) follow(e *end, d []byte) hop {
	switch {
	case e == nil:
		return hop{verdict: toRelay}
	case isLong(d):
		return hop{verdict: unsure}
	case len(e.flows) == 0 || len(d) <= relayIDLength:
		return hop{verdict: toRelay}
	}
	l := e.last
	if l == nil || !e.lastID.is(d[1:]) {
		if sd.bridge.isOurs(d[1:]) {
			return hop{verdict: toRelay}
		}
		var id []byte
		if l, id = e.find(d); l == nil {
			return hop{verdict: unsure}
		}
		e.last, e.lastID.length = l, uint8(copy(e.lastID.bytes[:], id))
	}
	switch {
	case l.flow.over:
		return hop{verdict: toNobody}
	case !l.flow.established:
		return hop{verdict: unsure}
	}
	return hop{verdict: toMate, legs: [2]*leg{l}, known: true}
}

// charge counts a run, and drops it if that exceeds a limit. The caller holds the
// lock of sd.
func (sd *side) charge(r *stretch, size int, now clock) {
	b, l, n := sd.bridge, r.leg, int64(r.to-r.from)
	if l.flow.over {
		return
	}
	if b.maxBytes > 0 && l.bytes+n > b.maxBytes {
		l.full = true // sweep will end the flow
	}
	if l.full {
		return
	}
	if r.known {
		l.known = now
		l.other.credit.Store(flowCredit)
	}
	l.heard = now
	l.packets += int(n) / size
	if l.credit.Add(-n) < 0 {
		l.credit.Add(n)
		b.tally.refuse(refusedBridgeUnanswered)
		return
	}
	if b.bandwidth != nil {
		if n = b.allowed(l.flow.callers, n, int64(size), now); n == 0 {
			return
		}
		r.to = r.from + int(n)
	}
	l.bytes += n
	b.tally.bridgedBytes.Add(n)
	r.target = l.other.end.target
}

// allowed returns how many of n bytes, in datagrams of size, fit into
// --max-bandwidth. A circuit waits for its turn, but a packet cannot wait. So
// allowed lets packets overdraw the limit as far as waiting circuits do.
//
// If the bridges that began in the caller's network have carried less than its share in
// this second, they may overdraw the limit twice as far. Without that, beside a bridge that
// sent twelve times the limit, 99 of 100 packets of all others were dropped
// (TestBandwidthIsShared).
func (b *bridge) allowed(by *callers, n, size int64, now clock) (allowed int64) {
	at := b.began.Add(now)
	limit := float64(b.bandwidth.Limit())
	owed := -limit * (2 * turnTime).Seconds()
	if second := int64(now / time.Second); by.second.Swap(second) != second {
		by.carried.Store(0)
	}
	for allowed < n {
		d := min(size, n-allowed)
		floor := owed
		if float64(by.carried.Load()+d) <= limit/float64(len(b.byCaller)) {
			floor *= 2
		}
		if b.bandwidth.TokensAt(at) < floor || !b.bandwidth.ReserveN(at, int(d)).OK() {
			b.tally.refuse(refusedBridgeBandwidth)
			break
		}
		by.carried.Add(d)
		allowed += d
	}
	return allowed
}

// tap attaches a socket to its side, and returns the function that sees what arrives
// there.
func (b *bridge) tap(s udpSocket) tapped {
	sd := b.sideOf(addrPort(s.LocalAddr()).Addr())
	b.lock()
	defer b.unlock()
	sd.socket = s
	return sd.take
}
