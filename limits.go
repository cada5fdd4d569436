package main

// Every number that bounds what clients can make the relay hold: memory,
// connections, streams, circuits, records. Each follows from the two that the
// operator chooses, --max-clients and --max-clients-per-ip, so that no default
// of a library bites first. Who applies them is in the other files.

import (
	"fmt"
	"math"
	"net/netip"
	"os"
	"time"

	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	circuit "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	"github.com/libp2p/go-libp2p/x/rate"
)

const (
	// maxAnnounce addresses fit into one reservation, which is a message of at
	// most 4096 bytes (circuit relay v2, in both implementations): with a DNS
	// name of 253 characters and the relay's ID each takes about 310.
	maxAnnounce = 8

	// maxOfferedAddrs is the same bound for the machine's own addresses, which
	// take about 70 each. A host of many containers has dozens.
	maxOfferedAddrs = 16

	// maxBootstrap is how many addresses of other relays are taken. They are named
	// in every answer, beside the mate.
	maxBootstrap = 8

	// maxAddrsPerPeer and maxAddrBytesPerPeer bound what an answer says of one
	// peer: with maxNamed peers, two copies of the key and a record, an answer stays
	// below the 16 KiB above which rust-libp2p drops it (max_packet_size in its
	// kad protocol.rs).
	maxAddrsPerPeer     = 8
	maxAddrBytesPerPeer = 288

	// maxAddrComponents is how many parts an address may have. A circuit through a
	// relay by QUIC has six: /dns/…/udp/…/quic-v1/p2p/…/p2p-circuit/p2p/….
	maxAddrComponents = 8

	// maxKadMessage is the longest DHT request that is read, in bytes. It is
	// rust-libp2p's own limit, so no deployed client can send more; kad-dht
	// would allocate up to 4 MiB on the word of four bytes.
	maxKadMessage = 16 << 10

	// maxRecordValue and maxRecordKey bound a DHT record, in bytes. The clients'
	// keys have 53 (/privstack/syncgroup/ and a hash), their values some hundreds.
	maxRecordValue = 8 << 10
	maxRecordKey   = 256

	// avgRecord is what a record may take on average, in bytes, with what keeping
	// it costs.
	avgRecord = 2 << 10

	// maxRecordAge is how long a record is served unless it is put again; the
	// clients do so every 30 s.
	maxRecordAge = 48 * time.Hour

	// maxCircuitDuration is the longest that fits the protocol's field, which
	// counts seconds in 32 bits.
	maxCircuitDuration = math.MaxUint32 * time.Second

	// maxHTTPConns is the most connections to the identity endpoint at once. An
	// idle one costs 12 KiB: measured with 10 000.
	maxHTTPConns = 1024

	// minBandwidth is the least for --max-bandwidth, in bytes per second: with it
	// the largest sync message, 16 MiB, takes 17 minutes.
	minBandwidth = 16 << 10

	// maxMaxClients is a typo's distance above anything one UDP port carries.
	maxMaxClients = 1_000_000
)

