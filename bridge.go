package main

// The bridge forwards the clients' own QUIC packets from one to the other, so that
// any two devices of a group can meet, whatever NATs stand between them.
//
// How it works: a client dials a mate at every address in our answer, from the
// socket with which it is connected here. The last of these addresses is our own. So
// the client's first packet for the mate, an Initial, arrives here, from an address
// that we know. We also hold the one path that the mate's NAT lets in: the mate's
// connection with us. The bridge forwards that packet to the mate, and all later
// ones, both ways.
//
// Why it is safe: the two clients authenticate each other and encrypt end to end,
// and the relay has no key. A packet forwarded to the wrong client makes a dial
// fail; it never connects the wrong mate. A client receives packets only from
// members of its own group, only at the address from which it is connected here, and
// never more than they sent.
//
// What it relies on: the properties that all versions of QUIC share (RFC 8999). A
// long header shows both connection IDs, and a short header begins with the
// destination's. One more thing is specific to version 1: a connection begins with a
// long header of type Initial, in a datagram of at least 1200 bytes (RFC 9000, 14.1
// and 17.2.2).
//
// This file holds the bridge's state and how long each part lives. bridge_offers.go
// decides who may dial whom, bridge_route.go where a datagram goes, and
// bridge_dial.go handles handshakes.

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
	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"
)

const (
	// unansweredTime ends a flow whose callee has not answered. A dial times out
	// after 5 to 10 s, and its third retransmission comes after 7 s.
	unansweredTime = 6 * time.Second

	// flowIdle ends a flow when one side has been silent for this long. QUIC
	// connections of rust-libp2p's clients time out after 10 s, those of go-libp2p
	// after 30 s.
	flowIdle = 35 * time.Second

	// flowAbsent ends the flows of a client that has no connection here any more. A
	// client whose connection broke is back sooner than that.
	flowAbsent = 15 * time.Second

	// switchTime limits how long after the last handshake packet a client may first
	// switch to another ID: it has to wait for the first ID that the other client
	// issues under encryption. A client that keeps its ID for stayTime will not
	// switch: quinn clients that dialled never do.
	switchTime = 10 * time.Second
	stayTime   = time.Second

	// newcomerTime limits how long dials from one unknown address count as one burst.
	// newcomerDials caps the dials remembered of a burst; later ones all pass. With
	// newcomerTime at one second, crowds of test clients that share sockets connected
	// a quarter as fast.
	newcomerTime  = 20 * time.Millisecond
	newcomerDials = 4

	// minID and maxID bound the length of the IDs that the bridge learns, in bytes. A
	// shorter ID could match by accident. quic-go's IDs have 4 bytes, quinn's 8, and
	// none may have more than maxID (RFC 9000, 17.2).
	minID = 4
	maxID = 20
)

// clock counts the time since the bridge began. It is never 0.
type clock = time.Duration

// bridge forwards packets between clients. Make it with newBridge, end it with
// close.
type bridge struct {
	log     *slog.Logger
	tally   *tally
	limits  limits
	network network.Network // set before the relay listens
	peers   *peers
	isRelay func(peer.ID) bool // reports other relays, which the bridge leaves alone

	// The operator's limits for circuits also bound flows. The zero value of each
	// means unlimited.
	maxBytes  int64 // of one flow, each way
	maxAge    time.Duration
	bandwidth *rate.Limiter

	seed  maphash.Seed
	began time.Time
	stop  func()
	done  chan struct{} // closed when sweeping has stopped

	// testOnlyAfter replaces time.AfterFunc.
	testOnlyAfter func(time.Duration, func())

	// sides[0] serves IPv4 and sides[1] IPv6. To read clients, ends and flows hold
	// the lock of either side, to change them hold both, unless a field says that one
	// is enough. So a packet whose way is known takes the lock of its own socket
	// only.
	sides     [2]*side
	clients   map[peer.ID]*client
	flows     int
	byCaller  map[netip.Prefix]*callers // networks in which flows began
	flowRanks ranks                     // of byCaller, by their flows
	holding   int                       // dials being held
	held      map[netip.Prefix][]*dial  // those of each network, the oldest first
	heldRanks ranks                     // of held, by their dials
	closed    bool                      // no new flows
}

// side holds what the reader of one socket needs.
type side struct {
	bridge *bridge
	socket udpSocket // nil: this machine has no addresses of this family

	mu   sync.Mutex
	ends map[netip.AddrPort]*end
	legs map[uint64]*leg // keyed by a packet's connection ID and the end that sent it: see key

	newcomers []newcomer // indexed by a hash of the address; each slot keeps the latest

	runs  []stretch // runs and parts belong to the reader, which reuses them
	parts [][]byte
}

