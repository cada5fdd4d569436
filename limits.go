package main

// Every number that bounds what clients can make the relay hold: memory,
// connections, streams, circuits, records. Each follows from the two that the
// operator chooses, --max-clients and --max-clients-per-ip, so that no default
// of a library bites first. Other files apply them.

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

	// maxRelays is how many other relays a relay knows, and how many addresses of some
	// --bootstrap accepts. maxVouched is the longest list of relays that one is told,
	// in bytes: as long as maxRelays with as many addresses as are told of a peer.
	maxRelays  = 64
	maxVouched = maxRelays << 10

	// groupRelays is how many relays keep a group's record: with two, nobody notices
	// that one is gone. Each device of the group is connected to these beside the relay
	// that it knows.
	groupRelays = 2

	// maxNamed is how many peers an answer names at most: the k of Kademlia, K_VALUE in
	// rust-libp2p.
	maxNamed = 20

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

	// answerTimeout is how long a DHT answer may wait for the client to give it room:
	// as long as rust-libp2p waits for it (substreams_timeout in its kad protocol.rs).
	answerTimeout = 10 * time.Second

	// freeKadMessage is how long a message may be that streamMemory covers, in bytes:
	// the clients' requests have some hundreds.
	freeKadMessage = 1 << 10

	// maxRecordValue and maxRecordKey bound a DHT record, in bytes. The clients'
	// keys have 53 (/privstack/syncgroup/ and a hash), their values some hundreds.
	maxRecordValue = 8 << 10
	maxRecordKey   = 256

	// maxRecordExtras bounds recordExtras, in bytes; a peer ID has at
	// most 44.
	maxRecordExtras = 128

	// avgRecord is what a record may take on average, in bytes, with what keeping
	// it costs.
	avgRecord = 2 << 10

	// maxRecordAge is how long a record is served unless it is put again; the
	// clients do so every 30 s.
	maxRecordAge = 48 * time.Hour

	// maxCircuitDuration is the longest that fits the protocol's field, which
	// counts seconds in 32 bits.
	maxCircuitDuration = math.MaxUint32 * time.Second

	// maxHTTPConns is the most connections to the identity endpoint at once. With
	// httpConnMemory they take 12 MiB. Others get their answers while somebody takes all
	// of them again and again (TestAttackHTTP).
	maxHTTPConns = 384

	// minBandwidth is the least for --max-bandwidth, in bytes per second: with it
	// the largest sync message, 16 MiB, takes 17 minutes.
	minBandwidth = 16 << 10

	// maxMaxClients is a typo's distance above anything one UDP port carries.
	maxMaxClients = 1_000_000
)