const (
	// clientMemory is what one client costs, in bytes: connected, reserved and
	// serving kad, with a record. Measured: 68 KiB of RSS each at 10 000, 74 at
	// 5 000 (go test -bench Capacity/clients).
	clientMemory = 68 << 10

	// baseMemory is what the relay takes with nobody connected: 20 MiB of RSS,
	// garbage, and some for a burst.
	baseMemory = 48 << 20

	// initialWindow is what a client may send before the relay has read any of it,
	// in bytes, on one stream and on all. quic-go has 512 and 768 KiB, which some
	// hundred clients could fill. The window doubles with each round trip in which
	// it was used up, so a long transfer takes the fifth round trip to get there.
	initialWindow = 32 << 10

	// maxWindow is what it grows to on one stream, and half as much again on a
	// connection: 10 MiB/s for a circuit over 100 ms. With go-libp2p's 10 and 15 MiB
	// a few clients would take what all share.
	maxWindow = 1 << 20

	// sharedMemory is for what comes and goes, in bytes: per client, and sharedBase
	// once. Streams, the buffers of circuits and windows that have grown share it,
	// and whoever comes when it is taken has to do without.
	sharedMemory = 40 << 10
	sharedBase   = 16 << 20

	// streamMemory is what an open stream costs, in bytes, half of it its
	// goroutine's stack. Measured: 11 to 13 KiB for each of the protocols.
	streamMemory = 12 << 10

	// circuitBuffer is the relay's copy buffer for one direction of a circuit,
	// in bytes; both live as long as the circuit. go-libp2p's 2 KiB costs half
	// as much CPU again per byte, more than 64 KiB gains almost nothing.
	circuitBuffer = 16 << 10

	// circuitsPerPeer is how many circuits one device can be part of: one for
	// each other device of its user that only a relay can reach.
	circuitsPerPeer = 64

	// streamsPerPeer bounds the streams open from one peer, and those to it. A
	// circuit takes one, a DHT request one for as long as it runs.
	streamsPerPeer = 2 * circuitsPerPeer

	// maxIncomingStreams is how many a client may have open at once, before the
	// next has to wait. QUIC keeps each, about 2 KiB, until the client has ended it as
	// well, also where the relay has refused it.
	maxIncomingStreams = 32

	// streamShare is how many of them each peer can count on, whatever the others
	// do: a device asks the DHT for three things at a time.
	streamShare = 3

	// connsPerPeer leaves room for a device that comes back over another path
	// before its old connection has timed out.
	connsPerPeer = 4

	// peerMemory is what one peer can take of what is shared, in bytes: the windows
	// of its connections, its streams and circuits.
	peerMemory = connsPerPeer*maxWindow*3/2 + 2*streamsPerPeer*streamMemory + circuitsPerPeer*2*circuitBuffer

	// groupMembers is how many devices of one group are remembered, and of how many
	// mates one knows whether it has met them; groupsPerClient is of how many groups
	// a client can be, where the deployed ones have one. Who has not put the record
	// for groupAge is taken to have left: they do so every 30 s, and it may take them
	// as long again.
	groupMembers    = 16
	groupsPerClient = 2
	groupAge        = 2 * time.Minute

	// flowsPerClient is how many mates a client can be bridged with at once: twice
	// as many as are remembered, for those that come back at another address.
	flowsPerClient = 2 * groupMembers

	// dialsPerFlow is how many dials of one mate can wait for an answer: both dial at
	// the same moment, and again.
	dialsPerFlow = 4

	// heldDatagrams is how many are held of a dial: the first flight has one or two.
	heldDatagrams = 4

	// unansweredDatagrams is how many may go to a mate that has not answered: three
	// first flights of two, and as many repetitions. maxDatagram is how long each may
	// be, in bytes, on the Ethernets that most paths are.
	unansweredDatagrams = 12
	maxDatagram         = 1500

	// flowCredit is how many bytes may go one way of a flow until a packet comes the
	// other way that belongs to it: twice the window of a connection between go-libp2p
	// or rust-libp2p clients (15 MiB), more than can be sent unacknowledged.
	flowCredit = 32 << 20

	// guessesPerSecond is how many packets of one client are forwarded where it is not
	// sure to which of two mates: those of one round trip, a few times.
	guessesPerSecond = 64

	// legIDs is how many connection IDs are remembered of one direction of a flow. A
	// QUIC connection uses three, and two may begin at once.
	legIDs = 8

	// newcomers is of how many addresses, each for IPv4 and IPv6, it is known that
	// somebody dials from there who is not here: 64 KiB of each.
	newcomers = 1024

	// bridgeMemory is what the bridge takes for one client at most, in bytes: four flows
	// of 650 (TestFlowsTakeLittleMemory), an eighth of a dial of 6000 that is held, the
	// mates it was told, its end and its groups.
	bridgeMemory = 6 << 10

	// rateWindow is the time in which one network can open as many connections
	// as it may hold: an office is back at once after a restart of the relay,
	// and nobody can keep it busy with handshakes.
	rateWindow = 30 * time.Second
)

// loopback is exempt from the per-network limits: a reverse proxy, a test, or
// the operator is no stranger.
var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// limits are the two chosen numbers; its methods derive the others.
type limits struct {
	// clients is the most connections, and so reservations, at once.
	clients int

	// perNetwork is the most connections from one IPv4 address or IPv6 /56,
	// the smallest block that providers give to one customer (RIPE-690).
	perNetwork int

	// exempt are the networks to which perNetwork does not apply.
	exempt []netip.Prefix

	// why says where clients comes from, for the log.
	why string

	// available is how much memory this process may use, in bytes; 0 is unknown.
	available uint64
}

