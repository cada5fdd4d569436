package main

// The bridge carries the clients' own QUIC packets between two of them, so that
// any two devices of a group meet, whatever NATs are between.
//
// How: a client dials a mate at every address that an answer of ours names, from
// the socket with which it is connected here. The last of these addresses is our
// own. So the first packet that it sends for the mate, an Initial, arrives here,
// from an address that we know; and we hold the one path that the mate's NAT lets
// in, our own connection with it. The bridge forwards that packet to the mate, and
// all that follow, both ways.
//
// Why it is safe: the two authenticate each other and encrypt end to end. The
// relay has no key. A packet that is forwarded to the wrong client is a dial that
// fails, and never a wrong mate. Nobody is sent anything but by members of its own
// group, at the address from which it has a connection here, and not more than
// they sent.
//
// What it rests on: what is the same in all versions of QUIC (RFC 8999). A long
// header shows both connection IDs, a short one begins with the destination's. And
// on one thing more: the packet that begins a connection is a long header of
// version 1 and type Initial, in a datagram of at least 1200 bytes (RFC 9000,
// 14.1 and 17.2.2).
//
// This file has what is kept, and for how long; bridge_offers.go has who may dial whom,
// bridge_route.go where a datagram goes, and bridge_dial.go handshakes.

import (
	"context"
	"hash/maphash"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"
)

const (
	// offerTime is how long after an answer a dial is for the mate that it named. A
	// client dials at once.
	offerTime = 5 * time.Second

	// notDialled is after how long without a dial it is clear that the client has
	// another connection with that mate, and afterRest when it is offered again
	// though others have not been met: after two of the clients' ticks of 30 s.
	notDialled = 2 * time.Second
	afterRest  = 70 * time.Second

	// An Initial is held for minHold and half of both round trips to the relay, so
	// that a direct dial, made at the same moment, is sooner. Without holding, the
	// bridge won against the direct path on a busy machine. At most it is maxHold:
	// what comes again within it means that the client has given up, and quic-go
	// repeats an Initial after 200 ms (DefaultInitialRTT), quinn after 1 s.
	minHold = 100 * time.Millisecond
	maxHold = 190 * time.Millisecond

	// firstFlight is how long the datagrams of the first flight may take to come:
	// quic-go's has two, which it sends at once.
	firstFlight = 20 * time.Millisecond

	// busyHold is how much longer an Initial is held while its callee is in another
	// handshake, looked at every busyCheck: until the callee has switched to another
	// connection ID, nobody could tell for which of the two that is.
	busyHold  = 2 * time.Second
	busyCheck = 20 * time.Millisecond

	// busyTime is how long a callee is taken to be in a handshake that it has not
	// answered: a long round trip.
	busyTime = 500 * time.Millisecond

	// unansweredTime ends a flow whose callee has not answered. A dial times out
	// after 5 to 10 s, and its third repetition comes after 7.
	unansweredTime = 6 * time.Second

	// flowIdle ends a flow in which one side has been silent for so long: QUIC
	// connections of rust-libp2p's clients time out after 10 s, those of go-libp2p
	// after 30.
	flowIdle = 35 * time.Second

	// flowAbsent ends the flows of a client that has no connection here any more. One
	// whose connection broke is back before.
	flowAbsent = 15 * time.Second

	// metTime is how lately both sides of a flow have sent something where the two
	// are taken to be connected: the clients do so every 5 s.
	metTime = 12 * time.Second

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

	// An ID of fewer than minID bytes could be met by accident. quic-go's have 4,
	// quinn's 8, and none more than maxID (RFC 9000, 17.2).
	minID = 4
	maxID = 20
)

// clock is the time since the bridge began. It is never 0.
type clock = time.Duration