const (
	// clientMemory is what one client costs, in bytes: connected, reserved and
	// serving kad, with a record. Measured (go test -bench Capacity/clients): 68 KiB
	// of RSS each at 10 000 clients, 74 at 5 000.
	clientMemory = 68 << 10

	// baseMemory is what the relay takes whoever is connected, in bytes: 20 MiB of RSS
	// with nobody there, garbage, HTTP connections, and the tables and buffers of the
	// sockets.
	baseMemory = 20<<20 + minGarbage + maxHTTPConns*httpConnMemory + gateMemory + 2*socketMemory

	// httpConnMemory is what an HTTP connection costs, in bytes: measured with 1 000 whose
	// requests have 61 lines of 130 bytes and lack the end. Idle ones cost 12 KiB.
	httpConnMemory = 32 << 10

	// socketMemory is what belongs to each UDP socket, in bytes: the path guard, what it
	// reads into, and the bridge's newcomers. gateMemory is the gate. TestSocketMemory
	// adds them up. The kernel's own buffers come on top, and are not in the sum.
	socketMemory = 832 << 10
	gateMemory   = 512 << 10

	// initialWindow is what a client may send before the relay has read any of it,
	// in bytes, on one stream and on all. quic-go has 512 and 768 KiB, which a few
	// hundred clients could fill. The window doubles with each round trip that uses
	// it up, so a long transfer reaches maxWindow in the fifth round trip.
	initialWindow = 32 << 10

	// maxWindow is what initialWindow grows to on one stream, and half as much again
	// on a connection: 10 MiB/s for a circuit over 100 ms. With go-libp2p's 10 and
	// 15 MiB a few clients would take what all share.
	maxWindow = 1 << 20

	// maxFlight caps what is booked for what a connection has not acknowledged, in bytes:
	// 1 650 packets, so 18 MB/s to a client that is 100 ms away. With half of it, one
	// circuit on loopback carried 63 and 98 MiB/s, and without a cap 170 and 198.
	maxFlight = 3 << 20

	// maxCut caps what is booked beyond maxFlight for frames that quic-go has cut in two to
	// send them again, in bytes. With it, there may be twice as many frames as before the
	// cuts. For an honest client that loses all of maxFlight eight times, and sends as much
	// itself, quic-go cuts at most 496 KiB; for one that loses 5 % of its packets, nothing.
	maxCut = maxFlight

	// freeFlight is what the relay may send to a client before it has acknowledged any of
	// it, whatever others do, in bytes as flight.go counts them: four packets. Most
	// answers need one.
	freeFlight = 8 << 10

	// shareMemory is each client's own part of what comes and goes, in bytes: the
	// streams that it can count on, and what it says in identify. Nothing that others
	// do takes it away: see fairStreams.
	shareMemory = (streamShare+streamShareTo)*streamMemory + identifyMemory

	// identifyMemory is what go-libp2p books for an identify message, in bytes:
	// signedIDSize in its id.go.
	identifyMemory = 8 << 10

	// sharedMemory is for the rest of what comes and goes, in bytes: so much for each
	// client, and sharedBase once. Streams beyond a client's share, the buffers of
	// circuits and windows that have grown share it. When it is used up, no more are
	// granted.
	sharedMemory = 24 << 10
	sharedBase   = 16 << 20

	// streamMemory is what an open stream costs, in bytes, half of it its
	// goroutine's stack. Measured: 11 to 13 KiB for each of the protocols.
	streamMemory = 12 << 10

	// circuitBuffer is the relay's copy buffer for one direction of a circuit,
	// in bytes; both live as long as the circuit. go-libp2p's 2 KiB costs half
	// as much CPU again per byte; more than 64 KiB gains almost nothing.
	circuitBuffer = 16 << 10

	// maxIncomingStreams is how many streams a client may have open at once on a
	// connection; the next has to wait. QUIC keeps each, about 2 KiB, until the client
	// has ended it as well, even if the relay has refused it.
	maxIncomingStreams = 32

	// circuitsPerPeer is how many circuits one device can open, and how many can be
	// open to it: one for each other device of its user that only a relay can reach.
	// Each circuit that it opens takes a stream, so that many fit into one connection
	// beside requests.
	circuitsPerPeer = 24

	// circuitsPerPair is how many of the circuits to a device one other device can
	// open: as many as it may have connections, since it opens a new circuit when it
	// comes back over another path. circuitsPerNetwork is how many all devices of one
	// network can open to it: a user's others may all be at home.
	circuitsPerPair    = connsPerPeer
	circuitsPerNetwork = 12

	// streamsPerPeer bounds the streams open from one peer, and those open to it: as
	// many as its connections allow.
	streamsPerPeer = connsPerPeer * maxIncomingStreams

	// streamShare is how many streams each peer can count on to open, whatever the
	// others do: a device asks the DHT for three things at a time. streamShareTo is how
	// many can be opened to it: one, to ask it who it is.
	streamShare   = 3
	streamShareTo = 1

	// connsPerPeer is how many connections one client may have: room for a device
	// that comes back over another path before its old connection has timed out.
	connsPerPeer = 4

	// maxDials is how many addresses of another relay are dialled at once: as many as
	// go-libp2p's swarm does (DefaultPerPeerRateLimit). With fewer, an address that
	// does not answer would keep the swarm from trying the next.
	maxDials = 8

	// peerMemory is how much of the shared memory one peer can take, in bytes: the
	// windows of its connections and what it has not acknowledged, its streams and
	// circuits.
	peerMemory = connsPerPeer*(maxWindow*3/2+maxFlight+maxCut) + 2*streamsPerPeer*streamMemory + circuitsPerPeer*2*circuitBuffer

	// groupMembers is how many devices of one group are remembered, and for how many
	// other devices we know whether a device has met them. groupsPerClient is how many
	// groups a client can be in; the deployed ones are in one. A device that has not put
	// its group's record for groupAge is taken to have left: it does so every 30 s, and
	// may need that long again.
	groupMembers    = 16
	groupsPerClient = 2
	groupAge        = 2 * time.Minute

	// flowsPerClient is how many other devices a client can be bridged with at once:
	// twice as many as are remembered, for those that come back at another address.
	flowsPerClient = 2 * groupMembers

	// dialsPerFlow is how many dials of one flow can wait for an answer: both ends dial
	// at the same moment, and again.
	dialsPerFlow = 4

	// heldDatagrams is how many datagrams of a dial are held. Its first flight has one
	// or two.
	heldDatagrams = 4

	// unansweredDatagrams is how many datagrams may go to a device that has not
	// answered: three first flights of two, and as many repetitions. maxDatagram is how
	// long each may be, in bytes, on Ethernet.
	unansweredDatagrams = 12
	maxDatagram         = 1500

	// flowCredit is how many bytes may go one way until a packet of the same flow comes
	// the other way: twice the window of a connection between go-libp2p or rust-libp2p
	// clients (15 MiB), so more than they can have unacknowledged.
	flowCredit = 32 << 20

	// guessesPerSecond is how many packets of one client are forwarded although they
	// could be for either of two devices: those of one round trip, a few times.
	guessesPerSecond = 64

	// legIDs is how many connection IDs are remembered for one direction of a flow. A
	// QUIC connection uses three, and two may begin at once.
	legIDs = 8

	// newcomers is how many addresses are remembered from which somebody dials who is not
	// connected, for IPv4 and IPv6 each. They take 64 KiB each.
	newcomers = 1024

	// bridgeMemory is what the bridge takes for one client at most, in bytes: four flows
	// of 740 (TestFlowsTakeLittleMemory), an eighth of a dial of 6000 that is held, the
	// mates it was told, its end and its groups.
	bridgeMemory = 6 << 10

	// rateWindow is the time in which one network can open as many connections as it
	// may hold: after a restart of the relay an office is back at once, and yet
	// nobody can keep the relay busy with handshakes.
	rateWindow = 30 * time.Second
)

