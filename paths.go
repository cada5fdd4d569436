package main

// The path guard: what the relay sends to an address that has not asked for it.
//
// When packets of a connection come from another address, quic-go sends a challenge of
// 1200 bytes there, to find out whether the client has moved. Anyone can forge the
// address of such packets: 25 bytes make 1200 for somebody who never asked. RFC 9000, 8.2
// and 9.3.1, allow three times what came from there. quic-go does not count, so the guard
// does, where quic-go sends.

import (
	"hash/maphash"
	"math"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// challengeSize is how long the datagrams are in which quic-go sends a
	// PATH_CHALLENGE or the answer to one on another path, in bytes: PackPathProbePacket
	// in its packet_packer.go. RFC 9000, 8.2.1, wants at least that.
	challengeSize = 1200

	// unprovenFactor is how much may be sent to an address that is not proven, for each
	// byte that came from there (RFC 9000, 8.1).
	unprovenFactor = 3

	// freeChallenges is how many challenges each network gets in pathAge beyond that. A
	// client that moves while it is idle sends about 30 bytes at a time, and twelve times
	// that is less than the 400 bytes which a challenge needs. Without a free one its
	// connection would end. A home of four idle devices can move at once. Somebody whose
	// address is forged gets 160 bytes a second by it.
	freeChallenges = 4

	// pathAge is how long an address and a network are remembered, in seconds: as long
	// as go-libp2p lets a connection be silent.
	pathAge = 30

	// pathSlots is how many addresses and networks are remembered at once, a power of
	// two. One that finds its slot taken gets nothing until that is old. The 256
	// connections that one network may have by default make quic-go challenge 768
	// addresses in 5 s, which is the most (maxPaths in its path_manager.go), so they take
	// a third of the slots at worst. They take 256 KiB.
	pathSlots = 1 << 14
)

// pathGuard decides which challenges are sent from one socket. Make it with newPathGuard.
// Its methods may be called by several goroutines.
type pathGuard struct {
	seed  maphash.Seed
	start time.Time

	// marks says that quic-go marks what it sends (RFC 3168). It does not mark
	// challenges, and everything else of 1200 bytes and more. Windows, Linux before 5.0
	// and QUIC_GO_DISABLE_ECN are without marks: there the guard lets everything pass.
	marks atomic.Bool

	// counting is until when it matters what arrives, in seconds since start. 0: it
	// does not, because nobody has moved lately.
	counting atomic.Int64

	// refused is how many challenges were not sent.
	refused atomic.Int64

	mu    sync.Mutex
	slots [pathSlots]pathAccount
}

// pathAccount is how many bytes may still be sent to an address or a network.
type pathAccount struct {
	id    uint64 // a hash; 0: the slot is free
	since uint32 // when it was opened, in seconds since the guard's start
	bytes int32
}

func newPathGuard() *pathGuard { return &pathGuard{seed: maphash.MakeSeed(), start: time.Now()} }

// now returns the seconds since start, and is never 0.
func (g *pathGuard) now() int64 { return int64(time.Since(g.start)/time.Second) + 1 }

// admits reports whether the datagram d may be sent to an address, with this control
// message. For all but challenges it looks at a few bytes only.
func (g *pathGuard) admits(d, control []byte, to *net.UDPAddr) bool {
	if len(d) != challengeSize {
		return true
	}
	if carriesECN(control) {
		if !g.marks.Load() {
			g.marks.Store(true) // a handshake, which comes before all challenges
		}
		return true
	}
	// quic-go itself counts in handshakes, which have long headers (RFC 9000, 17.2).
	if d[0]&0x80 != 0 || !g.marks.Load() {
		return true
	}
	if !g.spend(addrPort(to), g.now()) {
		g.refused.Add(1)
		return false
	}
	return true
}

// spend takes one challenge from what addr has, or else from what its network has.
func (g *pathGuard) spend(addr netip.AddrPort, now int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.counting.Store(now + pathAge)
	for _, a := range []*pathAccount{
		// What made quic-go send the first challenge has arrived before anybody counted.
		g.account(g.hash(addr), 0, now),
		g.account(maphash.Comparable(g.seed, networkOf(addr.Addr())), freeChallenges*challengeSize, now),
	} {
		if a != nil && a.bytes >= challengeSize {
			a.bytes -= challengeSize
			return true
		}
	}
	return false
}

func (g *pathGuard) hash(addr netip.AddrPort) uint64 { return maphash.Comparable(g.seed, addr) }

// account returns the account with that id, and opens it with so many bytes if there is
// none. It returns nil if another one has the slot. It is called with the lock.
func (g *pathGuard) account(id uint64, bytes int32, now int64) *pathAccount {
	a := &g.slots[id%pathSlots]
	if a.id == 0 || now-int64(a.since) >= pathAge {
		*a = pathAccount{id, uint32(now), bytes}
	}
	if a.id != id {
		return nil
	}
	return a
}

// arrived counts what has come from addresses that were challenged.
func (g *pathGuard) arrived(batch []arrival) {
	until := g.counting.Load()
	if until == 0 {
		return
	}
	if g.now() >= until {
		g.counting.CompareAndSwap(until, 0)
		return
	}
	for i := range batch {
		g.credit(batch[i].from, len(batch[i].data))
	}
}

func (g *pathGuard) credit(from netip.AddrPort, bytes int) {
	id := g.hash(from)
	g.mu.Lock()
	defer g.mu.Unlock()
	if a := &g.slots[id%pathSlots]; a.id == id {
		a.bytes = int32(min(int64(a.bytes)+unprovenFactor*int64(bytes), math.MaxInt32))
	}
}

// guardedSocket is a socket whose challenges pass a guard.
type guardedSocket struct {
	udpSocket
	guard *pathGuard
}

// newGuardedSocket returns s with a guard of its own. Closing it closes s.
func newGuardedSocket(s udpSocket) *guardedSocket {
	g := &guardedSocket{s, newPathGuard()}
	s.show(g.guard.arrived)
	return g
}

func (s *guardedSocket) show(tap tapped) {
	s.udpSocket.show(func(batch []arrival) {
		s.guard.arrived(batch)
		tap(batch)
	})
}

// WriteMsgUDP sends for quic-go, except on Windows. What the guard refuses is lost, as any
// packet may be.
func (s *guardedSocket) WriteMsgUDP(d, control []byte, to *net.UDPAddr) (n, controlN int, err error) {
	if !s.guard.admits(d, control, to) {
		return len(d), len(control), nil
	}
	return s.udpSocket.WriteMsgUDP(d, control, to)
}