// bridge is made with newBridge. close ends it.
type bridge struct {
	log     *slog.Logger
	tally   *tally
	limits  limits
	network network.Network // set before the relay listens
	peers   *peers
	relays  map[peer.ID][]ma.Multiaddr // the other relays, which are not bridged

	// What the operator chose for circuits bounds flows, too. Of each, the zero
	// value is unlimited.
	maxBytes  int64 // of one flow each way
	maxAge    time.Duration
	bandwidth *rate.Limiter

	seed  maphash.Seed
	began time.Time
	stop  chan struct{}
	done  chan struct{}

	stopping sync.Once

	// testOnlyAfter is called in place of time.AfterFunc.
	testOnlyAfter func(time.Duration, func())

	// sides are those of IPv4 and of IPv6. What is said of clients, ends and flows is
	// read with either one's lock and changed with both; only where a field says so
	// is one enough. So a packet that needs no thought takes its own socket's lock
	// alone.
	sides   [2]*side
	clients map[peer.ID]*client
	flows   int
	holding int  // dials
	closed  bool // to new flows
}

// side is what the reader of one socket needs.
type side struct {
	bridge *bridge
	socket udpSocket // nil: this machine has no such addresses

	mu   sync.Mutex
	ends map[netip.AddrPort]*end
	legs map[uint64]*leg // by the connection ID that a packet carries and the end it comes from: see key

	own []*ownAddr // that clients reach

	newcomers []newcomer // by a hash of the address, which the last one has

	runs  []stretch // the reader's, as parts: kept to be used again
	parts [][]byte
}

// client is one that has asked for a mate, or was dialled by one.
type client struct {
	id     peer.ID
	ends   []*end
	offers []*offer
}

// offer says that a client was told to dial a mate here, or may be.
type offer struct {
	mate    peer.ID
	conn    connection // the mate's
	known   clock      // when the two were known to be of one group last
	asker   *end       // over which the client was told
	named   clock      // when it was told last; 0: not yet
	dialled clock      // when it dialled the mate last; 0: never
	direct  bool       // was told and did not dial: it has another connection with the mate
	near    bool       // the mate is in its network
}

func (o *offer) open(e *end, now clock) bool {
	return o.named != 0 && o.asker == e && now-o.named < offerTime && o.dialled < o.named
}

// end is an address from which a client has a connection here.
type end struct {
	client *client
	side   *side
	conn   connection
	target *target // replaced, never changed
	salt   uint64
	since  clock // when it was first seen
	absent clock // since when conn is closed, and there is no other; 0: it is not

	flows   []*flow
	lengths uint32  // bit n: a packet from here may begin with a connection ID of n bytes
	guesses int32   // unknown IDs forwarded since the last sweep
	doubts  *doubts // nil: none lately

	// With the lock of side: the last leg found, and by which ID.
	last   *leg
	lastID connID
}

// addr is where the end's packets come from.
func (e *end) addr() netip.AddrPort { return e.target.addr }

// doubts is what is remembered of packets from an end that nobody could tell for whom
// they are: the last ones.
type doubts struct {
	strays  [4]stray
	unknown [4]unknownID
	last    clock
}

// doubt returns those of e, or makes them.
func (e *end) doubt(now clock) *doubts {
	if e.doubts == nil {
		e.doubts = new(doubts)
	}
	e.doubts.last = now
	return e.doubts
}

// target is where packets for an end go.
type target struct {
	side *side
	addr netip.AddrPort
	from *ownAddr
}

// ownAddr is an address of this machine, and the control message that names it.
type ownAddr struct {
	addr netip.Addr
	source
}

// flow is what goes between two ends: one QUIC connection or, when both dial at
// the same moment or one dials again, several.
type flow struct {
	legs        [2]leg // of the first caller, of its callee
	began       clock
	lastLong    clock // when a handshake's packet was forwarded last, either way
	dials       []*dial
	answered    bool // the callee has answered, once
	established bool // both have sent what only comes after a handshake
	over        bool // nothing more is forwarded
}