// loopback is exempt from the per-network limits: a reverse proxy, a test, or
// the operator is no stranger.
var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// limits are what the operator chose, and what there is. Its methods derive all
// other bounds.
type limits struct {
	// clients is the most connections, and so reservations, at once.
	clients int

	// perNetwork is the most connections from one network: see networkOf.
	perNetwork int

	// why says where clients comes from, for the log.
	why string

	// available is how much memory this process may use, in bytes; 0 is unknown.
	available uint64

	// testOnlyLimitLoopback applies perNetwork to loopback, too.
	testOnlyLimitLoopback bool
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
	return limits{clients: maxClients, perNetwork: perIP, why: why, available: available}
}

// clientsFor returns how many clients fit into memory bytes, whatever they do. 0
// bytes is unknown, and taken as half a gigabyte.
func clientsFor(memory uint64) int {
	if memory == 0 {
		memory = 512 << 20
	}
	usable := int64(min(memory, 1<<40)) - (baseMemory + sharedBase)
	return int(min(max(usable/(clientMemory+bridgeMemory+initialWindow+freeFlight+shareMemory+sharedMemory), 64), maxMaxClients))
}

// memory returns the most that the relay takes, in bytes, while all of its clients
// do their worst. A thousand well-behaved ones take 60 % of it.
func (l limits) memory() int64 {
	return baseMemory + int64(l.clients)*(clientMemory+bridgeMemory+initialWindow+freeFlight+shareMemory) + l.shared()
}

