package main

// The libp2p node, put together: QUIC transport, circuit relay, DHT, and the
// order in which they start and close. It imports neither net/http, flag nor os.

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/observedaddrs"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	circuitpb "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/pb"
	circuit "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/prometheus/client_golang/prometheus"
)

const (
	// protocolVersion is what identify and the identity endpoint say.
	protocolVersion = "/privstack/relay/1.0.0"

	// kadProtocol is rust-libp2p's default DHT protocol, kad::PROTOCOL_NAME,
	// which the clients left as it was: theirs is a network of its own
	// nonetheless, because nothing ties it to IPFS's nodes.
	kadProtocol protocol.ID = "/ipfs/kad/1.0.0"
)

// relay is a running node. Make it with startRelay, end it with drain and close.
type relay struct {
	limits   limits
	announce []ma.Multiaddr
	tally    tally
	sockets  quicSockets
	host     host.Host
	dht      *dht.IpfsDHT
	records  *recordStore
	service  *circuit.Relay
	peers    *peers
	answers  *answers
	relays   *relays
	circuits *circuits

	// registry gathers the metrics, go-libp2p's among them. It is nil unless
	// the operator asked for them.
	registry *prometheus.Registry

	// failed gets the reason, once, if the node stops by itself.
	failed chan error
}

// startRelay returns with both sockets bound and everything serving.
func startRelay(cfg config, key ed25519.PrivateKey, log *slog.Logger) (_ *relay, err error) {
	return startRelayWithin(newLimits(cfg.maxClients, cfg.maxClientsPerIP), cfg, key, log)
}

func startRelayWithin(lim limits, cfg config, key ed25519.PrivateKey, log *slog.Logger) (_ *relay, err error) {
	r := &relay{limits: lim, peers: newPeers(log), failed: make(chan error, 1)}
	r.circuits = newCircuits(log, &r.tally)
	r.sockets.tally = &r.tally
	if cfg.metrics != "" {
		r.registry = newRegistry(r)
	}
	r.sockets.maxUnproven = lim.unproven()
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()

	privKey, err := crypto.UnmarshalEd25519PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("identity key: %w", err)
	}
	port := cfg.port
	if port == 0 {
		if port, err = freePort(); err != nil {
			return nil, fmt.Errorf("find a free UDP port: %w", err)
		}
	}
	if r.announce, err = announcedAddrs(cfg.announce, port, privKey); err != nil {
		return nil, err
	}
	if r.relays, err = newRelays(cfg.bootstrap, log); err != nil {
		return nil, err
	}
	if self, err := peer.IDFromPrivateKey(privKey); err != nil || r.relays.named[self] != nil {
		return nil, errors.Join(err, fmt.Errorf("bootstrap: %s is this relay", self))
	}
	r.peers.relays = r.relays.named
	r.answers = &answers{peers: r.peers, relays: r.relays}
	if r.host, err = r.newHost(privKey); err != nil {
		return nil, fmt.Errorf("start libp2p: %w", err)
	}
	if r.dht, err = r.newDHT(); err != nil {
		return nil, fmt.Errorf("start dht: %w", err)
	}
	if err := r.peers.follow(r.host, r.dht.RoutingTable()); err != nil {
		return nil, fmt.Errorf("follow peers: %w", err)
	}
	circuitHost := r.host
	if cfg.maxBandwidth > 0 {
		circuitHost = newPacedHost(r.host, cfg.maxBandwidth)
	}
	r.service, err = circuit.New(circuitHost,
		circuit.WithResources(lim.resources(cfg.circuitDuration, cfg.circuitBytes)),
		// Every address that advertised leaves in: a rust client refuses a
		// reservation without one, and the default filter leaves none on a LAN
		// or behind a 1:1 NAT.
		circuit.WithReservationAddressFilter(func(ma.Multiaddr) bool { return true }),
		circuit.WithACL(r.circuits),
		circuit.WithMetricsTracer(r.circuitTracer()),
	)
	if err != nil {
		return nil, fmt.Errorf("start circuit relay: %w", err)
	}

	// Listen last: the first client meets a relay that is whole.
	r.relays.follow(r.host)
	if err := r.listen(port, log); err != nil {
		return nil, err
	}
	r.relays.connect() // from the sockets that listen
	return r, nil
}