// leg is one direction of a flow: the packets that come from end.
type leg struct {
	flow  *flow
	end   *end
	other *leg

	ids      [legIDs]uint64 // the keys by which its packets are known, in a ring
	called   clock          // when the end was called last; 0: never
	idCount  uint32
	idLength uint8 // of those that the other end gave out last, in bytes
	switched bool  // since the last handshake, to an ID that was issued encrypted
	short    bool  // a packet after the handshake has come

	// With the lock of end's side.
	full    bool  // it has carried maxBytes
	heard   clock // when a packet came last
	known   clock // when one with a known ID came last
	packets int   // since it switched its ID
	bytes   int64

	// credit is how many bytes may go before the other end sends something that
	// belongs to this flow. Other goroutines refill it.
	credit atomic.Int64
}

// dial is a handshake that has not been answered.
type dial struct {
	leg     *leg   // of who dials
	id      uint64 // key of the caller's first ID, to which the answer is sent
	began   clock
	hold    time.Duration
	held    [][]byte // until they are sent
	holding bool
	gaveUp  bool // while it was held
	sent    int  // datagrams, to a callee that has not answered
}

// connection is a client's with this relay.
type connection interface {
	// where says where the client is now, unless the connection is closed.
	where() (whereabouts, bool)
}

type whereabouts struct {
	addr  netip.AddrPort
	local netip.Addr // of this machine, at which the client reaches it; or not valid
	rtt   time.Duration
}

type quicConnection struct{ *quic.Conn }

func (c quicConnection) where() (p whereabouts, ok bool) {
	if c.Context().Err() != nil {
		return p, false
	}
	p.addr = whereIs(c.Conn)
	if local := addrPort(c.LocalAddr()).Addr(); local.IsValid() && !local.IsUnspecified() {
		p.local = local
	}
	p.rtt = c.ConnectionStats().MinRTT
	// An address with a zone is on this machine's own link, and so is the mate.
	return p, p.addr.IsValid() && p.addr.Addr().Zone() == ""
}

func newBridge(log *slog.Logger, t *tally, l limits, p *peers, relays map[peer.ID][]ma.Multiaddr) *bridge {
	b := &bridge{
		log: log, tally: t, limits: l, peers: p, relays: relays,
		seed: maphash.MakeSeed(), began: time.Now(), stop: make(chan struct{}), done: make(chan struct{}),
		clients: make(map[peer.ID]*client),
	}
	for i := range b.sides {
		b.sides[i] = &side{bridge: b, ends: make(map[netip.AddrPort]*end), legs: make(map[uint64]*leg), newcomers: make([]newcomer, newcomers)}
	}
	return b
}

// follow keeps b up to date with the clients of n until close. It is called before
// any of them comes.
func (b *bridge) follow(n network.Network) {
	b.network = n
	go func() { // close waits for it
		defer close(b.done)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				b.sweep(b.clock())
			case <-b.stop:
				return
			}
		}
	}()
}

// close may be called without follow, and more than once.
func (b *bridge) close() {
	b.drain()
	if b.network != nil {
		b.stopping.Do(func() { close(b.stop) })
		<-b.done
	}
}

// drain refuses new flows. Those that are open go on.
func (b *bridge) drain() {
	b.lock()
	defer b.unlock()
	b.closed = true
}

func (b *bridge) sideOf(addr netip.Addr) *side {
	if addr.Is4() {
		return b.sides[0]
	}
	return b.sides[1]
}

func (b *bridge) clock() clock { return time.Since(b.began) + 1 }

func (b *bridge) after(d time.Duration, do func()) {
	if b.testOnlyAfter != nil {
		b.testOnlyAfter(d, do)
		return
	}
	time.AfterFunc(d, do)
}

func (b *bridge) lock()   { b.sides[0].mu.Lock(); b.sides[1].mu.Lock() }
func (b *bridge) unlock() { b.sides[1].mu.Unlock(); b.sides[0].mu.Unlock() }