// goMemory returns the part of memory() that the Go runtime should stay within, in
// bytes. The rest is for the binary's own pages, and for what the runtime takes
// beyond its limit in a rush.
func (l limits) goMemory() int64 { return (l.memory() - baseMemory/2) / 8 * 7 }

// shared returns how much memory comes and goes, in bytes: see sharedMemory.
func (l limits) shared() int64 { return sharedBase + int64(l.clients)*sharedMemory }

// circuits returns the most circuits open at once: every client in one with
// another. circuits.AllowConnect enforces it.
func (l limits) circuits() int { return max(l.clients/2, circuitsPerPeer) }

// flows returns the most flows that the bridge carries at once: as many as if all
// clients were in groups of nine in which no two could meet otherwise.
func (l limits) flows() int { return max(4*l.clients, flowsPerClient) }

// holding returns how many dials may be held at once, each for maxHold or longer.
func (l limits) holding() int { return max(l.clients/8, flowsPerClient) }

// unproven returns how many clients may be in the handshake before newcomers have
// to prove their addresses by a Retry, which costs them a round trip.
func (l limits) unproven() int64 { return int64(max(l.clients/8, 16)) }

// streams returns the most streams open at once: everybody's share, and those
// beside it.
func (l limits) streams() int { return (streamShare+streamShareTo)*l.clients + l.unshared() }

// unshared returns how many streams may be open beside everybody's share: as many
// as there are clients, or as a few busy ones may have.
func (l limits) unshared() int { return max(l.clients, 8*streamsPerPeer) }

// records returns the bounds of the DHT's values: how many, and how many bytes all
// together. Two for each client leave room for devices that have left.
func (l limits) records() (n int, bytes int64) {
	n = max(2*l.clients, 1024)
	return n, int64(n) * avgRecord
}