// newHost is a libp2p host that speaks QUIC, identify and ping, and listens on
// nothing yet. libp2p.New would be shorter, but links every transport there is and
// half as many modules again: code that could only be attacked, on every machine.
func (r *relay) newHost(key crypto.PrivKey) (host.Host, error) {
	self, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, err
	}
	store, err := pstoremem.NewPeerstore()
	if err != nil {
		return nil, err
	}
	onBus, onSwarm, onResources := r.libp2pMetrics()
	// From here the host takes its keys, for identify and its signed record.
	if err := errors.Join(store.AddPrivKey(self, key), store.AddPubKey(self, key.GetPublic())); err != nil {
		return nil, err
	}
	// It refuses newcomers. There is no connection manager, which would make room
	// by closing connections of clients that are already in.
	resources, err := rcmgr.NewResourceManager(
		rcmgr.NewFixedLimiter(r.limits.resourceLimits(kadProtocol, len(r.relays.named))),
		append(r.limits.resourceOptions(), onResources...)...)
	if err != nil {
		return nil, err
	}
	resources = fairStreams{resources, r.limits.unshared()}
	bus := eventbus.NewBus(onBus...)
	swarm, err := swarm.NewSwarm(self, addrBook{store, store, self, r.peers}, bus, append(onSwarm,
		swarm.WithConnectionGater(r.relays),
		swarm.WithResourceManager(resources))...)
	if err != nil {
		return nil, err
	}
	transport, err := r.sockets.newTransport(key, r.relays, resources)
	if err != nil {
		return nil, err
	}
	if err := swarm.AddTransport(transport); err != nil {
		return nil, err
	}
	observed, err := observedaddrs.NewManager(bus, swarm)
	if err != nil {
		return nil, err
	}
	// No AutoNAT: it would ask clients to dial back, and whether the relay can be
	// reached is the operator's to see to. No relay client: nobody reaches it
	// through others.
	h, err := basichost.NewHost(swarm, &basichost.HostOpts{
		EventBus:             bus,
		ProtocolVersion:      protocolVersion,
		UserAgent:            agentVersion(),
		EnablePing:           true,
		AddrsFactory:         r.advertised,
		ObservedAddrsManager: observed,
		EnableMetrics:        r.registry != nil,
		PrometheusRegisterer: r.registry,
	})
	if err != nil {
		return nil, err
	}
	observed.Start(swarm)
	h.Start()
	return observingHost{h, observed}, nil
}

// observingHost closes with the host what tells it its observed addresses.
type observingHost struct {
	*basichost.BasicHost
	observed *observedaddrs.Manager
}

func (h observingHost) Close() error {
	// The network goes first: a host waits for what it is telling its clients,
	// and one that does not read would hold up the end by seconds.
	return errors.Join(h.observed.Close(), h.Network().Close(), h.BasicHost.Close())
}

// newDHT serves DHT requests and makes none.
func (r *relay) newDHT() (*dht.IpfsDHT, error) {
	r.records = newRecordStore(r.limits.records())
	return dht.New(kadHost{r.host, r.answers, &r.tally},
		dht.Mode(dht.ModeServer),
		// On the prefix /ipfs kad-dht insists on IPFS's two validators, so it
		// gets another one, and the protocol by itself.
		dht.ProtocolPrefix("/privstack"),
		dht.V1ProtocolOverride(kadProtocol),
		dht.Validator(recordValidator{}),
		dht.Datastore(r.records),
		dht.MaxRecordAge(maxRecordAge),
		dht.ValueGCInterval(0), // recordStore drops by itself what is too old
		dht.DisableProviders(), // unbounded, and clients have none
		// peers admits to the routing table: no lookup checks of kad-dht's own,
		// and no refreshing, which would dial what clients name.
		dht.LookupCheckConcurrency(0),
		dht.DisableAutoRefresh(),
		dht.OnRequestHook(func(_ context.Context, s network.Stream, req *kadpb.Message) {
			boundRequest(req)
			r.tally.dhtRequest(req)
			r.records.from(s.Conn(), req)
			s.(*kadStream).request = req
			r.peers.admit(s.Conn().RemotePeer())
		}),
	)
}

// listen binds the UDP port on IPv4 and IPv6. A machine without one of them is
// worth a warning; a port that is taken is an error.
func (r *relay) listen(port int, log *slog.Logger) error {
	for _, family := range []struct{ name, network, addr string }{
		{"IPv4", "udp4", "/ip4/0.0.0.0/udp/%d/quic-v1"},
		{"IPv6", "udp6", "/ip6/::/udp/%d/quic-v1"},
	} {
		// Whether any port can be bound tells the two apart on every system.
		probe, err := net.ListenPacket(family.network, ":0")
		if err != nil {
			log.Warn("no "+family.name+" on this machine, clients can't reach it that way", "err", err)
			continue
		}
		probe.Close()
		if err := r.sockets.bind(family.network, port); err != nil {
			return fmt.Errorf("bind UDP port %d on %s: %w", port, family.name, err)
		}
		if err := r.host.Network().Listen(ma.StringCast(fmt.Sprintf(family.addr, port))); err != nil {
			return fmt.Errorf("listen on UDP port %d on %s: %w", port, family.name, err)
		}
	}
	bound := r.host.Network().ListenAddresses()
	if len(bound) == 0 {
		return errors.New("neither IPv4 nor IPv6 on this machine")
	}
	// Switched off by sysctl, IPv6 can still be bound, but no interface has it.
	addrs, err := r.host.Network().InterfaceListenAddresses()
	if err != nil {
		return fmt.Errorf("list interface addresses: %w", err)
	}
	if !slices.ContainsFunc(addrs, func(a ma.Multiaddr) bool { return a[0].Protocol().Code == ma.P_IP6 }) {
		log.Warn("no interface has an IPv6 address, clients can't reach it that way")
	}
	r.host.Network().Notify(&network.NotifyBundle{ListenCloseF: func(_ network.Network, a ma.Multiaddr) {
		select { // when the host closes there is nobody to tell, and no need
		case r.failed <- fmt.Errorf("listener on %s stopped", a):
		default:
		}
	}})
	return nil
}