// connections are those of a client, the newest first.
func (b *bridge) connections(id peer.ID) (conns []connection) {
	for _, c := range slices.Backward(b.network.ConnsToPeer(id)) {
		if q := connectionOf(c); q != nil {
			conns = append(conns, q)
		}
	}
	return conns
}

func connectionOf(c network.Conn) connection {
	var q *quic.Conn
	if !c.As(&q) {
		return nil // a circuit's
	}
	return quicConnection{q}
}

// legOf is the one of what comes from e, legTo the other.
func (f *flow) legOf(e *end) *leg {
	if f.legs[0].end == e {
		return &f.legs[0]
	}
	return &f.legs[1]
}
func (f *flow) legTo(e *end) *leg { return f.legOf(e).other }

// end returns that of a client's connection, or makes it. It is nil if the
// connection is closed. It is called with both locks held.
func (b *bridge) end(id peer.ID, conn connection, now clock) *end {
	p, ok := conn.where()
	if !ok {
		return nil
	}
	sd := b.sideOf(p.addr.Addr())
	if sd.socket == nil {
		return nil
	}
	e := sd.ends[p.addr]
	if e != nil && e.client.id != id { // another one has come to this address
		b.removeEnd(e)
		e = nil
	}
	if e == nil {
		c := b.clients[id]
		if c == nil {
			c = &client{id: id}
			b.clients[id] = c
		}
		e = &end{client: c, side: sd, salt: rand.Uint64(), since: now}
		c.ends = append(c.ends, e)
		sd.ends[p.addr] = e
	}
	e.conn, e.absent = conn, 0
	e.aim(p)
	return e
}

// aim says where packets for e go.
func (e *end) aim(p whereabouts) {
	if e.target != nil && e.target.addr == p.addr && e.target.from.addr == p.local {
		return
	}
	sd := e.side
	at := slices.IndexFunc(sd.own, func(o *ownAddr) bool { return o.addr == p.local })
	if at < 0 {
		at = len(sd.own)
		sd.own = append(sd.own, &ownAddr{p.local, sourceOf(p.local)})
	}
	e.target = &target{sd, p.addr, sd.own[at]}
}

func (t *target) send(parts [][]byte, size int, ecn byte) {
	t.side.socket.send(parts, size, ecn, t.addr, t.from.source)
}

// here reports whether the client has the connection of e, at its address.
func (e *end) here() (whereabouts, bool) {
	p, ok := e.conn.where()
	return p, ok && p.addr == e.addr()
}

// removeEnd forgets e and its flows.
func (b *bridge) removeEnd(e *end) {
	for _, f := range slices.Clone(e.flows) {
		b.removeFlow(f, "its client has left")
	}
	delete(e.side.ends, e.addr())
	c := e.client
	c.ends = slices.DeleteFunc(c.ends, func(o *end) bool { return o == e })
	if len(c.ends) == 0 {
		delete(b.clients, c.id)
	}
}

// finish ends what f carries, and keeps it so that what still comes is dropped.
func (b *bridge) finish(f *flow, why string) {
	if f.over {
		return
	}
	f.over = true
	if f.established {
		b.tally.bridges.Add(-1)
	}
	b.debug("bridge closed", "source_peer", f.legs[0].end.client.id, "destination_peer", f.legs[1].end.client.id,
		"reason", why, "sent_bytes", f.legs[0].bytes, "received_bytes", f.legs[1].bytes, "duration", b.clock()-f.began)
}

func (b *bridge) removeFlow(f *flow, why string) {
	b.finish(f, why)
	b.flows--
	for _, d := range f.dials {
		b.letGo(d)
	}
	for i := range f.legs {
		l := &f.legs[i]
		for _, key := range l.ids[:min(l.idCount, legIDs)] {
			delete(l.end.side.legs, key)
		}
		e := l.end
		if e.last = nil; len(e.flows) == 1 {
			e.flows, e.lengths = nil, 0
		} else {
			e.flows = slices.DeleteFunc(e.flows, func(o *flow) bool { return o == f })
		}
	}
}

