package main

// What the relay counts while it runs: what it did, what it holds, and what it
// refused and why. Counts are made where things happen, are read by the log's
// summary and by the metrics, and tell nobody's ID or address.

import (
	"bytes"
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

// request is what clients ask of the relay.
type request int

const (
	requestPutValue request = iota
	requestGetValue
	requestFindNode
	requestPing
	requestOther // of the DHT, and not answered
	requestReserve
	requestConnect // a circuit
	requestTypes   // how many there are
)

func (r request) String() string {
	return [requestTypes]string{"put_value", "get_value", "find_node", "ping", "other", "reserve", "connect"}[r]
}

// refusal is why something was refused. A connection counts once for each packet
// that would begin it, and the clients' first flight is of two.
type refusal int

const (
	refusedClient           refusal = iota // all of --max-clients are here
	refusedNetwork                         // --max-clients-per-ip of that network are here, or came in rateWindow
	refusedConnection                      // the device has connsPerPeer
	refusedStream                          // a device, or all together, have too many
	refusedMemory                          // a larger QUIC window, or a circuit's buffers
	refusedReserve                         // a reservation: no room
	refusedCircuit                         // one end has circuitsPerPeer, or all together are too many
	refusedNoReservation                   // a circuit to a device that has none
	refusedUnanswered                      // a circuit that the other device did not take
	refusedStopping                        // a reservation or circuit, as the relay is about to stop
	refusedRecord                          // see recordValidator and boundRequest
	refusedMessage                         // longer than maxKadMessage
	refusedBridge                          // a flow over the bridge: one end has flowsPerClient, or all are too many
	refusedBridgeStray                     // a client's Initial, for which it has no mate
	refusedBridgeUnanswered                // a dial or packets over the bridge that the other device did not answer
	refusedBridgePacket                    // a packet over the bridge: nobody can tell for whom
	refusedBridgeBandwidth                 // packets over the bridge beyond --max-bandwidth
	refusalReasons                         // how many there are
)

func (r refusal) String() string {
	return [refusalReasons]string{
		"max_clients", "max_clients_per_ip", "connections_of_one_client", "streams", "memory",
		"reservation_limit", "circuit_limit", "circuit_no_reservation", "circuit_unanswered", "stopping",
		"record", "dht_message_too_long",
		"bridge_limit", "bridge_no_mate", "bridge_unanswered", "bridge_unknown_packet", "bridge_bandwidth",
	}[r]
}

// tally is what is counted as it happens. The zero value is ready, and so is a
// nil one, which counts nothing.
type tally struct {
	requests     [requestTypes]atomic.Int64
	refused      [refusalReasons]atomic.Int64
	reservations atomic.Int64 // held now
	relayedBytes atomic.Int64 // by circuits, both directions
	bridges      atomic.Int64 // open
	bridged      atomic.Int64 // established
	bridgedBytes atomic.Int64 // both directions
}

func (t *tally) refuse(why refusal) {
	if t != nil {
		t.refused[why].Add(1)
	}
}

// dhtRequest counts a request as the DHT is about to handle it.
func (t *tally) dhtRequest(req *kadpb.Message) {
	kind := requestOther
	switch req.GetType() {
	case kadpb.Message_PUT_VALUE:
		kind = requestPutValue
		// What kad-dht's handler refuses; nobody is told by it.
		rec := req.GetRecord()
		if rec == nil || !bytes.Equal(req.GetKey(), rec.GetKey()) || (recordValidator{}).Validate(string(rec.GetKey()), rec.GetValue()) != nil {
			t.refuse(refusedRecord)
		}
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
	case circuitpb.Status_PERMISSION_DENIED:
		t.refuse(refusedStopping) // circuits.allow has no other reason
	}
}

// tally is told by the resource manager what its limits refuse. It leaves out
// refusedNetwork, of which quicSockets learns.

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
	relayedBytes       int64 // by both, both directions
	bridged            int   // of the connections
	bridgedBytes       int64 // of the bytes
	requests           [requestTypes]int64
	refused            [refusalReasons]int64

	// Now.
	clients      int // distinct peers connected
	connections  int // those in the handshake too; --max-clients is the most
	reservations int64
	circuits     int // open, or being opened
	bridges      int64
	records      int
	recordBytes  int64
}

// attrs are for one line of the log; of the refusals, those that there were.
func (c counters) attrs() []any {
	var refused []any
	for why, n := range c.refused {
		if n > 0 {
			refused = append(refused, slog.Int64(refusal(why).String(), n))
		}
	}
	return []any{
		"peers_served", c.peersServed, "relayed_connections", c.relayedConnections, "bridged_connections", c.bridged,
		"clients", c.clients, "reservations", c.reservations, "circuits", c.circuits, "bridges", c.bridges,
		"relayed_bytes", c.relayedBytes, "bridged_bytes", c.bridgedBytes,
		"records", c.records, "record_bytes", c.recordBytes,
		slog.Group("refused", refused...),
	}
}

// uniqueCounter counts distinct strings in 1 MiB, however many come: linear
// counting (Whang, Vander-Zanden and Taylor 1990). Each sets the bit that its
// hash names, and the share of bits still clear tells how many there were. The
// standard error is 0.25 of one at 1 000, 25 at 100 000 (0.025 %) and stays
// below 0.1 % up to thirty million. The hash is seeded, so that nobody can
// choose IDs that share a bit.
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

// add reports whether s, as far as can be told, is new.
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
