package main

// Where a datagram goes that comes from a client which may be bridged: to quic-go,
// to a mate, or nowhere. The reader of a socket asks for each, so this is the hot
// part: one lock and one look at the clock for all that was read at once, and a
// comparison of a few bytes for a packet that follows another of its kind.

import (
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
	// With a second, crowds of clients that share sockets, as tests have them, were a
	// quarter as fast to come.
	newcomerTime  = 20 * time.Millisecond
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
	if !ok {
		return toRelay
	}
	addr, id := maphash.Comparable(sd.bridge.seed, from), maphash.Bytes(sd.bridge.seed, source)
	n := &sd.newcomers[addr%uint64(len(sd.newcomers))]
	if sd.bridge.isOurs(dest) && n.addr == addr {
		n.addr = 0 // its first dial has been answered: what comes now is another one
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
