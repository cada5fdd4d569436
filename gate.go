package main

// The gate: which packets of handshakes reach quic-go.
//
// Before a handshake is done, quic-go keeps what comes in CRYPTO frames, even from
// addresses that are forged: 84 KiB in Initial packets took 2.2 MiB for 10 s. A handshake
// needs a few datagrams. So the gate lets a few through for each connection ID, and drops
// what follows. It stands where datagrams arrive, before quic-go reads them, on every
// platform.

import (
	"hash/maphash"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// handshakeDatagrams is how many datagrams with one connection ID pass, of those
	// that begin with a long header. A client sends one to three with the ID that it
	// chose, as many with the ID that the relay chose, and again what is lost, after
	// 1, 2 and 4 s (RFC 9002, 6.2): so it is enough for the 10 s that quic-go gives a
	// handshake.
	handshakeDatagrams = 12

	// handshakeAge is how long a connection ID is remembered, in seconds: twice as long
	// as quic-go keeps a connection whose handshake is not done.
	handshakeAge = 20

	// gateSlots is how many connection IDs the gate tells apart, a power of two. Those
	// that share a slot share its datagrams. Filling all slots takes 40 000 datagrams a
	// second, of which quic-go drops most by itself. They take 512 KiB.
	gateSlots = 1 << 16
)

// gate lets through some datagrams of each handshake. It takes the same memory whatever
// comes. Make it with newGate. Its methods may be called by several goroutines.
type gate struct {
	seed  maphash.Seed
	start time.Time

	// slots hold when the first datagram came, in seconds since start, and how many
	// have come since, in the upper and the lower half.
	slots [gateSlots]atomic.Uint64
}

func newGate() *gate { return &gate{seed: maphash.MakeSeed(), start: time.Now()} }

// behind returns a tap that shows what arrives to first, and then takes out what may not
// pass of the datagrams that first has left for quic-go.
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

// count counts a datagram with that connection ID, which comes so many seconds after
// start, and reports whether it is within handshakeDatagrams.
func (g *gate) count(id []byte, now uint64) bool {
	slot := &g.slots[maphash.Bytes(g.seed, id)%gateSlots]
	for {
		was := slot.Load()
		since, n := was>>32, was&(1<<32-1)
		if n == 0 || now-since >= handshakeAge {
			since, n = now, 0
		}
		if n >= handshakeDatagrams {
			return false
		}
		if slot.CompareAndSwap(was, since<<32|(n+1)) {
			return true
		}
	}
}

// handshakeID returns the destination connection ID of a datagram that begins with a long
// header of some version of QUIC (RFC 8999, 5.1), which is one of a handshake.
func handshakeID(datagram []byte) (id []byte, ok bool) {
	if len(datagram) < 6 || datagram[0]&0x80 == 0 {
		return nil, false
	}
	length := int(datagram[5])
	if len(datagram) < 6+length {
		return nil, false // no packet at all, which quic-go drops
	}
	return datagram[6 : 6+length], true
}
