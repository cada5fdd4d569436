package main

// Where a datagram goes that comes from a client which may be bridged: to quic-go,
// to a mate, or nowhere. The reader of a socket asks for each, so this is the hot
// part: one lock and one look at the clock for all that was read at once, and a
// comparison of a few bytes for a packet that follows another of its kind.

import (
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"hash/maphash"
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"github.com/quic-go/quic-go"
)

const (
	// relayIDLength is the length of the connection IDs that the relay gives out for
	// its own connections, in bytes. Half of each is random, and half a keyed hash of
	// that, by which it is known.
	relayIDLength = 8

	// An ID of fewer than minID bytes could be met by accident. quic-go's have 4,
	// quinn's 8, and none more than maxID (RFC 9000, 17.2).
	minID = 4
	maxID = 20

	// reorderTime is by how much packets may be late that were sent before others, and
	// settledTime after how long it is decided to whom an unknown ID belongs.
	reorderTime = 20 * time.Millisecond
	settledTime = 100 * time.Millisecond

	// switchTime is how long after a handshake's last packet a client may use another
	// ID for the first time: it needs the first one that the other issued encrypted. A
	// client that goes on with the one it has for stayTime will stay with it: those of
	// quinn that dialled do.
	switchTime = 10 * time.Second
	stayTime   = time.Second

	// newcomerTime is how long what somebody dials is taken to be at one moment, and
	// newcomerDials how many at most: those of one who dials more are all let through.
	newcomerTime  = time.Second
	newcomerDials = 4

	// switchPackets is after how many packets with one ID quic-go may take another:
	// PacketsPerConnectionID / 2 is 5000, less those that were lost on the way here.
	switchPackets = 4000
)

// connID is a connection ID.
type connID struct {
	length uint8
	bytes  [maxID]byte
}

func (id *connID) is(d []byte) bool {
	n := int(id.length)
	return len(d) > n && string(d[:n]) == string(id.bytes[:n])
}

// unknownID is one that a client began to use and that no header has shown.
type unknownID struct {
	key   uint64
	since clock
	seen  int
}

// stray is an Initial of a client for which it has no mate.
type stray struct {
	id uint64 // key of its source ID
	at clock
}

// newcomer is an address from which somebody dials who is not known here.
type newcomer struct {
	addr  uint64 // its hash
	at    clock
	ids   [newcomerDials]uint64 // of the source IDs
	dials int
}

// stretch is a part of a message whose datagrams all go the same way.
type stretch struct {
	message  int
	from, to int     // in the message's data
	leg      *leg    // by which they came; nil: they are quic-go's
	target   *target // nil: they are dropped
	known    bool    // one of them has an ID that belongs to the leg
}

// verdict is what becomes of a datagram.
type verdict int

const (
	toRelay verdict = iota
	toNobody
	toMate
	unsure // needs both locks
)

// GenerateConnectionID and ConnectionIDLen make b what gives quic-go's Transport
// its connection IDs.
func (b *bridge) GenerateConnectionID() (quic.ConnectionID, error) {
	var id [relayIDLength]byte
	rand.Read(id[:relayIDLength/2])
	binary.LittleEndian.PutUint32(id[relayIDLength/2:], b.mark(id[:relayIDLength/2]))
	return quic.ConnectionIDFromBytes(id[:]), nil
}

func (*bridge) ConnectionIDLen() int { return relayIDLength }

func (b *bridge) mark(random []byte) uint32 { return uint32(maphash.Bytes(b.seed, random)) }

// isOurs reports whether id begins with a connection ID that this relay gave out.
func (b *bridge) isOurs(id []byte) bool {
	return len(id) >= relayIDLength && binary.LittleEndian.Uint32(id[relayIDLength/2:]) == b.mark(id[:relayIDLength/2])
}

// key names an ID in packets that come from e.
func (b *bridge) key(e *end, id []byte) uint64 { return maphash.Bytes(b.seed, id) ^ e.salt }

// take is shown what was read from the side's socket, and leaves what is for
// quic-go. Its one caller is the reader.
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
			b.charge(r, batch[r.message].size, now)
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

// send sends the first of runs, if it is to go to a mate, and what follows and goes
// there as well: a busy flow fills several messages of a batch, and the kernel takes
// as much at a time as one has, of datagrams of one size.
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
		n := min(a.size, len(p)) // of its first datagram
		if len(parts) == 0 {
			size = n
		} else if total%size != 0 || n > size || n < size && len(p) > n || a.ecn != first.ecn ||
			total+len(p) > maxSend || total/size+(len(p)+size-1)/size > maxSegments {
			break // and what comes later must not overtake it
		}
		parts, total = append(parts, p), total+len(p)
		r.target = nil
	}
	to.send(parts, size, first.ecn)
	clear(parts)
	sd.parts = parts
}

// keep leaves of one message what runs say is quic-go's, from i on. It returns where
// the next message's begin.
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

// split appends the runs of a message from e, or none if all of it is quic-go's.
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
			// Another one may need the two locks in their order.
			sd.mu.Unlock()
			sd.bridge.lock()
			if e = sd.ends[a.from]; e != nil {
				way = sd.bridge.decide(e, d, now)
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
	case len(runs) == first: // nothing is left of it, which keep must be told
		runs = append(runs, stretch{message: message})
	}
	return runs
}

