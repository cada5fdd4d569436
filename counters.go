package main

// What the relay counts while it runs: what it has done, what it holds, and what it
// has refused and why. Each room counts what happens in it; the log's summary and
// the metrics read the counts. None of them tells a peer's ID or address.

import (
	"hash/maphash"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"

	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
)

// request is what a client may ask of the relay.
type request int

const (
	requestPutValue request = iota
	requestGetValue
	requestFindNode
	requestPing
	requestOther // another DHT request, which is not answered
	requestReserve
	requestConnect // a circuit
	requestTypes   // how many there are
)

func (r request) String() string {
	return [requestTypes]string{"put_value", "get_value", "find_node", "ping", "other", "reserve", "connect"}[r]
}

// refusal is why something was refused. A refused connection counts once for each packet
// that would have begun it, and the clients' first flight has two.
type refusal int

const (
	refusedClient           refusal = iota // all of --max-clients are here
	refusedNetwork                         // --max-clients-per-ip of that network are here, or came within rateWindow
	refusedConnection                      // the device has connsPerPeer
	refusedStream                          // a device has too many, or all devices together
	refusedMemory                          // a larger QUIC window, a circuit's buffers, a long message; or a connection that took most in small pieces
	refusedReserve                         // a reservation: no room
	refusedCircuit                         // one end has circuitsPerPeer, circuitsPerPair or circuitsPerNetwork, or all are taken
	refusedNoReservation                   // a circuit to a device that has none
	refusedUnanswered                      // a circuit that the other device did not accept
	refusedStopping                        // a reservation, circuit or bridge, as the relay is about to stop
	refusedRecord                          // see checkRecord
	refusedMessage                         // longer than maxKadMessage
	refusedBudget                          // had to wait, or was closed: a network's or connection's budget is spent
	refusedBridge                          // a bridge: one end has flowsPerClient, or all are taken
	refusedBridgeStray                     // an Initial from a client that was told of no other device
	refusedBridgeUnanswered                // packets over the bridge that the other device did not answer
	refusedBridgePacket                    // a packet over the bridge that could be for several devices
	refusedBridgeBandwidth                 // packets over the bridge beyond --max-bandwidth
	refusalReasons                         // how many there are
)

func (r refusal) String() string {
	return [refusalReasons]string{
		"max_clients", "max_clients_per_ip", "connections_of_one_client", "streams", "memory",
		"reservation_limit", "circuit_limit", "circuit_no_reservation", "circuit_unanswered", "stopping",
		"record", "dht_message_too_long", "budget",
		"bridge_limit", "bridge_no_mate", "bridge_unanswered", "bridge_unknown_packet", "bridge_bandwidth",
	}[r]
}

// tally counts things as they happen. The zero value is ready to use. A nil one
// counts no refusals.
type tally struct {
	requests     [requestTypes]atomic.Int64
	refused      [refusalReasons]atomic.Int64
	reservations atomic.Int64 // held now
	relayedBytes atomic.Int64 // by circuits, both directions
	bridges      atomic.Int64 // open now
	bridged      atomic.Int64 // bridges established
	bridgedBytes atomic.Int64 // both directions
}

func (t *tally) refuse(why refusal) {
	if t != nil {
		t.refused[why].Add(1)
	}
}

// dhtRequest counts a request that the DHT is about to handle.
func (t *tally) dhtRequest(typ kadpb.Message_MessageType) {
	kind := requestOther
	switch typ {
	case kadpb.Message_PUT_VALUE:
		kind = requestPutValue
	case kadpb.Message_GET_VALUE:
		kind = requestGetValue
	case kadpb.Message_FIND_NODE:
		kind = requestFindNode
	case kadpb.Message_PING:
		kind = requestPing
	}
	t.requests[kind].Add(1)
}

// circuitRequest counts a request that the circuit relay has answered.
func (t *tally) circuitRequest(kind request, status circuitpb.Status) {
	t.requests[kind].Add(1)
	switch status {
	case circuitpb.Status_RESERVATION_REFUSED:
		t.refuse(refusedReserve)
	case circuitpb.Status_RESOURCE_LIMIT_EXCEEDED:
		t.refuse(refusedCircuit)
	case circuitpb.Status_NO_RESERVATION:
		t.refuse(refusedNoReservation)
	case circuitpb.Status_CONNECTION_FAILED:
		if kind == requestConnect { // else the client left before it had the answer
			t.refuse(refusedUnanswered)
		}
	}
	// circuits answers PERMISSION_DENIED itself, and counts why.
}