// newLimits derives clients from the memory available where maxClients is 0.
func newLimits(maxClients, perIP int) limits {
	available, source := availableMemory(os.DirFS("/"))
	why := "--max-clients"
	if maxClients == 0 {
		maxClients = clientsFor(available)
		why = fmt.Sprintf("%d MiB of memory (%s)", available>>20, source)
		if available == 0 {
			why = "memory unknown, taken as 512 MiB"
		}
	}
	return limits{clients: maxClients, perNetwork: perIP, exempt: loopback, why: why, available: available}
}

// clientsFor is how many clients fit into memory bytes, whatever they do. 0 bytes
// is unknown: then as for half a gigabyte.
func clientsFor(memory uint64) int {
	if memory == 0 {
		memory = 512 << 20
	}
	usable := int64(min(memory, 1<<40)) - (baseMemory + sharedBase)
	return int(min(max(usable/(clientMemory+bridgeMemory+initialWindow+sharedMemory), 64), maxMaxClients))
}

// memory is what the relay takes at most, in bytes, with all of its clients doing
// their worst. With a thousand well-behaved ones it is 60 % of that.
func (l limits) memory() int64 {
	return baseMemory + int64(l.clients)*(clientMemory+bridgeMemory+initialWindow) + l.shared()
}

// goMemory is the part of memory that the Go runtime should stay within, in bytes:
// the rest is the binary's own pages, and what the runtime takes beyond its limit
// in a rush.
func (l limits) goMemory() int64 { return (l.memory() - baseMemory/2) / 8 * 7 }

// shared is how much memory comes and goes, in bytes: see sharedMemory.
func (l limits) shared() int64 { return sharedBase + int64(l.clients)*sharedMemory }

// circuits is the most open at once: every client in one with another.
func (l limits) circuits() int { return max(l.clients/2, circuitsPerPeer) }

// flows is the most that the bridge carries at once: as many as if all clients were
// in groups of nine, and no two of one group could meet otherwise.
func (l limits) flows() int { return max(4*l.clients, flowsPerClient) }

// holding is how many dials may be held at once, each for maxHold and longer.
func (l limits) holding() int { return max(l.clients/8, flowsPerClient) }

// unproven is how many clients may be in the handshake before newcomers have to
// prove their addresses by a Retry, which costs them a round trip.
func (l limits) unproven() int64 { return int64(max(l.clients/8, 16)) }

// streams is the most open at once: everybody's share, and those beside.
func (l limits) streams() int { return streamShare*l.clients + l.unshared() }

// unshared is how many streams may be open beside everybody's share: as many as
// there are clients, or what some busy ones may have.
func (l limits) unshared() int { return max(l.clients, 8*streamsPerPeer) }

// records bounds the DHT's values: how many, and how many bytes all together.
// Two for each client leave room for those who were here and are not now.
func (l limits) records() (n int, bytes int64) {
	n = max(2*l.clients, 1024)
	return n, int64(n) * avgRecord
}

// resources bounds the circuit relay service. A duration or a number of bytes
// (each way) of 0 is unlimited.
func (l limits) resources(duration time.Duration, bytes int64) circuit.Resources {
	res := circuit.Resources{
		ReservationTTL:  time.Hour,
		MaxReservations: l.clients,
		MaxCircuits:     circuitsPerPeer,
		BufferSize:      circuitBuffer,
		// A reservation ends with its peer's last connection, so the limits on
		// connections per network are the limits on reservations too. These
		// would count loopback, and whole providers by IPv6 ASN.
		MaxReservationsPerIP:  l.clients,
		MaxReservationsPerASN: l.clients,
	}
	if duration != 0 || bytes != 0 {
		// go-libp2p has one Limit for both. The largest numbers stand for no limit.
		res.Limit = &circuit.RelayLimit{Duration: maxCircuitDuration, Data: math.MaxInt64}
		if duration != 0 {
			res.Limit.Duration = duration
		}
		if bytes != 0 {
			res.Limit.Data = bytes
		}
	}
	return res
}

