package main

// The libp2p node, put together: QUIC transport, circuit relay, DHT, and the
// order in which they start and close. It imports neither net/http, flag nor os.

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/observedaddrs"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	circuit "github.com/libp2p/go-libp2p/p2p/protocol/circuitv2/relay"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	"github.com/prometheus/client_golang/prometheus"
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
	groups   groups
	bridge   *bridge

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
	r.circuits = newCircuits(log, &r.tally, r.peers.reserve)
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
	r.peers.left = r.groups.leave
	r.bridge = newBridge(log, &r.tally, lim, r.peers)
	r.bridge.maxBytes, r.bridge.maxAge = cfg.circuitBytes, cfg.circuitDuration
	r.sockets.tap, r.sockets.ids = r.bridge.tap, r.bridge
	r.sockets.testOnlyPlain = cfg.testOnlyPlainSockets
	r.answers = &answers{peers: r.peers, relays: r.relays, groups: &r.groups, bridge: r.bridge}
	if r.host, err = r.newHost(privKey); err != nil {
		return nil, fmt.Errorf("start libp2p: %w", err)
	}
	if r.dht, err = r.newDHT(); err != nil {
		return nil, fmt.Errorf("start dht: %w", err)
	}
	if err := r.peers.follow(r.host); err != nil {
		return nil, fmt.Errorf("follow peers: %w", err)
	}
	r.bridge.follow(r.host.Network())
	circuitHost := r.host
	if cfg.maxBandwidth > 0 {
		paced := newPacedHost(r.host, cfg.maxBandwidth)
		circuitHost, r.bridge.bandwidth = paced, paced.limiter
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

// drain refuses new reservations, circuits and flows over the bridge and waits until
// the open circuits are closed, for at most timeout. It returns how many are left.
func (r *relay) drain(ctx context.Context, timeout time.Duration) int {
	r.bridge.drain()
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
	if r.bridge != nil {
		r.bridge.close()
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
// connections, their addresses, the bridge, circuits. A sign of life.
func (r *relay) takeLocks() {
	r.host.Network().Conns()
	r.bridge.lock()
	r.bridge.unlock()
	r.counters()
	r.peers.mu.Lock()
	defer r.peers.mu.Unlock()
}

func (r *relay) counters() counters {
	c := counters{
		peersServed:  r.peers.served.count(),
		bridged:      int(r.tally.bridged.Load()),
		bridgedBytes: r.tally.bridgedBytes.Load(),
		clients:      len(r.host.Network().Peers()),
		reservations: r.tally.reservations.Load(),
		bridges:      r.tally.bridges.Load(),
	}
	r.host.Network().ResourceManager().ViewSystem(func(s network.ResourceScope) error {
		c.connections = s.Stat().NumConnsInbound
		return nil
	})
	c.relayedConnections, c.circuits = r.circuits.counts()
	c.relayedConnections += c.bridged
	c.relayedBytes = r.tally.relayedBytes.Load() + c.bridgedBytes
	c.records, c.recordBytes = r.records.held()
	for i := range c.requests {
		c.requests[i] = r.tally.requests[i].Load()
	}
	for i := range c.refused {
		c.refused[i] = r.tally.refused[i].Load()
	}
	return c
}
