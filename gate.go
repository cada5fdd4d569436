package main

// The gate: which handshake packets reach quic-go.
//
// Until a handshake is done, quic-go keeps what arrives in CRYPTO frames, even from
// forged addresses: 84 KiB in Initial packets took 2.2 MiB for 10 s. A handshake
// needs only a few datagrams. So the gate lets a few through for each connection ID,
// and drops the rest. It sees datagrams as they arrive, before quic-go reads them,
// on every platform.

import (
	"hash/maphash"
	"slices"
	"sync"
	"time"
)

const (
	// handshakeDatagrams limits how many datagrams that begin with a long header pass
	// with one connection ID. A client sends one to three with the ID that it chose,
	// as many with the ID that the relay chose, and repeats what is lost after 1, 2
	// and 4 s (RFC 9002, 6.2). So the limit suffices for the 10 s that quic-go allows
	// for a handshake. handshakeBurst of them may come in the first second, and
	// handshakePace more in each second after that, so that the tracer sees what is in
	// them before all have passed: see spend.
	handshakeDatagrams = 12
	handshakeBurst     = 6
	handshakePace      = 2

	// handshakeAge sets how long the gate remembers a connection ID, in seconds:
	// twice as long as quic-go keeps a connection whose handshake is not done.
	handshakeAge = 20

	// gateSets and gateWays set how many connection IDs the gate remembers: a set, which
	// a hash chooses, has room for gateWays. They take 512 KiB. In a full set, a new ID
	// takes the place of the one that has had the fewest datagrams. So IDs that have had
	// all of theirs stay, unless 40 000 datagrams a second come; and even then no other
	// ID is kept out.
	gateSets = 1 << 14
	gateWays = 4
)

// gate lets a few datagrams of each handshake through. It takes the same memory
// whatever arrives. Make it with newGate. Several goroutines may call its methods.
type gate struct {
	seed  maphash.Seed
	start time.Time

	mu   sync.Mutex
	sets [gateSets][gateWays]gateCount
}

// gateCount says how many datagrams had a connection ID.
type gateCount struct {
	id    uint32 // a part of the hash
	since uint16 // when the first one came, in seconds since the gate's start, modulo 2^16
	n     uint16 // 0: the place is free
}

func newGate() *gate { return &gate{seed: maphash.MakeSeed(), start: time.Now()} }

// behind returns a tap that first shows what arrives to the tap first. Of the
// datagrams left for quic-go, it then takes out those that may not pass.
func (g *gate) behind(first tapped) tapped {
	return func(batch []arrival) {
		first(batch)
		for i := range batch {
			a := &batch[i]
			kept, read := 0, 0
			for d := range slices.Chunk(a.data, a.size) {
				if g.admit(d) {
					if kept < read {
						copy(a.data[kept:], d)
					}
					kept += len(d)
				}
				read += len(d)
			}
			a.data = a.data[:kept]
		}
	}
}

// admit reports whether a datagram may pass.
func (g *gate) admit(datagram []byte) bool {
	id, ok := handshakeID(datagram)
	return !ok || g.count(id, uint64(time.Since(g.start)/time.Second))
}

// count counts a datagram with that connection ID, and reports whether it is within
// handshakeDatagrams. now is in seconds since start.
func (g *gate) count(id []byte, now uint64) bool {
	hash := maphash.Bytes(g.seed, id)
	g.mu.Lock()
	defer g.mu.Unlock()
	set := &g.sets[hash%gateSets]
	place := &set[0] // of the ID, or the one to give up
	for i := range set {
		c := &set[i]
		if uint16(now)-c.since >= handshakeAge {
			c.n = 0
		}
		if c.n > 0 && c.id == uint32(hash>>32) {
			place = c
			break
		}
		if c.n < place.n {
			place = c
		}
	}
	if place.n == 0 || place.id != uint32(hash>>32) {
		*place = gateCount{uint32(hash >> 32), uint16(now), 0}
	}
	if age := uint16(now) - place.since; place.n >= min(handshakeDatagrams, handshakeBurst+handshakePace*age) {
		return false
	}
	place.n++
	return true
}

// spend lets no more datagrams with that connection ID pass.
func (g *gate) spend(id []byte) {
	now := time.Since(g.start) / time.Second
	g.count(id, uint64(now)) // so that it has a place
	hash := maphash.Bytes(g.seed, id)
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range g.sets[hash%gateSets] {
		if c := &g.sets[hash%gateSets][i]; c.n > 0 && c.id == uint32(hash>>32) {
			c.n = handshakeDatagrams
		}
	}
}

// handshakeID returns the destination connection ID of a datagram that begins with a
// long header of any version of QUIC (RFC 8999, 5.1). All such datagrams belong to
// handshakes.
func handshakeID(datagram []byte) (id []byte, ok bool) {
	if len(datagram) < 6 || datagram[0]&0x80 == 0 {
		return nil, false
	}
	length := int(datagram[5])
	if len(datagram) < 6+length {
		return nil, false // not a QUIC packet; quic-go drops it
	}
	return datagram[6 : 6+length], true
}