// freePort finds a UDP port for both families, as they share one number.
func freePort() (int, error) {
	conn, err := net.ListenPacket("udp", ":0")
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).Port, nil
}

// advertised is what peers are told of this relay's addresses, in identify and
// in reservations: the announced ones; else those of the machine (addrs, with
// what peers observed), public ones first, without loopback unless it is all
// there is. It is never empty while the relay listens.
func (r *relay) advertised(addrs []ma.Multiaddr) []ma.Multiaddr {
	if len(r.announce) > 0 {
		return r.announce
	}
	var public, private, loopback []ma.Multiaddr
	for _, a := range addrs {
		switch {
		case manet.IsIPLoopback(a):
			loopback = append(loopback, a)
		case manet.IsPublicAddr(a):
			public = append(public, a)
		case !manet.IsIP6LinkLocal(a): // which means nothing on another link
			private = append(private, a)
		}
	}
	offered := append(public, private...)
	if len(offered) == 0 {
		offered = loopback
	}
	return offered[:min(len(offered), maxOfferedAddrs)]
}

func (r *relay) peerID() string { return r.host.ID().String() }

// boundAddrs are the sockets.
func (r *relay) boundAddrs() []string {
	sockets := r.host.Network().ListenAddresses()
	slices.SortFunc(sockets, ma.Multiaddr.Compare) // IPv4 first, as the old relay had it
	return strs(sockets)
}

// reachableAddrs are the multiaddrs for clients to bootstrap from, best first.
func (r *relay) reachableAddrs() []string {
	return strs(r.advertised(r.host.Addrs()))
}

// listedAddrs are those of the identity endpoint: what is announced, then the
// sockets as they were bound.
func (r *relay) listedAddrs() []string {
	return append(strs(r.announce), r.boundAddrs()...)
}

// hidden says that no address is announced and none of the machine's is public:
// clients in other networks are told none that they can reach.
func (r *relay) hidden() bool {
	return len(r.announce) == 0 && !slices.ContainsFunc(r.advertised(r.host.Addrs()), manet.IsPublicAddr)
}

func strs(addrs []ma.Multiaddr) []string {
	out := make([]string, len(addrs))
	for i, a := range addrs {
		out[i] = a.String()
	}
	return out
}