// sweep ends what has lasted too long, and follows clients whose address has
// changed.
func (b *bridge) sweep(now clock) {
	type found struct {
		e    *end
		conn connection
		at   whereabouts
		ok   bool
	}
	var ends []found
	b.lock()
	for _, sd := range b.sides {
		for _, e := range sd.ends {
			ends = append(ends, found{e: e, conn: e.conn})
		}
	}
	b.unlock()
	// Without the locks, for libp2p has its own.
	for i := range ends {
		f := &ends[i]
		if f.at, f.ok = f.conn.where(); f.ok {
			continue
		}
		for _, conn := range b.connections(f.e.client.id) {
			if p, ok := conn.where(); ok && p.addr == f.e.addr() {
				f.conn, f.at, f.ok = conn, p, true
			}
		}
	}
	b.lock()
	defer b.unlock()
	for _, f := range ends {
		e := f.e
		if e.side.ends[e.addr()] != e {
			continue // it has gone meanwhile
		}
		switch {
		case f.ok:
			e.conn, e.absent = f.conn, 0
			if f.at.addr == e.addr() || b.move(e, f.at.addr) {
				e.aim(f.at)
			}
		case e.absent == 0:
			e.absent = now
		}
		b.sweepEnd(e, now)
	}
}

// move lets e be found at another address, which a NAT has given its client, if it
// can be. It is to be aimed there.
func (b *bridge) move(e *end, to netip.AddrPort) bool {
	if b.sideOf(to.Addr()) != e.side {
		return false
	}
	if other := e.side.ends[to]; other != nil {
		if other.client == e.client && len(other.flows) > 0 {
			return false // it came back there by itself
		}
		b.removeEnd(other)
	}
	b.debug("bridge follows a client", "peer", e.client.id, "remote_addr", to)
	delete(e.side.ends, e.addr())
	e.side.ends[to] = e
	return true
}

func (b *bridge) sweepEnd(e *end, now clock) {
	if e.guesses = 0; e.doubts != nil && now-e.doubts.last > switchTime {
		e.doubts = nil
	}
	for _, f := range slices.Clone(e.flows) {
		if f.legs[0].end != e {
			continue // its other end's turn
		}
		f.dials = slices.DeleteFunc(f.dials, func(d *dial) bool {
			if now-d.began < unansweredTime {
				return false
			}
			if b.letGo(d); !d.gaveUp {
				b.tally.refuse(refusedBridgeUnanswered)
			}
			return true
		})
		silent := now - min(f.legs[0].heard, f.legs[1].heard)
		absent := max(f.legs[0].end.absent, f.legs[1].end.absent)
		switch {
		case !f.answered && len(f.dials) == 0:
			b.removeFlow(f, "not answered")
		case f.answered && silent > flowIdle:
			b.removeFlow(f, "idle")
		case absent != 0 && now-absent > flowAbsent:
			b.removeFlow(f, "its client has left")
		case f.legs[0].full || f.legs[1].full:
			b.finish(f, "carried as much as a connection may")
		case b.maxAge > 0 && now-f.began > b.maxAge:
			b.finish(f, "lasted as long as a connection may")
		}
	}
	c := e.client
	c.offers = slices.DeleteFunc(c.offers, func(o *offer) bool { return now-o.known > groupAge })
	if len(e.flows) == 0 && (len(c.offers) == 0 || e.absent != 0) {
		b.removeEnd(e)
	}
}

// debug logs without a cost where nobody reads it.
func (b *bridge) debug(msg string, args ...any) {
	if b.log.Enabled(context.Background(), slog.LevelDebug) {
		b.log.Debug(msg, args...)
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