// client has asked for a mate, or was dialled by one.
type client struct {
	id     peer.ID
	ends   []*end
	offers []*offer
}

// offer records a mate that a client was told, or may be told, to dial here.
type offer struct {
	mate    peer.ID
	conn    connection // the mate's
	known   clock      // when we last saw that both are in one group
	asker   *end       // the end over which the client was told
	named   clock      // when the client was last told; 0: not yet
	dialled clock      // when the client last dialled the mate; 0: never

	restsUntil clock // until then other mates come first
	missed     int   // offers in a row, before the last one, that the client did not take
	near       bool  // the mate is in the client's network
	far        bool  // the mate is of the other IP version
}

// end stands for an address from which a client is connected here.
type end struct {
	client *client
	side   *side
	conn   connection
	target *target // replaced, never changed
	salt   uint64
	since  clock // when it was first seen
	absent clock // since when conn is closed and nothing replaces it; 0: it is open

	flows   []*flow
	lengths uint32  // bit n: a packet from here may begin with a connection ID of n bytes
	guesses int32   // packets with unknown IDs forwarded since the last sweep
	doubts  *doubts // nil: none lately

	// Guarded by side's lock: the last leg found, and the ID that led to it.
	last   *leg
	lastID connID
}

// addr returns the address that the end's packets come from.
func (e *end) addr() netip.AddrPort { return e.target.addr }

// doubts remembers the last packets from an end whose receiver nobody could tell.
type doubts struct {
	strays  [4]stray
	unknown [4]unknownID
	last    clock
}

// doubt returns the doubts of e, and makes them if there are none.
func (e *end) doubt(now clock) *doubts {
	if e.doubts == nil {
		e.doubts = new(doubts)
	}
	e.doubts.last = now
	return e.doubts
}

// target names where packets for an end go.
type target struct {
	side   *side
	addr   netip.AddrPort
	local  netip.Addr // the address of this machine that they come from; may be invalid
	source source     // the control message that names local
}

// flow carries what two ends send each other: one QUIC connection, or several when
// both dial at the same moment or one dials again.
type flow struct {
	bridge      *bridge
	legs        [2]leg   // from the first caller, and from its callee
	callers     *callers // in the network where the first caller was then
	began       clock
	lastLong    clock // when a handshake packet was last forwarded, either way
	dials       []*dial
	answered    bool // the callee has answered at least once
	established bool // both have sent packets that only follow a handshake
	over        bool // nothing more is forwarded
}

// callers counts what the flows that began in one network take.
type callers struct {
	network netip.Prefix
	flows   int

	// carried is what the flows have carried in this second of the bridge's clock, in bytes.
	// Only --max-bandwidth needs it. The readers of both sockets change it.
	second, carried atomic.Int64
}

// ranks has at n how many networks have n of something. It ends at the most that any has,
// so that nobody has to look at all networks for that: in a flood of Initials, a look at
// 5 000 networks would take 48 µs for each packet, under the locks of both sockets.
type ranks []int

// change notes that a network has had from, and has to now.
func (r *ranks) change(from, to int) {
	for len(*r) <= to {
		*r = append(*r, 0)
	}
	(*r)[to]++
	if from > 0 {
		(*r)[from]--
	}
	for n := len(*r); n > 0 && (n == 1 || (*r)[n-1] == 0); n-- {
		*r = (*r)[:n-1]
	}
}

// most returns the most that any network has.
func (r ranks) most() int { return max(0, len(r)-1) }

// leg carries one direction of a flow: the packets that come from end.
type leg struct {
	flow  *flow
	end   *end
	other *leg

	ids      [legIDs]uint64 // the keys that identify its packets, in a ring
	called   clock          // when the end was last called; 0: never
	idCount  uint32
	idLength uint8 // of the IDs that the other end gave out last, in bytes
	switched bool  // to an ID issued under encryption, since the last handshake
	short    bool  // a packet with a short header has come

	// Guarded by the lock of end's side.
	full    bool  // it has carried maxBytes
	heard   clock // when a packet last came
	known   clock // when a packet with a known ID last came
	packets int   // since the end switched its ID
	bytes   int64

	// credit counts the bytes that may pass before the other end sends something that
	// belongs to this flow. Other goroutines refill it.
	credit atomic.Int64
}

// dial tracks a handshake that has not been answered.
type dial struct {
	leg     *leg         // the caller's
	network netip.Prefix // where the caller is
	id      uint64       // key of the caller's first ID, which the answer is sent to
	began   clock
	hold    time.Duration
	held    [][]byte // datagrams to send when the hold is over
	holding bool
	told    bool // the caller was told to dial this callee here
	gaveUp  bool // the caller gave up during the hold
	sent    int  // datagrams sent to a callee that has not answered
}