// greet says what becomes of a packet with a long header from one who is not known
// here. A client that comes back when the relay has restarted dials it, and at the
// same moment, under the same address, the mates that it knew. The second Initial is
// dropped once: when it comes again, a second later, the client is connected, and has
// asked for its mates. Without, a dial that met this relay in a mate's stead was not
// tried again before the client's next tick. It is called with the lock of sd.
func (sd *side) greet(from netip.AddrPort, d []byte, now clock) verdict {
	dest, source, ok := longIDs(d)
	if !ok || !isInitial(d, dest) {
		return toRelay
	}
	addr, id := maphash.Comparable(sd.bridge.seed, from), maphash.Bytes(sd.bridge.seed, source)
	n := &sd.newcomers[addr%uint64(len(sd.newcomers))]
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

// hop is where a datagram goes.
type hop struct {
	verdict verdict
	legs    [2]*leg // by which it goes to a mate; of two, nobody can tell yet which
	known   bool    // it has an ID that belongs to the leg
}

// follow finds where a packet goes that needs no thought, with the lock of sd. The
// client at e may have gone.
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
		if l, id = sd.bridge.find(e, d); l == nil {
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

// find finds the leg to which the ID belongs that begins a short header, the longest
// of those that it could be.
func (b *bridge) find(e *end, d []byte) (*leg, []byte) {
	for left := e.lengths; left != 0; {
		n := bits.Len32(left) - 1
		left &^= 1 << n
		if len(d) > n {
			if l := e.side.legs[b.key(e, d[1:1+n])]; l != nil {
				return l, d[1 : 1+n]
			}
		}
	}
	return nil, nil
}

// charge counts a run, and drops it if it is more than may be carried. It is called
// with the lock of the run's side.
func (b *bridge) charge(r *stretch, size int, now clock) {
	l, n := r.leg, int64(r.to-r.from)
	if l.flow.over {
		return
	}
	if l.full = l.full || b.maxBytes > 0 && l.bytes+n > b.maxBytes; l.full {
		return // sweep ends the flow
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
		if n = b.allowed(n, int64(size), now); n == 0 {
			return
		}
		r.to = r.from + int(n)
	}
	l.bytes += n
	b.tally.bridgedBytes.Add(n)
	r.target = l.other.end.target
}

// allowed is how many of n bytes, in datagrams of size, --max-bandwidth has room
// for. Circuits wait for their turn, which a packet does not: it is let through as
// long as what is owed is not more than circuits owe, who wait for it.
func (b *bridge) allowed(n, size int64, now clock) (allowed int64) {
	at := b.began.Add(now)
	owed := -float64(b.bandwidth.Limit()) * (2 * turnTime).Seconds()
	for allowed < n {
		d := min(size, n-allowed)
		if b.bandwidth.TokensAt(at) < owed || !b.bandwidth.ReserveN(at, int(d)).OK() {
			b.tally.refuse(refusedBridgeBandwidth)
			break
		}
		allowed += d
	}
	return allowed
}

// isLong reports whether d has a long header (RFC 8999, 5.1).
func isLong(d []byte) bool { return d[0]&0x80 != 0 }

// longIDs reads the connection IDs of a long header (RFC 8999, 5.1).
func longIDs(d []byte) (dest, source []byte, ok bool) {
	const before = 1 + 4 // first byte, version
	if len(d) < before+1 {
		return nil, nil, false
	}
	n := int(d[before])
	if n > maxID || len(d) < before+1+n+1 {
		return nil, nil, false
	}
	rest := d[before+1:]
	dest, rest = rest[:n], rest[n:]
	n = int(rest[0])
	if n > maxID || len(rest) < 1+n {
		return nil, nil, false
	}
	return dest, rest[1 : 1+n], true
}

// isInitial reports whether d, which has a long header, begins a connection of QUIC
// version 1 (RFC 9000, 14.1 and 17.2.2), if dest is its destination's ID.
func isInitial(d, dest []byte) bool {
	return binary.BigEndian.Uint32(d[1:]) == 1 && d[0]&0x30 == 0 && len(d) >= 1200 && len(dest) >= 8
}

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

// learn notes that packets that come by l carry id. If short, it may begin a short
// header.
func (b *bridge) learn(l *leg, id []byte, short bool) {
	n, e := len(id), l.end
	if n < minID || n > maxID || b.isOurs(id) {
		return
	}
	key := b.key(e, id)
	if e.side.legs[key] != nil {
		return // and stays whose it is
	}
	at := l.idCount % legIDs
	if l.idCount >= legIDs {
		delete(e.side.legs, l.ids[at])
		e.last = nil
	}
	l.ids[at] = key
	l.idCount++
	e.side.legs[key] = l
	if short {
		l.idLength = uint8(n)
		e.lengths |= 1 << n
	}
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
	time.AfterFunc(dial.hold, func() { b.release(f, dial) })
	return hop{verdict: toNobody}
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
		time.AfterFunc(busyCheck, func() { b.release(f, d) })
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

// letGo holds a dial no longer.
func (b *bridge) letGo(d *dial) {
	if d.holding {
		d.holding = false
		b.holding--
	}
	d.held = nil
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
