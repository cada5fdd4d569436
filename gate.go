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
	"sync/atomic"
	"time"
)

const (
	// handshakeDatagrams limits how many datagrams that begin with a long header pass
	// with one connection ID. A client sends one to three with the ID that it chose,
	// as many with the ID that the relay chose, and repeats what is lost after 1, 2
	// and 4 s (RFC 9002, 6.2). So the limit suffices for the 10 s that quic-go allows
	// for a handshake.
	handshakeDatagrams = 12

	// handshakeAge sets how long the gate remembers a connection ID, in seconds:
	// twice as long as quic-go keeps a connection whose handshake is not done.
	handshakeAge = 20

	// gateSlots sets how many connection IDs the gate tells apart. It is a power of
	// two. IDs that share a slot share its datagrams. To fill all slots takes 40 000
	// datagrams a second, and quic-go drops most of those anyway. The slots take 512
	// KiB.
	gateSlots = 1 << 16
)

// gate lets a few datagrams of each handshake through. It takes the same memory
// whatever arrives. Make it with newGate. Several goroutines may call its methods.
type gate struct {
	seed  maphash.Seed
	start time.Time

	// slots hold two numbers each. The upper half is when the slot's first datagram
	// came, in seconds since start; the lower half is how many have come since.
	slots [gateSlots]atomic.Uint64
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