// connection connects a client with this relay.
type connection interface {
	// where returns where the client is now, and false if the connection is closed.
	where() (whereabouts, bool)
}

type whereabouts struct {
	addr  netip.AddrPort
	local netip.Addr // the address of this machine that the client reaches; may be invalid
	rtt   time.Duration
}

// quicConnection says where a client is now.
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
	// An address with a zone belongs to a client on this machine's own link, where
	// its mates are too.
	return p, p.addr.IsValid() && p.addr.Addr().Zone() == ""
}

func newBridge(log *slog.Logger, t *tally, l limits, p *peers, isRelay func(peer.ID) bool) *bridge {
	b := &bridge{
		log: log, tally: t, limits: l, peers: p, isRelay: isRelay,
		seed: maphash.MakeSeed(), began: time.Now(), done: make(chan struct{}),
		clients: make(map[peer.ID]*client), byCaller: make(map[netip.Prefix]*callers), held: make(map[netip.Prefix][]*dial),
	}
	for i := range b.sides {
		b.sides[i] = &side{bridge: b, ends: make(map[netip.AddrPort]*end), legs: make(map[uint64]*leg), newcomers: make([]newcomer, newcomers)}
	}
	return b
}

// follow keeps b up to date with the clients of n until close. Call it before any
// client connects.
func (b *bridge) follow(n network.Network) {
	b.network = n
	stopped := make(chan struct{})
	b.stop = sync.OnceFunc(func() { close(stopped) })
	go func() { // close waits for it
		defer close(b.done)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				b.sweep(b.clock())
			case <-stopped:
				return
			}
		}
	}()
}

// close ends the bridge. It may be called without follow, and more than once.
func (b *bridge) close() {
	b.drain()
	if b.network != nil {
		b.stop()
		<-b.done
	}
}

// drain refuses new flows. Open flows go on.
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

// connections returns a client's QUIC connections, the newest first.
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
		return nil // a connection over a circuit
	}
	return quicConnection{q}
}

// legOf returns the leg that carries packets from e, and legTo the leg that carries
// packets to e.
func (f *flow) legOf(e *end) *leg {
	if f.legs[0].end == e {
		return &f.legs[0]
	}
	return &f.legs[1]
}
func (f *flow) legTo(e *end) *leg { return f.legOf(e).other }

// end returns the end of a client's connection, and makes it if there is none. It
// returns nil if the connection is closed. The caller holds both locks.
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
	if e != nil && e.client.id != id { // another client has this address now
		e.remove()
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

// aim sets where packets for e go.
func (e *end) aim(p whereabouts) {
	if e.target == nil || e.target.addr != p.addr || e.target.local != p.local {
		e.target = &target{e.side, p.addr, p.local, sourceOf(p.local)}
	}
}

func (t *target) send(parts [][]byte, size int, ecn byte) {
	t.side.socket.send(parts, size, ecn, t.addr, t.source)
}

// here reports whether e's connection is open and still at e's address, and returns
// where the client is.
func (e *end) here() (whereabouts, bool) {
	p, ok := e.conn.where()
	return p, ok && p.addr == e.addr()
}

// remove forgets e and its flows.
func (e *end) remove() {
	for _, f := range slices.Clone(e.flows) {
		f.remove("a client left")
	}
	delete(e.side.ends, e.addr())
	c := e.client
	c.ends = slices.DeleteFunc(c.ends, func(o *end) bool { return o == e })
	if len(c.ends) == 0 {
		delete(e.side.bridge.clients, c.id)
	}
}

// finish ends f but keeps it, so that its late packets are dropped.
func (f *flow) finish(why string) {
	if f.over {
		return
	}
	f.over = true
	b := f.bridge
	if f.established {
		b.tally.bridges.Add(-1)
	}
	b.debug("bridge closed", "source_peer", f.legs[0].end.client.id, "destination_peer", f.legs[1].end.client.id,
		"reason", why, "sent_bytes", f.legs[0].bytes, "received_bytes", f.legs[1].bytes, "duration", b.clock()-f.began)
}

// remove forgets f.
func (f *flow) remove(why string) {
	f.finish(why)
	b := f.bridge
	b.flows--
	b.flowRanks.change(f.callers.flows, f.callers.flows-1)
	if f.callers.flows--; f.callers.flows == 0 {
		delete(b.byCaller, f.callers.network)
	}
	for _, d := range f.dials {
		d.letGo()
	}
	for i := range f.legs {
		l := &f.legs[i]
		for _, key := range l.ids[:min(l.idCount, legIDs)] {
			delete(l.end.side.legs, key)
		}
		e := l.end
		e.last = nil
		e.flows = slices.DeleteFunc(e.flows, func(o *flow) bool { return o == f })
		if len(e.flows) == 0 {
			e.flows, e.lengths = nil, 0
		}
	}
}

// sweep ends flows that are over or idle, and follows clients whose address has
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
	// Call libp2p without our locks: it has its own.
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
			continue // removed since we looked
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
		e.sweep(now)
	}
}