// announcedAddrs are the addresses that the operator announces, for a relay on
// port with key; its ID may end them.
func announcedAddrs(announce []string, port int, key crypto.PrivKey) ([]ma.Multiaddr, error) {
	self, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, err
	}
	var addrs []ma.Multiaddr
	for _, s := range announce {
		addr, err := parseAnnounce(s, port)
		if err != nil {
			return nil, fmt.Errorf("announce %s: %w", s, err)
		}
		addr, id := peer.SplitAddr(addr)
		if id != "" && id != self {
			return nil, fmt.Errorf("announce %s: this relay is %s", s, self)
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

// dnsName is a host name: letters, digits and hyphens between dots (RFC 1123).
var dnsName = regexp.MustCompile(`^([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.?$`)

// parseAnnounce reads an address that clients can reach: an IP address or a DNS
// name, at which UDP port is ours, or a full QUIC multiaddr, which may name
// another port and end in /p2p and our ID.
func parseAnnounce(s string, port int) (ma.Multiaddr, error) {
	const example = "write an IP address, a DNS name, or a multiaddr such as /ip4/203.0.113.7/udp/4001/quic-v1"
	text := s
	if ip, err := netip.ParseAddr(s); err == nil {
		if ip.Zone() != "" {
			return nil, errors.New("an address with a zone means nothing on another machine")
		}
		ip = ip.Unmap()
		family := "ip6"
		if ip.Is4() {
			family = "ip4"
		}
		text = fmt.Sprintf("/%s/%s/udp/%d/quic-v1", family, ip, port)
	} else if len(s) <= 253 && dnsName.MatchString(s) {
		text = fmt.Sprintf("/dns/%s/udp/%d/quic-v1", strings.TrimSuffix(s, "."), port)
	} else if !strings.HasPrefix(s, "/") {
		return nil, errors.New(example)
	}
	addr, err := ma.NewMultiaddr(text)
	if err != nil {
		return nil, fmt.Errorf("%w; %s", err, example)
	}
	transport, _ := peer.SplitAddr(addr)
	if len(transport) != 3 || !(manet.IsThinWaist(transport) || isDNS(transport)) ||
		transport[1].Protocol().Code != ma.P_UDP || transport[2].Protocol().Code != ma.P_QUIC_V1 {
		return nil, fmt.Errorf("not a QUIC address; %s", example)
	}
	if ip, err := manet.ToIP(transport); err == nil && (ip.IsUnspecified() || ip.IsMulticast()) {
		return nil, errors.New("not an address that a client can reach")
	}
	if len(transport.Bytes()) > 260 {
		return nil, errors.New("longer than a DNS name can be")
	}
	return addr, nil
}

// drain refuses new reservations and circuits and waits until the open circuits
// are closed, for at most timeout. It returns how many are left.
func (r *relay) drain(ctx context.Context, timeout time.Duration) int {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return r.circuits.drain(ctx)
}

// close ends everything that was started, in reverse order. It may be called on
// a relay that startRelay did not finish.
func (r *relay) close() error {
	var errs []error
	if r.relays != nil {
		r.relays.close()
	}
	if r.service != nil {
		errs = append(errs, r.service.Close())
	}
	r.peers.close()
	if r.dht != nil {
		errs = append(errs, r.dht.Close())
	}
	if r.host != nil {
		errs = append(errs, r.host.Close())
	}
	errs = append(errs, r.sockets.close())
	return errors.Join(errs...)
}

// takeLocks returns when each lock on a client's way was free for a moment:
// connections, their addresses, the routing table, circuits. A sign of life.
func (r *relay) takeLocks() {
	r.host.Network().Conns()
	r.dht.RoutingTable().Size()
	r.counters()
	r.peers.mu.Lock()
	defer r.peers.mu.Unlock()
}

// circuits counts circuits and, once draining, refuses new ones. It is the
// circuit relay's metrics tracer, for its only view of a circuit's ends, and its
// access control.
type circuits struct {
	log   *slog.Logger
	tally *tally

	mu          sync.Mutex
	established int
	open        int           // being opened or open
	draining    bool          //
	drained     chan struct{} // closed when draining and none are open
}

func newCircuits(log *slog.Logger, t *tally) *circuits {
	return &circuits{log: log, tally: t, drained: make(chan struct{})}
}

func (c *circuits) counts() (established, open int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.established, c.open
}

func (c *circuits) drain(ctx context.Context) (left int) {
	c.mu.Lock()
	c.draining = true
	c.closeIfDrained()
	c.mu.Unlock()
	select {
	case <-c.drained:
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open
}

func (c *circuits) closeIfDrained() {
	if c.draining && c.open == 0 {
		select {
		case <-c.drained:
		default:
			close(c.drained)
		}
	}
}

func (c *circuits) allow() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.draining
}

func (c *circuits) AllowReserve(peer.ID, ma.Multiaddr) bool          { return c.allow() }
func (c *circuits) AllowConnect(peer.ID, ma.Multiaddr, peer.ID) bool { return c.allow() }

// ConnectionOpened comes before the destination has been asked.
func (c *circuits) ConnectionOpened() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open++
}

// ConnectionClosed comes for each ConnectionOpened.
func (c *circuits) ConnectionClosed(time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open--
	c.closeIfDrained()
}

// ConnectionRequestHandled comes once both ends are joined, or it failed.
func (c *circuits) ConnectionRequestHandled(status circuitpb.Status) {
	c.tally.circuitRequest(requestConnect, status)
	if status != circuitpb.Status_OK {
		return
	}
	c.mu.Lock()
	c.established++
	n := c.established
	c.mu.Unlock()
	c.log.Debug("circuit established", "relayed_connections", n)
}

func (c *circuits) ReservationRequestHandled(status circuitpb.Status) {
	c.tally.circuitRequest(requestReserve, status)
}

func (c *circuits) ReservationAllowed(renewal bool) {
	if !renewal {
		c.tally.reservations.Add(1)
	}
}

func (c *circuits) ReservationClosed(n int) { c.tally.reservations.Add(-int64(n)) }
func (c *circuits) BytesTransferred(n int)  { c.tally.relayedBytes.Add(int64(n)) }
func (*circuits) RelayStatus(bool)          {}