// resourceLimits bounds the libp2p host. What it leaves out is unlimited,
// because the limits above it hold. Connections go out to other relays alone.
func (l limits) resourceLimits(kad protocol.ID, relays int) rcmgr.ConcreteLimitConfig {
	outbound, outboundEach := rcmgr.BlockAllLimit, rcmgr.BlockAllLimit
	if relays > 0 {
		outbound, outboundEach = rcmgr.LimitVal(relays), 1
	}
	streams := rcmgr.LimitVal(l.streams())
	// The resource manager counts what fairStreams reserves for each, circuit
	// buffers, messages being parsed, and QUIC windows beyond the initial one. It
	// gives windows 60 % of the whole and buffers 80 %, so windows starve first.
	memory := rcmgr.LimitVal64(l.shared())

	return rcmgr.PartialLimitConfig{
		System: rcmgr.ResourceLimits{
			Conns: rcmgr.LimitVal(l.clients + relays), ConnsInbound: rcmgr.LimitVal(l.clients), ConnsOutbound: outbound,
			Streams: streams, StreamsInbound: streams, StreamsOutbound: streams,
			Memory: memory,
		},
		// Transient: connections before the handshake has told who it is, streams
		// before they have told what they are.
		Transient: rcmgr.ResourceLimits{
			Conns: rcmgr.LimitVal(l.clients + relays), ConnsInbound: rcmgr.LimitVal(l.clients), ConnsOutbound: outbound,
			Streams: streams, StreamsInbound: streams, StreamsOutbound: streams,
			Memory: memory / 4,
		},
		PeerDefault: rcmgr.ResourceLimits{
			Conns: connsPerPeer, ConnsInbound: connsPerPeer, ConnsOutbound: outboundEach,
			Streams: 2 * streamsPerPeer, StreamsInbound: streamsPerPeer, StreamsOutbound: streamsPerPeer,
			Memory: peerMemory,
		},
		ProtocolPeer: map[protocol.ID]rcmgr.ResourceLimits{
			// rust-libp2p keeps at most 32 DHT requests to one peer open.
			kad: {Streams: 64, StreamsInbound: 64, StreamsOutbound: 64},
		},
		Service: map[string]rcmgr.ResourceLimits{
			circuit.ServiceName: {Memory: memory},
		},
	}.Build(rcmgr.InfiniteLimits)
}

// resourceOptions are the limits per network.
func (l limits) resourceOptions() []rcmgr.Option {
	perNetwork := rate.Limit{RPS: float64(l.perNetwork) / rateWindow.Seconds(), Burst: l.perNetwork}
	var free4, free6 []rcmgr.NetworkPrefixLimit
	var freeRate []rate.PrefixLimit // an RPS of 0 is no limit
	for _, prefix := range l.exempt {
		free := rcmgr.NetworkPrefixLimit{Network: prefix, ConnCount: math.MaxInt}
		if prefix.Addr().Is4() {
			free4 = append(free4, free)
		} else {
			free6 = append(free6, free)
		}
		freeRate = append(freeRate, rate.PrefixLimit{Prefix: prefix})
	}
	return []rcmgr.Option{
		rcmgr.WithLimitPerSubnet(
			[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 32, ConnCount: l.perNetwork}},
			[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 56, ConnCount: l.perNetwork}},
		),
		// Not nil even when empty, or go-libp2p's own exemptions stay.
		rcmgr.WithNetworkPrefixLimit(append([]rcmgr.NetworkPrefixLimit{}, free4...), append([]rcmgr.NetworkPrefixLimit{}, free6...)),
		rcmgr.WithConnRateLimiters(&rate.Limiter{
			NetworkPrefixLimits: freeRate,
			SubnetRateLimiter: rate.SubnetLimiter{
				IPv4SubnetLimits: []rate.SubnetLimit{{PrefixLength: 32, Limit: perNetwork}},
				IPv6SubnetLimits: []rate.SubnetLimit{{PrefixLength: 56, Limit: perNetwork}},
				GracePeriod:      time.Minute,
			},
		}),
	}
}

// networkOf is the block that a provider gives to one customer: see limits.
func networkOf(addr netip.Addr) netip.Prefix {
	bits := 56
	if addr.Is4() {
		bits = 32
	}
	network, _ := addr.Prefix(bits) // the zero Prefix of no address
	return network
}