// tally is the resource manager's reporter, and so learns what its limits refuse. Its
// limits say nothing about networks: sockets.go and networks.go count refusedNetwork.

func (t *tally) BlockConn(dir network.Direction, _ bool) {
	if dir == network.DirInbound {
		t.refuse(refusedClient)
	}
}

func (t *tally) BlockPeer(peer.ID)                      { t.refuse(refusedConnection) }
func (t *tally) BlockStream(peer.ID, network.Direction) { t.refuse(refusedStream) }
func (t *tally) BlockProtocol(protocol.ID)              { t.refuse(refusedStream) }
func (t *tally) BlockProtocolPeer(protocol.ID, peer.ID) { t.refuse(refusedStream) }
func (t *tally) BlockService(string)                    { t.refuse(refusedStream) }
func (t *tally) BlockServicePeer(string, peer.ID)       { t.refuse(refusedStream) }
func (t *tally) BlockMemory(int)                        { t.refuse(refusedMemory) }

func (*tally) AllowConn(network.Direction, bool)      {}
func (*tally) AllowPeer(peer.ID)                      {}
func (*tally) AllowStream(peer.ID, network.Direction) {}
func (*tally) AllowProtocol(protocol.ID)              {}
func (*tally) AllowService(string)                    {}
func (*tally) AllowMemory(int)                        {}

// counters are all counts at one moment.
type counters struct {
	// Since the start.
	peersServed        int   // distinct peers that have connected
	relayedConnections int   // circuits and bridges established
	relayedBytes       int64 // carried by both, both directions
	bridged            int   // of relayedConnections, those that were bridges
	bridgedBytes       int64 // of relayedBytes, those that bridges carried
	requests           [requestTypes]int64
	refused            [refusalReasons]int64

	// Now.
	clients      int // distinct peers connected
	connections  int // including those in the handshake
	maxClients   int // the most connections at once
	reservations int64
	circuits     int   // open or being opened
	bridges      int64 // open
	records      int
	recordBytes  int64

	relays          int // other relays that are known
	relaysConnected int // those of relays that are connected
}

// attrs returns the attributes of one log line. It leaves out refusals that have
// not happened, and other relays where there are none.
func (c counters) attrs() []any {
	var refused []any
	for why, n := range c.refused {
		if n > 0 {
			refused = append(refused, slog.Int64(refusal(why).String(), n))
		}
	}
	attrs := []any{
		"peers_served", c.peersServed, "relayed_connections", c.relayedConnections, "bridged_connections", c.bridged,
		"clients", c.clients, "reservations", c.reservations, "circuits", c.circuits, "bridges", c.bridges,
		"relayed_bytes", c.relayedBytes, "bridged_bytes", c.bridgedBytes, "records", c.records, "record_bytes", c.recordBytes,
		slog.Group("refused", refused...),
	}
	if c.relays > 0 {
		attrs = append(attrs, "other_relays", c.relays, "other_relays_connected", c.relaysConnected)
	}
	return attrs
}

// uniqueCounter counts distinct strings in 1 MiB, however many come, by linear
// counting (Whang, Vander-Zanden and Taylor 1990). Each string sets the bit at its
// hash, and the share of bits still clear tells how many strings there were. The
// standard error is 0.25 at 1 000, 25 at 100 000 (0.025 %) and stays below 0.1 % up
// to thirty million. The hash is seeded, so that nobody can choose IDs that share a
// bit.
type uniqueCounter struct {
	seed maphash.Seed

	mu   sync.Mutex
	bits []uint64
	set  int // bits set
}

// uniqueBits is a power of two, for the index.
const uniqueBits = 1 << 23

func newUniqueCounter() *uniqueCounter {
	return &uniqueCounter{seed: maphash.MakeSeed(), bits: make([]uint64, uniqueBits/64)}
}

// add counts s, and reports whether it seems to be new.
func (c *uniqueCounter) add(s string) bool {
	i := maphash.String(c.seed, s) % uniqueBits
	word, bit := &c.bits[i/64], uint64(1)<<(i%64)
	c.mu.Lock()
	defer c.mu.Unlock()
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	c.set++
	return true
}

func (c *uniqueCounter) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear := max(uniqueBits-c.set, 1)
	return int(math.Round(-uniqueBits * math.Log(float64(clear)/uniqueBits)))
}