// circuitResources returns the bounds of the circuit relay service. A duration or a
// number of bytes (each way) of 0 is unlimited.
func (l limits) circuitResources(duration time.Duration, bytes int64) circuit.Resources {
	res := circuit.Resources{
		ReservationTTL:  time.Hour,
		MaxReservations: l.clients,
		// Both directions count here, so it never bites before circuits.admit.
		MaxCircuits: 2 * circuitsPerPeer,
		BufferSize:  circuitBuffer,
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

// resourceLimits returns the bounds of the libp2p host. What it leaves out is
// unlimited, because the bounds above it hold. Only other relays, of which there
// are relays, are dialled.
func (l limits) resourceLimits(relays int) rcmgr.ConcreteLimitConfig {
	outbound, outboundEach := rcmgr.BlockAllLimit, rcmgr.BlockAllLimit
	if relays > 0 {
		outbound, outboundEach = rcmgr.LimitVal(relays*maxDials), maxDials
	}
	streams := rcmgr.LimitVal(l.streams())
	// The resource manager counts streams and messages beyond their peer's share,
	// circuit buffers, and QUIC windows beyond the initial one. It gives windows 60 % of
	// the whole, streams and buffers 80 %, so windows starve first.
	memory := rcmgr.LimitVal64(l.shared())

	return rcmgr.PartialLimitConfig{
		System: rcmgr.ResourceLimits{
			Conns: rcmgr.LimitVal(l.clients + relays*maxDials), ConnsInbound: rcmgr.LimitVal(l.clients), ConnsOutbound: outbound,
			Streams: streams, StreamsInbound: streams, StreamsOutbound: streams,
			Memory: memory,
		},
		// Transient: connections before the handshake has told who it is, streams
		// before they have told what they are.
		Transient: rcmgr.ResourceLimits{
			Conns: rcmgr.LimitVal(l.clients + relays*maxDials), ConnsInbound: rcmgr.LimitVal(l.clients), ConnsOutbound: outbound,
			Streams: streams, StreamsInbound: streams, StreamsOutbound: streams,
			Memory: memory / 4,
		},
		PeerDefault: rcmgr.ResourceLimits{
			Conns: connsPerPeer + max(outboundEach, 0), ConnsInbound: connsPerPeer, ConnsOutbound: outboundEach,
			Streams: 2 * streamsPerPeer, StreamsInbound: streamsPerPeer, StreamsOutbound: streamsPerPeer,
			Memory: peerMemory,
		},
		ProtocolPeer: map[protocol.ID]rcmgr.ResourceLimits{
			// rust-libp2p keeps at most 32 DHT requests to one peer open.
			kadProtocol: {Streams: 64, StreamsInbound: 64, StreamsOutbound: 64},
		},
		Service: map[string]rcmgr.ResourceLimits{
			circuit.ServiceName: {Memory: memory},
		},
	}.Build(rcmgr.InfiniteLimits)
}

// freeNetworks returns those that may hold any number of connections.
func (l limits) freeNetworks() []netip.Prefix {
	if l.testOnlyLimitLoopback {
		return nil
	}
	return loopback
}

// networkRate returns a limiter by which each network may do something so often.
func (l limits) networkRate(each rate.Limit) *rate.Limiter {
	r := &rate.Limiter{SubnetRateLimiter: rate.SubnetLimiter{
		IPv4SubnetLimits: []rate.SubnetLimit{{PrefixLength: ipv4NetworkBits, Limit: each}},
		IPv6SubnetLimits: []rate.SubnetLimit{{PrefixLength: ipv6NetworkBits, Limit: each}},
		GracePeriod:      time.Minute,
	}}
	for _, free := range l.freeNetworks() {
		r.NetworkPrefixLimits = append(r.NetworkPrefixLimits, rate.PrefixLimit{Prefix: free}) // an RPS of 0 is no limit
	}
	return r
}

// unprovenRate returns a limiter for the connections that a network may begin before it
// has to prove its addresses: half of its places, which forged ones take for 5 s, and
// one each 10 s. go-libp2p's resource manager has the same (sourceAddressRPS).
func (l limits) unprovenRate() *rate.Limiter {
	return l.networkRate(rate.Limit{RPS: 0.1, Burst: l.perNetwork / 2})
}

// resourceOptions returns the bounds per network.
func (l limits) resourceOptions() []rcmgr.Option {
	return []rcmgr.Option{
		// networks counts connections, which the resource manager does where they
		// began. Empty and not nil, or go-libp2p's own limits stay.
		rcmgr.WithLimitPerSubnet([]rcmgr.ConnLimitPerSubnet{}, []rcmgr.ConnLimitPerSubnet{}),
		rcmgr.WithNetworkPrefixLimit([]rcmgr.NetworkPrefixLimit{}, []rcmgr.NetworkPrefixLimit{}),
		rcmgr.WithConnRateLimiters(l.networkRate(rate.Limit{RPS: float64(l.perNetwork) / rateWindow.Seconds(), Burst: l.perNetwork})),
	}
}

// free reports whether addr is exempt from the bounds per network.
func (l limits) free(addr netip.Addr) bool {
	return !addr.IsValid() || !l.testOnlyLimitLoopback && addr.IsLoopback()
}

// A network is the block of addresses that a provider gives to one customer: an
// IPv4 address, or an IPv6 /56, the smallest block that providers give (RIPE-690).
const (
	ipv4NetworkBits = 32
	ipv6NetworkBits = 56
)

// networkOf returns the network that addr is in. Of no address it is the zero
// Prefix.
func networkOf(addr netip.Addr) netip.Prefix {
	bits := ipv6NetworkBits
	if addr.Is4() {
		bits = ipv4NetworkBits
	}
	network, _ := addr.Prefix(bits)
	return network
}