// move files e under the new address that a NAT gave its client, and reports whether
// it could. The caller then aims e there.
func (b *bridge) move(e *end, to netip.AddrPort) bool {
	if b.sideOf(to.Addr()) != e.side {
		return false
	}
	if other := e.side.ends[to]; other != nil {
		if other.client == e.client && len(other.flows) > 0 {
			return false // the client already dials from there
		}
		other.remove()
	}
	b.debug("bridge follows a client to its new address", "peer", e.client.id, "remote_addr", to)
	delete(e.side.ends, e.addr())
	e.side.ends[to] = e
	return true
}

// sweep sweeps the flows that e began, and forgets e if nothing needs it any more.
func (e *end) sweep(now clock) {
	e.guesses = 0
	if e.doubts != nil && now-e.doubts.last > switchTime {
		e.doubts = nil
	}
	for _, f := range slices.Clone(e.flows) {
		if f.legs[0].end == e { // else its other end sweeps it
			f.sweep(now)
		}
	}
	c := e.client
	c.offers = slices.DeleteFunc(c.offers, func(o *offer) bool { return now-o.known > groupAge })
	if len(e.flows) == 0 && (len(c.offers) == 0 || e.absent != 0) {
		e.remove()
	}
}

// sweep drops the dials of f that nobody answered, and ends f if its time is over.
func (f *flow) sweep(now clock) {
	b := f.bridge
	f.dials = slices.DeleteFunc(f.dials, func(d *dial) bool {
		if now-d.began < unansweredTime {
			return false
		}
		d.letGo()
		if !d.gaveUp {
			b.tally.refuse(refusedBridgeUnanswered)
		}
		return true
	})
	silent := now - min(f.legs[0].heard, f.legs[1].heard)
	absent := max(f.legs[0].end.absent, f.legs[1].end.absent)
	switch {
	case !f.answered && len(f.dials) == 0:
		f.remove("not answered")
	case f.answered && silent > flowIdle:
		f.remove("idle")
	case absent != 0 && now-absent > flowAbsent:
		f.remove("a client left")
	case f.legs[0].full || f.legs[1].full:
		f.finish("data limit reached")
	case b.maxAge > 0 && now-f.began > b.maxAge:
		f.finish("time limit reached")
	}
}

// debug logs at Debug, at no cost when Debug is off.
func (b *bridge) debug(msg string, args ...any) {
	if b.log.Enabled(context.Background(), slog.LevelDebug) {
		b.log.Debug(msg, args...)
	}
}

// letGo stops holding d.
func (d *dial) letGo() {
	if d.holding {
		d.holding = false
		b := d.leg.flow.bridge
		b.holding--
		b.heldRanks.change(len(b.held[d.network]), len(b.held[d.network])-1)
		b.held[d.network] = slices.DeleteFunc(b.held[d.network], func(o *dial) bool { return o == d })
		if len(b.held[d.network]) == 0 {
			delete(b.held, d.network)
		}
	}
	d.held = nil
}

// connID holds a connection ID.
type connID struct {
	length uint8
	bytes  [maxID]byte
}

func (id *connID) is(d []byte) bool {
	n := int(id.length)
	return len(d) > n && string(d[:n]) == string(id.bytes[:n])
}

// unknownID describes an ID that a client began to use but that no header has shown.
type unknownID struct {
	key   uint64
	since clock
	seen  int
}

// stray records an Initial from a client that had no mate to dial.
type stray struct {
	id uint64 // key of its source ID
	at clock
}

// newcomer records the dials from an address that is not known here.
type newcomer struct {
	addr  uint64 // its hash
	at    clock
	ids   [newcomerDials]uint64 // keys of the source IDs
	dials int
}

// stretch marks a part of a message whose datagrams all go the same way.
type stretch struct {
	message  int
	from, to int     // offsets in the message's data
	leg      *leg    // the leg they came by; nil: they go to quic-go
	target   *target // nil: they are dropped
	known    bool    // at least one carries an ID known to belong to the leg
}
